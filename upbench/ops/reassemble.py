"""Every pixel with a k x k kernel of its own: CARAFE's reassembly, SAPA's similarity, FeatUp's filters.

Output pixel (i, j) of a map enlarged by `scale` looks at the k x k cells around (i // scale, j // scale);
tap n of its kernel is the cell n // k - k // 2 rows below and n % k - k // 2 columns to the right.

Taps are added up one after the other, a strip of rows at a time: the k * k shifted copies of the map that an
`unfold` would make never exist together, neither forward nor backward, and results do not depend on the
strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upbench.errors import UpbenchError, unknown

Padding = Literal["zeros", "reflect", "replicate"]

_BUDGET = {"cpu": 2**20}  # on a CPU about what its caches serve well
_BUDGET_ELSEWHERE = 1 << 28


def reassemble(
    values: Tensor,
    kernels: Tensor,
    scale: int = 1,
    padding: Padding = "zeros",
    memory_budget: int | None = None,
) -> Tensor:
    """Applies each output pixel's own kernel to the cells around it (as CARAFE does).

    Args:
        values: `[B, C, h, w]`.
        kernels: `[B, G, k * k, scale * h, scale * w]`, k odd; not normalised here. Group g of the G, which
            divides C, is for channels [g C / G, (g + 1) C / G).
        scale: Output pixels per cell.
        padding: What lies outside the map.
        memory_budget: Bytes of working memory to stay near, beside the output.

    Returns:
        `[B, C, scale * h, scale * w]` in the dtype of `values`, added up in float32 at least.

    Raises:
        UpbenchError: Shapes that do not fit, an unknown padding, or a map too small to be reflected.
    """
    side = kernel_side(kernels)
    expected = (values.shape[0], scale * values.shape[2], scale * values.shape[3])
    if (kernels.shape[0], *kernels.shape[3:]) != expected or values.shape[1] % kernels.shape[1]:
        raise UpbenchError(
            f"kernels {list(kernels.shape)} do not fit values {list(values.shape)} enlarged by {scale}"
        )
    return reassemble_padded(pad(values, side // 2, padding), kernels, scale, memory_budget)


def reassemble_padded(
    padded: Tensor, kernels: Tensor, scale: int = 1, memory_budget: int | None = None
) -> Tensor:
    """`reassemble` of values `[B, C, h + k - 1, w + k - 1]` that have their padding already."""
    out: Tensor = _Reassemble.apply(padded, kernels, scale, memory_budget)
    return out


def affinity(
    queries: Tensor,
    keys: Tensor,
    side: int,
    scale: int = 1,
    padding: Padding = "zeros",
    groups: int = 1,
    memory_budget: int | None = None,
) -> Tensor:
    """The product of each output pixel's query with the keys of the side x side cells around it.

    Args:
        queries: `[B, C, scale * h, scale * w]`.
        keys: `[B, C, h, w]`.
        side: k, odd.
        scale: Output pixels per cell.
        padding: Which keys lie outside the map; "zeros" makes their products zero.
        groups: Channels are split into as many groups, each with products of its own.
        memory_budget: Bytes of working memory to stay near, beside the output.

    Returns:
        `[B, groups, side * side, scale * h, scale * w]`, what `reassemble` takes after a softmax; float32 at
        least.

    Raises:
        UpbenchError: Shapes that do not fit, an unknown padding, or a map too small to be reflected.
    """
    (b, c, h, w), out = keys.shape, tuple(queries.shape)
    if out != (b, c, scale * h, scale * w) or c % groups or side % 2 == 0:
        raise UpbenchError(
            f"queries {list(out)} and keys {list(keys.shape)} do not fit: scale {scale}, groups {groups}, "
            f"kernel of {side}"
        )
    padded = pad(keys, side // 2, padding)
    products: Tensor = _Affinity.apply(queries, padded, side, scale, groups, memory_budget)
    return products


def pad(values: Tensor, reach: int | tuple[int, int, int, int], padding: Padding) -> Tensor:
    """`[B, C, h, w]` with `reach` cells more on every side, or on (left, right, top, bottom)."""
    if padding not in get_args(Padding):
        raise unknown("padding", padding, get_args(Padding))
    sides = (reach,) * 4 if isinstance(reach, int) else reach
    if not any(sides):
        return values
    if padding == "zeros":
        return F.pad(values, sides)
    h, w = values.shape[-2:]
    if padding == "reflect" and (max(sides[:2]) >= w or max(sides[2:]) >= h):
        raise UpbenchError(f"a map of {h} x {w} cannot be reflected over {max(sides)} cells")
    return F.pad(values, sides, mode=padding)


def kernel_side(kernels: Tensor) -> int:
    """k of kernels `[B, G, k * k, H, W]`.

    Raises:
        UpbenchError: They have another shape, or k is even.
    """
    side = isqrt(kernels.shape[2]) if kernels.ndim == 5 else 0
    if side % 2 == 0 or side * side != kernels.shape[2]:
        raise UpbenchError(f"kernels must be [B, G, k * k, H, W] with an odd k, got {list(kernels.shape)}")
    return side


class _Reassemble(torch.autograd.Function):
    """Keeps nothing for the backward pass but its inputs."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernels: Tensor, scale: int, budget: int | None) -> Tensor:
        ctx.save_for_backward(padded, kernels)
        ctx.settings = scale, budget
        return _apply(padded, kernels, scale, budget)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded, kernels = ctx.saved_tensors
        scale, budget = ctx.settings
        groups, side = int(kernels.shape[1]), kernel_side(kernels)
        to_values = to_kernels = None
        if ctx.needs_input_grad[0]:
            to_values = _spread(grad, kernels, padded, scale, budget)
        if ctx.needs_input_grad[1]:
            to_kernels = _products(grad, padded, side, scale, groups, budget).to(kernels.dtype)
        return to_values, to_kernels, None, None


class _Affinity(torch.autograd.Function):
    """The gradient of `_Reassemble` to its kernels, as a function of its own."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, padded: Tensor, side: int, scale: int, groups: int, budget: int | None
    ) -> Tensor:
        ctx.save_for_backward(queries, padded)
        ctx.settings = scale, budget
        return _products(queries, padded, side, scale, groups, budget)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, padded = ctx.saved_tensors
        scale, budget = ctx.settings
        to_queries = to_keys = None
        if ctx.needs_input_grad[0]:
            to_queries = _apply(padded, grad, scale, budget).to(queries.dtype)
        if ctx.needs_input_grad[1]:
            to_keys = _spread(queries, grad, padded, scale, budget)
        return to_queries, to_keys, None, None, None, None


def _apply(padded: Tensor, kernels: Tensor, scale: int, budget: int | None) -> Tensor:
    """Kernels `[B, G, k * k, H, W]` on padded values: `[B, C, H, W]`."""
    b, groups, taps, out_h, out_w = map(int, kernels.shape)
    c, w, side = int(padded.shape[1]), out_w // scale, kernel_side(kernels)
    dense = padded.new_empty(b, c, out_h, out_w)
    for rows in _strips(dense, scale, budget):
        cells = _cells(padded, rows, side, groups)
        own = _phases(kernels, rows, scale, cells.dtype)  # [B, G, taps, scale^2, n, w]
        n = rows.stop - rows.start
        total = cells.new_zeros(b, groups, c // groups, scale * scale, n, w)
        for tap in range(taps):
            dy, dx = divmod(tap, side)
            total.addcmul_(cells[..., dy : dy + n, dx : dx + w], own[:, :, tap].unsqueeze(2))
        dense[:, :, scale * rows.start : scale * rows.stop] = _joined(total, scale)
    return dense


def _products(
    queries: Tensor, padded: Tensor, side: int, scale: int, groups: int, budget: int | None
) -> Tensor:
    """Products of `[B, C, H, W]` with padded keys, summed over a group's channels: `[B, G, k * k, H, W]`."""
    b, c, out_h, out_w = map(int, queries.shape)
    w, precise = out_w // scale, _precise(queries, padded)
    products = queries.new_empty(b, groups, side * side, out_h, out_w, dtype=precise)
    for rows in _strips(queries, scale, budget):
        cells = _cells(padded, rows, side, groups).to(precise)
        own = _phases(queries, rows, scale, precise).view(b, groups, c // groups, scale * scale, -1, w)
        n = rows.stop - rows.start
        for tap in range(side * side):
            dy, dx = divmod(tap, side)
            sums = (own * cells[..., dy : dy + n, dx : dx + w]).sum(2)
            products[:, :, tap, scale * rows.start : scale * rows.stop] = _joined(sums, scale)
    return products


def _spread(dense: Tensor, kernels: Tensor, padded: Tensor, scale: int, budget: int | None) -> Tensor:
    """The transpose of `_apply`: each pixel's value is added to the cells around it, weighted by its kernel.

    Returns a tensor like `padded`.
    """
    b, groups, taps, _, out_w = map(int, kernels.shape)
    c, w, side = int(padded.shape[1]), out_w // scale, kernel_side(kernels)
    precise = _precise(dense, kernels)
    total = padded.new_zeros(b, groups, c // groups, *padded.shape[2:], dtype=precise)
    for rows in _strips(dense, scale, budget):
        own = _phases(kernels, rows, scale, precise)
        pixels = _phases(dense, rows, scale, precise).view(b, groups, c // groups, scale * scale, -1, w)
        for tap in range(taps):
            dy, dx = divmod(tap, side)
            part = (pixels * own[:, :, tap].unsqueeze(2)).sum(3)
            total[..., rows.start + dy : rows.stop + dy, dx : dx + w] += part
    return total.view(padded.shape).to(padded.dtype)


def _strips(dense: Tensor, scale: int, budget: int | None) -> Iterator[slice]:
    """Runs of low-resolution rows whose output `[B, C, H, W]` stays near `budget` bytes.

    A single one in a trace, where operations are counted and many small ones take long.
    """
    budget = budget or _BUDGET.get(dense.device.type, _BUDGET_ELSEWHERE)
    b, c, out_h, out_w = map(int, dense.shape)
    height, tracing = out_h // scale, torch.jit.is_tracing()  # type: ignore[attr-defined]
    step = height if tracing else max(1, budget // max(1, b * c * scale * out_w * 4))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def _cells(padded: Tensor, rows: slice, side: int, groups: int) -> Tensor:
    """What a strip sees, `[B, G, C / G, 1, n + k - 1, w + k - 1]`; float32 at least."""
    part = padded[:, :, rows.start : rows.stop + side - 1].to(_precise(padded))
    b, c, h, w = part.shape
    return part.view(b, groups, c // groups, 1, h, w)


def _phases(dense: Tensor, rows: slice, scale: int, dtype: torch.dtype) -> Tensor:
    """A strip of `[..., H, W]` by position in the cell: `[..., scale^2, n, w]`."""
    part = dense[..., scale * rows.start : scale * rows.stop, :].to(dtype).contiguous()
    phases: Tensor = F.pixel_unshuffle(part.unsqueeze(-3), scale)
    return phases


def _joined(phases: Tensor, scale: int) -> Tensor:
    """The inverse of `_phases`; groups of channels `[B, G, C / G, ...]` become `[B, C, ...]`."""
    dense: Tensor = F.pixel_shuffle(phases, scale).squeeze(-3)
    return dense.flatten(1, 2) if phases.ndim == 6 else dense


def _precise(*tensors: Tensor) -> torch.dtype:
    """The dtype to add up in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
