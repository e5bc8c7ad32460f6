"""Windowed attention on CUDA: one pass over queries and output, the window's keys and values on chip.

A program owns one head of one tile of pixels: a run of output rows that see the same low-resolution rows,
times a run of columns as wide as whole memory sectors. It loads the keys and values of all cells that the
tile sees once, and then walks over the tile's rows: two tensor-core products and a softmax in float32, one
streaming write. Nothing lies in device memory beside inputs and output. The backward pass computes the
weights anew; the gradients of keys and values are summed in a fixed order, so that runs repeat bit by bit.

float32 inputs are multiplied in three TF32 products (relative error near 1e-6), or in one where
`torch.set_float32_matmul_precision` allows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.window.constants import constant
from upbench.ops.window.tables import Tiling, tiling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = (16, 32, 64)  # 32 bytes, a sector of memory, in half precision
_MOST_CELLS = 1024
_MOST_LOGITS = 16384  # of a step
_MOST_BLOCK = 32768  # bytes of a block of values
_MOST_SHARED = 200 * 1024  # bytes of shared memory that a program may take, of 227 KiB on Hopper


@dataclass(eq=False)  # as `Tiling`
class Axis:
    """A tiling as the kernels take it.

    Attributes:
        size: Positions per tile.
        before: Positions of the first tile that lie before the axis.
        cells: `[T, K]` int32, the low-resolution cells of each tile.
        visible: `[2, N]` int32, first and last + 1 of a position's run of its tile's cells, or `[N, K]`
            float32, log2 of how often it sees each.
        slots: `[cells, L]` int32, all T * K places at which a cell occurs and is seen, then -1.
    """

    size: int
    before: int
    cells: Tensor
    visible: Tensor
    slots: Tensor


@constant
def available(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or "" if they can (on a CPU: in Triton's interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch for CUDA)"
    if device.type == "cuda":
        return ""
    from triton import knobs

    if device.type == "cpu" and knobs.runtime.interpret:
        return ""
    return f"the tensors are on '{device.type}': Triton's kernels run on CUDA"


def refusal(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, heads: int, average: bool) -> str:
    """Why the kernels cannot compute an attention (arguments as `window_attention`), or "" if they can."""
    missing = available(q.device)
    if missing:
        return missing
    for name, tensor in (("queries", q), ("keys", k), ("values", v)):
        if tensor.dtype not in DTYPES:
            return f"{name} are {str(tensor.dtype).removeprefix('torch.')}; it has float32, bfloat16, float16"
    r, c = _plan(rows, cols, (int(k.shape[2]), int(k.shape[3])), q.device)
    window = (int(r.cells.shape[1]), int(c.cells.shape[1]))
    cells = _padded(window[0] * window[1])
    values = int(v.shape[1]) // (1 if average else heads)
    block_d, block_v = _widths(cells, int(q.shape[1]) // heads, values, v.element_size())
    size = cells * (block_d * q.element_size() + block_v * v.element_size())
    copies = 3 if torch.float32 in (q.dtype, v.dtype) else 2  # float32 is split for its three products
    if cells > _MOST_CELLS or copies * size > _MOST_SHARED:
        return f"a tile's window of {window[0]}x{window[1]} cells does not fit on chip"
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
    """`window_attention` by the kernels; needs no working memory, so `memory_budget` is not looked at.

    Raises:
        UpbenchError: The kernels cannot compute this; the text says why.
    """
    reason = refusal(q, k, v, rows, cols, heads, average_heads)
    if reason:
        raise UpbenchError(f"attention backend 'triton': {reason}")
    r, c = _plan(rows, cols, (int(k.shape[2]), int(k.shape[3])), q.device)
    geometry = [r.size, r.before, c.size]
    tensors = (r.cells, r.visible, r.slots, c.cells, c.visible, c.slots)
    out: Tensor = _forward(q, k.to(q.dtype), v, *tensors, geometry, heads, average_heads, scale)
    return out


@constant
def _plan(rows: Tensor, cols: Tensor, low: tuple[int, int], device: torch.device) -> tuple[Axis, Axis]:
    """Both axes, cut for the kernels. Cached."""
    raw = [np.ascontiguousarray(table.cpu().numpy(), dtype=np.int64).tobytes() for table in (rows, cols)]
    return _cached_plan(raw[0], raw[1], int(rows.shape[0]), int(cols.shape[0]), low, device)


@lru_cache(maxsize=64)
def _cached_plan(
    rows: bytes, cols: bytes, height: int, width: int, low: tuple[int, int], device: torch.device
) -> tuple[Axis, Axis]:
    """The tiles with the least work per pixel; among equals, the widest."""
    tables = [
        torch.from_numpy(np.frombuffer(raw, dtype=np.int64).reshape(length, -1).copy())
        for raw, length in ((rows, height), (cols, width))
    ]
    on = torch.device("cpu")
    row_options = [tiling(tables[0], low[0], on, size) for size in (None, 4, 8, 16)]
    col_options = [tiling(tables[1], low[1], on, size) for size in _COLUMNS if size < 2 * max(width, 9)]
    pairs = [(r, c) for r in row_options for c in reversed(col_options)]  # of equals, the first is taken
    row, col = min(pairs, key=lambda pair: _work(*pair))
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        return _axis(row, low[0], device), _axis(col, low[1], device)


def _work(rows: Tiling, cols: Tiling) -> float:
    """Products and loads per pixel, about 1 where a block of 64 cells serves every pixel of its tile."""
    cells, pixels = _padded(rows.window * cols.window), rows.count * rows.size * cols.count * cols.size
    if cells * cols.size > _MOST_LOGITS and cols.size > _COLUMNS[0]:
        return float("inf")
    steps = -(-rows.size // 2) * 2 / rows.size  # two rows at a time, at least
    loads = rows.window * cols.window / (rows.size * cols.size)
    return (cells / 64 * steps + loads) * pixels / (rows.length * cols.length)


def _axis(tiles: Tiling, cells: int, device: torch.device) -> Axis:
    count, window, length = tiles.count, tiles.window, tiles.length
    if tiles.bias is None:
        seen = torch.ones(count, window, dtype=torch.bool)
        visible = torch.tensor([0, window], dtype=torch.int32).view(2, 1).repeat(1, length)
    else:
        bias = tiles.bias.reshape(-1, window)[tiles.before : tiles.before + length]
        seen = (tiles.bias > -torch.inf).any(1)
        visible = _runs(bias)
    place = torch.arange(count * window).view(count, window)
    occurrences = [place[seen & (tiles.cells == cell)] for cell in range(cells)]
    slots = torch.nn.utils.rnn.pad_sequence(occurrences, batch_first=True, padding_value=-1)
    tensors = (tiles.cells.int(), visible, slots.int())
    return Axis(tiles.size, tiles.before, *(tensor.contiguous().to(device) for tensor in tensors))


def _runs(bias: Tensor) -> Tensor:
    """Bounds `[2, N]` of each position's run of cells where all are seen once, else the table in base 2."""
    seen = bias > -torch.inf
    first, count = seen.int().argmax(1), seen.sum(1)
    place = torch.arange(bias.shape[1])
    run = (place >= first[:, None]) & (place < (first + count)[:, None])
    if torch.equal(seen, run) and not bias[seen].any():
        return torch.stack([first, first + count]).int()
    in_base_2: Tensor = bias / np.log(2)
    return in_base_2.float()


def _padded(count: int) -> int:
    """The next power of two, 16 at least: the kernels' block sizes."""
    return max(16, 1 << (count - 1).bit_length())


def _widths(cells: int, keys: int, values: int, itemsize: int) -> tuple[int, int]:
    """How many channels of keys and of values a program holds at a time, beside `cells` cells."""
    return _padded(keys), min(_padded(values), max(16, min(128, _MOST_BLOCK // (cells * itemsize))))


def _sizes(
    q: Tensor, v: Tensor, row: tuple[Tensor, Tensor], col: tuple[Tensor, Tensor], tile: list[int], heads: int,
    average: bool,
) -> dict[str, Any]:  # fmt: skip
    """The kernels' constants."""
    (row_cells, row_visible), (col_cells, col_visible) = row, col
    row_window, col_window = int(row_cells.shape[1]), int(col_cells.shape[1])
    cells = _padded(row_window * col_window)
    width, values = int(q.shape[1]) // heads, int(v.shape[1]) // (1 if average else heads)
    block_d, block_v = _widths(cells, width, values, v.element_size())
    return {
        "HEADS": heads,
        "D": width,
        "DV": values,
        "AVERAGE": average,
        "ROW_WINDOW": row_window,
        "COL_WINDOW": col_window,
        "ROW_TILE": tile[0],
        "COLS": tile[2],
        "ROW_TABLE": row_visible.dtype == torch.float32,
        "COL_TABLE": col_visible.dtype == torch.float32,
        "CELLS": cells,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "PRECISION": _precision(q),
        "enable_fp_fusion": True,  # multiply-adds in one, as compilers of GPUs do
    }


def _precision(q: Tensor) -> str:
    """How float32 is multiplied."""
    if not q.is_cuda:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _channels_last(cells: Tensor) -> Tensor:
    """`[B, C, h, w]` to `[B, h, w, C]`, laid out so."""
    return cells.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("upbench::window_attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor row_cells, Tensor row_visible, Tensor row_slots, Tensor col_cells,"
    " Tensor col_visible, Tensor col_slots, int[] tile, int heads, bool average, float scale) -> Tensor"
))  # fmt: skip
def _forward(
    q: Tensor, k: Tensor, v: Tensor, row_cells: Tensor, row_visible: Tensor, row_slots: Tensor,
    col_cells: Tensor, col_visible: Tensor, col_slots: Tensor, tile: list[int], heads: int, average: bool,
    scale: float,
) -> Tensor:  # fmt: skip
    from upbench.ops.window import triton_kernels

    b, _, height, width = map(int, q.shape)
    low = (int(k.shape[2]), int(k.shape[3]))
    rows, cols = (row_cells, row_visible), (col_cells, col_visible)
    out = v.new_empty(b, v.shape[1], height, width)
    grid = (len(row_cells) * len(col_cells), 1 if average else heads, b)
    with _launching(q):
        triton_kernels.forward[grid](
            q, _channels_last(k), _channels_last(v), out, rows, cols, tile[1], q.stride(), (height, width),
            low, len(col_cells), scale, **_sizes(q, v, rows, cols, tile, heads, average),
        )  # fmt: skip
    return out


@torch.library.custom_op("upbench::window_attention_backward", mutates_args=(), schema=(
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor row_cells, Tensor row_visible, Tensor row_slots,"
    " Tensor col_cells, Tensor col_visible, Tensor col_slots, int[] tile, int heads, bool average,"
    " float scale) -> (Tensor, Tensor, Tensor)"
))  # fmt: skip
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, row_cells: Tensor, row_visible: Tensor, row_slots: Tensor,
    col_cells: Tensor, col_visible: Tensor, col_slots: Tensor, tile: list[int], heads: int, average: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from upbench.ops.window import triton_kernels

    b, _, height, width = map(int, q.shape)
    low = (int(k.shape[2]), int(k.shape[3]))
    rows, cols = (row_cells, row_visible), (col_cells, col_visible)
    sizes = _sizes(q, v, rows, cols, tile, heads, average)
    tiles = len(row_cells) * len(col_cells)
    keys, grad, grad_q = _channels_last(k), grad.contiguous(), torch.empty_like(q)
    per_tile = (b, tiles, sizes["ROW_WINDOW"] * sizes["COL_WINDOW"])
    grad_k = q.new_empty(*per_tile, q.shape[1], dtype=torch.float32)
    grad_v = q.new_empty(*per_tile, v.shape[1], dtype=torch.float32)
    blocks = (1 if average else heads) * -(-sizes["DV"] // sizes["BLOCK_V"])
    geometry = ((height, width), low, len(col_cells), scale)
    with _launching(q):
        triton_kernels.backward_queries_keys[(tiles, heads, b)](
            q, keys, _channels_last(v), grad, grad_q, grad_k, rows, cols, tile[1], q.stride(),
            grad_q.stride(), *geometry, **sizes,
        )  # fmt: skip
        triton_kernels.backward_values[(tiles, blocks, b)](
            q, keys, grad, grad_v, rows, cols, tile[1], q.stride(), *geometry, **sizes
        )
        grad_k, grad_v = (
            _collected(part, row_slots, col_slots, low, len(col_cells), sizes) for part in (grad_k, grad_v)
        )
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _collected(
    per_tile: Tensor, row_slots: Tensor, col_slots: Tensor, low: tuple[int, int], col_tiles: int,
    sizes: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The tiles' gradients `[B, tiles, Kr * Kc, C]` summed into cells `[B, C, h, w]`."""
    from upbench.ops.window import triton_kernels

    b, tiles, _, channels = map(int, per_tile.shape)
    out = per_tile.new_empty(b, *low, channels)
    block = min(128, _padded(channels))
    triton_kernels.collect[(low[0] * low[1], -(-channels // block), b)](
        per_tile, out, row_slots, col_slots, channels, low[1], tiles, col_tiles,
        ROW_LISTS=int(row_slots.shape[1]), COL_LISTS=int(col_slots.shape[1]),
        ROW_WINDOW=sizes["ROW_WINDOW"], COL_WINDOW=sizes["COL_WINDOW"], BLOCK=block, enable_fp_fusion=True,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


@contextmanager
def _launching(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's GPU the current one, where kernels are launched.

    Raises:
        UpbenchError: A kernel needs more of the GPU than there is.
    """
    from triton.runtime.errors import OutOfResources

    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            yield
    except OutOfResources as error:
        raise UpbenchError(
            f"attention backend 'triton': the window does not fit on this GPU ({error}); "
            "use_backend('torch') computes it otherwise"
        ) from error


@_forward.register_fake
def _forward_shape(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], q.shape[2], q.shape[3])


@_backward.register_fake
def _backward_shape(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q), _cells_like(k), _cells_like(v)


def _cells_like(x: Tensor) -> Tensor:
    """As `_collected` lays its result out."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.rest = inputs[9:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 10)


_forward.register_autograd(_gradients, setup_context=_keep)
