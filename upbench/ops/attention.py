"""Attention from a dense grid of queries to all cells of a low-resolution map.

Each head has H W times h w weights: 822 MB at 448 pixels and 32 x 32 features, in float32. So they never
exist at once: queries are taken in runs whose weights fit a memory budget, which changes the result by
rounding alone. In training a run is computed again in the backward pass, instead of keeping its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError
from upbench.ops.basis import BasisOperator

_BUDGET = {"cpu": 32 * 2**20}  # on a CPU about what its caches serve well
_BUDGET_ELSEWHERE = 1 << 30


def global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    average_heads: bool = False,
    scale: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Softmax attention of every output pixel to every low-resolution cell.

    Heads split channels contiguously: head n owns channels [n D, (n + 1) D). The softmax is taken in float32
    (in float64 for such inputs).

    Args:
        q: `[B, Cq, H, W]`.
        k: `[B, Cq, h, w]`.
        v: `[B, Cv, h, w]`.
        heads: Number of heads; divides Cq and, without `average_heads`, Cv.
        average_heads: The softmax weights are averaged over heads, and the average is applied to all of v
            (JAFAR, Couairon et al. 2025).
        scale: Factor on the logits; (Cq / heads) ** -0.5 by default.
        memory_budget: Bytes of working memory to stay near, beside the output; at least one query at a time.

    Returns:
        `[B, Cv, H, W]` in the dtype of v.

    Raises:
        UpbenchError: Shapes that do not fit, or a budget that is not positive.
    """
    _check(q, k, heads, memory_budget)
    if v.ndim != 4 or v.shape[0] != k.shape[0] or v.shape[2:] != k.shape[2:]:
        raise UpbenchError(f"values {list(v.shape)} do not lie on the grid of the keys {list(k.shape)}")
    if not average_heads and v.shape[1] % heads:
        raise UpbenchError(f"{v.shape[1]} value channels cannot be split over {heads} heads")
    factor = (int(q.shape[1]) // heads) ** -0.5 if scale is None else scale
    attend = _averaged if average_heads else _by_head
    queries, keys = _heads(q, heads), _heads(k * factor, heads)
    values = v.flatten(2) if average_heads else _heads(v, heads)
    runs = list(_runs(queries, keys, int(v.shape[1]), memory_budget))
    out: Tensor
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        parts = [_again(attend, len(runs) > 1, queries[:, :, run], keys, values).to(v.dtype) for run in runs]
        out = torch.cat(parts, 2)
    else:
        out = v.new_empty(int(v.shape[0]), int(v.shape[1]), int(queries.shape[2]))
        for run in runs:
            out[:, :, run] = attend(queries[:, :, run], keys, values)
    return out.view(*out.shape[:2], *q.shape[2:])


def global_operator(
    q: Tensor,
    k: Tensor,
    *,
    heads: int,
    average_heads: bool = False,
    scale: float | None = None,
    memory_budget: int | None = None,
) -> GlobalOperator | BasisOperator:
    """The same attention as an operator on any values.

    It keeps queries and keys, and computes weights anew for the pixels that are asked for; or the weights
    themselves, where heads share them and they are no more than twice as large.

    Args: as for `global_attention`. Queries and keys are detached: the operator carries no gradient to them.
    """
    _check(q, k, heads, memory_budget)
    factor = (int(q.shape[1]) // heads) ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach() * factor
    cells = int(k.shape[2]) * int(k.shape[3])
    if not average_heads or cells > 2 * int(q.shape[1]):
        return GlobalOperator(q, k, heads, average_heads, memory_budget)
    queries, keys = _heads(q, heads), _heads(k, heads)
    weights = q.new_empty(int(q.shape[0]), cells, int(queries.shape[2]))
    for run in _runs(queries, keys, cells, memory_budget):
        weights[:, :, run] = _weights(queries[:, :, run], keys, True)[:, 0].mT
    return BasisOperator(weights.view(*weights.shape[:2], *q.shape[2:]))


class GlobalOperator(Operator):
    """Kept queries and keys, as an operator (see `Operator`).

    Weights are computed anew for the pixels that are asked for: a row of weights has h w numbers and a query
    Cq, which are fewer where it matters (128 instead of 1024 for JAFAR at 448 pixels).

    Attributes:
        q: `[B, Cq, H, W]` queries.
        k: `[B, Cq, h, w]` keys, times the scale of the logits.
        heads: Number of heads.
        average_heads: Whether all channels share the mean of the heads' weights; then `groups` is 1.
        memory_budget: As for `global_attention`.
    """

    def __init__(
        self, q: Tensor, k: Tensor, heads: int, average_heads: bool, memory_budget: int | None = None
    ) -> None:
        self.q = q
        self.k = k
        self.heads = heads
        self.average_heads = average_heads
        self.memory_budget = memory_budget
        self.groups = 1 if average_heads else heads
        self.output_size = (int(q.shape[2]), int(q.shape[3]))

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups; in the dtype of `values`.

        The weights of the output are kept where `values` want a gradient.
        """
        expected = (self.groups, *self.k.shape[2:])
        if values.ndim != 5 or (values.shape[1], *values.shape[3:]) != expected:
            g, h, w = expected
            raise UpbenchError(f"operator takes [B, {g}, K, {h}, {w}], got {list(values.shape)}")
        queries = _heads(self.q, self.heads).to(values.dtype)
        keys = _heads(self.k, self.heads).to(values.dtype)
        low = values.flatten(3)
        parts = []
        for run in _runs(queries, keys, int(values.shape[2]), self.memory_budget):
            weights = _weights(queries[:, :, run], keys, self.average_heads).to(values.dtype)
            parts.append((low @ weights.mT).sum(1))
        return torch.cat(parts, 2).view(int(values.shape[0]), int(values.shape[2]), *self.output_size)

    def crop(self, rows: slice, cols: slice) -> GlobalOperator:
        """The operator for a rectangle of output pixels; a view of its queries."""
        cut = self.q[:, :, rows, cols]
        return GlobalOperator(cut, self.k, self.heads, self.average_heads, self.memory_budget)

    def to(self, *args: Any, **kwargs: Any) -> GlobalOperator:
        """The operator with queries and keys moved or cast; float16 halves what keeping it costs."""
        q, k = (x.to(*args, **kwargs) for x in (self.q, self.k))
        return GlobalOperator(q, k, self.heads, self.average_heads, self.memory_budget)

    def nbytes(self) -> int:
        """Bytes of queries and keys."""
        return sum(x.numel() * x.element_size() for x in (self.q, self.k))


def _check(q: Tensor, k: Tensor, heads: int, memory_budget: int | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2]:
        raise UpbenchError(f"queries {list(q.shape)} and keys {list(k.shape)} must share batch and channels")
    if heads < 1 or q.shape[1] % heads:
        raise UpbenchError(f"{q.shape[1]} query channels cannot be split over {heads} heads")
    if memory_budget is not None and memory_budget < 1:
        raise UpbenchError(f"memory budget {memory_budget} is not positive")


def _heads(x: Tensor, heads: int) -> Tensor:
    """`[B, heads * D, H, W]` to `[B, heads, H * W, D]`, a view wherever the grid can be read in one go."""
    split: Tensor = x.flatten(2).unflatten(1, (heads, -1))
    return split.mT


def _runs(queries: Tensor, keys: Tensor, channels: int, budget: int | None) -> Iterator[slice]:
    """Runs of queries whose logits, weights and output of so many channels stay near `budget` bytes."""
    b, heads, count, dim = map(int, queries.shape)
    cells = int(keys.shape[2])
    per_query = b * (2 * heads * cells + heads * dim + channels) * max(4, queries.element_size())
    step = max(1, (budget or _BUDGET.get(queries.device.type, _BUDGET_ELSEWHERE)) // per_query)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _weights(queries: Tensor, keys: Tensor, average: bool) -> Tensor:
    """Softmax weights of `[B, heads, n, D]` queries, `[B, heads or 1, n, h * w]`."""
    logits = queries @ keys.mT
    weights = torch.softmax(logits, 3, dtype=torch.promote_types(logits.dtype, torch.float32))
    return weights.mean(1, keepdim=True) if average else weights


def _averaged(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`[B, heads, n, D]` queries and `[B, Cv, h * w]` values to `[B, Cv, n]`."""
    return values @ _weights(queries, keys, True)[:, 0].mT.to(values.dtype)


def _by_head(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`[B, heads, n, D]` queries and `[B, heads, h * w, Dv]` values to `[B, heads * Dv, n]`."""
    queries, keys = queries.to(values.dtype), keys.to(values.dtype)
    dense: Tensor = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return dense.mT.flatten(1, 2)


def _again(attend: Callable[..., Tensor], recompute: bool, *inputs: Tensor) -> Tensor:
    """`attend(*inputs)`; with `recompute` once more in the backward pass, so that no weights are kept."""
    result: Tensor = (
        checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False)
        if recompute
        else attend(*inputs)
    )
    return result
