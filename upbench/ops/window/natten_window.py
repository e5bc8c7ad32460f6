"""Windowed attention by NATTEN (Hassani et al., Neighborhood Attention Transformer, CVPR 2023).

What the official code of RaysUp and NAF calls. NATTEN knows windows on one grid only, so keys and values are
first repeated on the output grid, and it serves no tables but those of `windows.neighbourhood_table`. Its
compiled kernels (libnatten, CUDA) are used where they are installed; else its FlexAttention back-end, which
runs everywhere, but holds every pair of pixels unless it is compiled (CUDA, half precision, and after
`natten.allow_flex_compile()`, which NATTEN's authors advise against).
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.window.constants import constant
from upbench.ops.window.tables import nearest_exact, neighbourhood_table

_FLEX_MOST_PAIRS = 1 << 26  # of pixels: without compilation, FlexAttention holds a number for each


@constant
def available() -> str:
    """Why NATTEN cannot be used here, or "" if it can."""
    if importlib.util.find_spec("natten") is None:
        return "NATTEN is not installed (pip install 'upbench[natten]')"
    return ""


def refusal(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, heads: int, average: bool) -> str:
    """Why NATTEN cannot compute an attention (arguments as `window_attention`), or "" if it can."""
    missing = available()
    if missing:
        return missing
    for axis, table, size, cells in (
        ("row", rows, q.shape[2], k.shape[2]),
        ("column", cols, q.shape[3], k.shape[3]),
    ):
        reason = _expressible(table, int(size), int(cells))
        if reason:
            return f"the {axis} table {reason}"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
    pixels = int(q.shape[2]) * int(q.shape[3])
    if not (_compiled_kernels(q) or _may_compile(q)) and pixels * pixels > _FLEX_MOST_PAIRS:
        return f"without its compiled CUDA kernels, {q.shape[2]}x{q.shape[3]} pixels are too many"
    return ""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    heads: int,
    average_heads: bool,
    scale: float,
    memory_budget: int | None,
) -> Tensor:
    """`window_attention` by `natten.na2d`; `memory_budget` cannot be kept.

    Raises:
        UpbenchError: NATTEN cannot compute this; the text says why.
    """
    reason = refusal(q, k, v, rows, cols, heads, average_heads)
    if reason:
        raise UpbenchError(f"attention backend 'natten': {reason}")
    size, low = (int(q.shape[2]), int(q.shape[3])), (int(k.shape[2]), int(k.shape[3]))
    dilation = tuple(max(1, n // cells) for n, cells in zip(size, low, strict=True))
    places = [
        torch.from_numpy(nearest_exact(n, cells)).to(q.device) for n, cells in zip(size, low, strict=True)
    ]
    keys, values = (x.index_select(2, places[0]).index_select(3, places[1]) for x in (k, v))
    queries, keys = _heads_last(q, heads), _heads_last(keys, heads)
    if average_heads:  # the mean of the weights, applied to all values: the mean of the heads' outputs
        values = _heads_last(values, 1).expand(*queries.shape[:4], -1)
    else:
        values = _heads_last(values, heads)
    kernel = (int(rows.shape[1]), int(cols.shape[1]))
    out = neighbourhood_attention(queries, keys, values, kernel, dilation, scale)
    out = out.mean(3) if average_heads else out.flatten(3)
    return out.permute(0, 3, 1, 2).contiguous()


def neighbourhood_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel: tuple[int, int], dilation: tuple[int, ...], scale: float
) -> Tensor:
    """`natten.na2d` by whatever back-end there is, its operands padded with zeros to widths that it takes.

    Args:
        q: `[B, H, W, heads, D]`.
        k: The same shape.
        v: `[B, H, W, heads, Dv]`.
        kernel: Neighbours along rows and columns.
        dilation: Distance between neighbours.
        scale: Factor on the logits.

    Returns:
        `[B, H, W, heads, Dv]`.

    Raises:
        UpbenchError: No back-end can compute this.
    """
    import natten

    width, channels = int(q.shape[4]), int(v.shape[4])
    options: dict[str, Any] = {"backend": "cutlass-fna"}
    if _compiled_kernels(q):
        padded, values = -(-width // 8) * 8, -(-channels // 8) * 8
    else:
        compiled = _may_compile(q)
        options = {"backend": "flex-fna", "torch_compile": compiled}
        padded = values = max(32 if compiled else 8, 1 << (max(width, channels) - 1).bit_length())
    q, k = (F.pad(x, (0, padded - width)).contiguous() for x in (q, k))
    v = F.pad(v, (0, values - channels)).contiguous()
    try:
        with warnings.catch_warnings():  # of what NATTEN calls, and how
            warnings.simplefilter("ignore")
            out = natten.na2d(q, k, v, kernel_size=kernel, dilation=dilation, scale=scale, **options)
    except (ValueError, NotImplementedError) as error:
        raise UpbenchError(f"attention backend 'natten': {' '.join(str(error).split())}") from error
    assert isinstance(out, Tensor)
    return out[..., :channels]


@constant
def _places(size: int, cells: int) -> Tensor:
    return torch.from_numpy(nearest_exact(size, cells))


@constant
def _expressible(table: Tensor, size: int, cells: int) -> str:
    """Why a table is no neighbourhood of NATTEN's, or ""."""
    kernel = int(table.shape[1])
    if kernel > size // max(1, size // cells) or not torch.equal(
        table.cpu(), neighbourhood_table(size, cells, kernel)
    ):
        return f"{list(table.shape)} is no neighbourhood of a fixed size (windows.neighbourhood_table)"
    return "has windows of one cell, NATTEN's smallest have two" if kernel < 2 else ""


def _compiled_kernels(x: Tensor) -> bool:
    if not x.is_cuda:
        return False
    import natten

    return bool(natten.HAS_LIBNATTEN)


def _may_compile(x: Tensor) -> bool:
    """Whether FlexAttention is to be compiled: half precision on CUDA, if NATTEN was told so."""
    if not x.is_cuda or x.dtype == torch.float32:
        return False
    from natten.context import is_flex_compile_allowed

    return bool(is_flex_compile_allowed())


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """`[B, heads * D, H, W]` to `[B, H, W, heads, D]`."""
    split: Tensor = x.permute(0, 2, 3, 1).unflatten(3, (heads, -1))
    return split
