"""Triton kernels of windowed attention; `triton_window` says what they compute and calls them.

Pixels are the last axis of every block, as they are the contiguous one in memory: `[channels, pixels]` and
`[cells, pixels]`. A program owns one tile of pixels and walks over its rows; the cells that a tile sees are
one block, so that a softmax needs no second pass and a backward pass no saved statistics.

Every axis comes as (cells, visible): `cells` `[tiles, WINDOW]` int32 are the cells of each tile, `visible`
which of them a position sees: `[2, positions]` int32 bounds of a run of them, or, where `TABLE`,
`[positions, WINDOW]` float32, log2 of how often (-inf: never).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# (pixels at a time, warps, stages): few, since every first call on a new kind of problem tries them all.
_TRIALS = ((128, 8, 2), (128, 4, 2), (64, 8, 2), (64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 8, 1), (16, 4, 1))
_MOST = 16384  # logits at a time: 64 registers a thread with 8 warps
_KEY = ["CELLS", "BLOCK_D", "BLOCK_V", "COLS", "ROW_TILE", "AVERAGE"]


def _candidates(configs: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
    """The configurations that hold whole rows of a tile and fit the registers, from the largest on."""
    known = {**arguments, **more}
    room = max(_MOST // known["CELLS"], known["COLS"])
    fitting = [c for c in configs if known["COLS"] <= c.kwargs["PIXELS"] <= room]
    largest = max(c.kwargs["PIXELS"] for c in fitting)
    return [c for c in fitting if 2 * c.kwargs["PIXELS"] >= largest]


def _tuned(kernel: Any) -> Any:
    configs = [
        triton.Config({"PIXELS": pixels}, num_warps=warps, num_stages=stages)
        for pixels, warps, stages in _TRIALS
    ]
    if triton.knobs.runtime.interpret:  # nothing to time
        return triton.autotune([c for c in configs if c.kwargs["PIXELS"] == 64][:1], _KEY)(kernel)
    return triton.autotune(configs, _KEY, prune_configs_by={"early_config_prune": _candidates})(kernel)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """Matrix product in float32; "ieee" is the interpreter's, which has none of bfloat16."""
    if PRECISION == "ieee":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _cells(rows, cols, row_tile, col_tile, low_width, ROW_WINDOW, COL_WINDOW, CELLS: tl.constexpr):
    """Slots of a tile's cells in its row and column window, and their index on the low-resolution map."""
    cell = tl.arange(0, CELLS)
    row_slot = cell // COL_WINDOW
    col_slot = cell % COL_WINDOW
    row = tl.load(rows[0] + row_tile * ROW_WINDOW + row_slot, mask=row_slot < ROW_WINDOW, other=0)
    col = tl.load(cols[0] + col_tile * COL_WINDOW + col_slot)
    return row_slot, col_slot, row * low_width + col


@triton.jit
def _pixels(step, row_tile, col_tile, before, size, ROW_TILE, COLS: tl.constexpr, PIXELS: tl.constexpr):
    """Rows and columns of the pixels of a step, and which of them the tile and the image have."""
    pixel = tl.arange(0, PIXELS)
    within = step * (PIXELS // COLS) + pixel // COLS
    row = row_tile * ROW_TILE - before + within
    col = col_tile * COLS + pixel % COLS
    inside = (within < ROW_TILE) & (row >= 0) & (row < size[0]) & (col < size[1])
    return row, col, inside


@triton.jit
def _restrict(logits, visible, slot, place, inside, length, WINDOW, TABLE: tl.constexpr):
    """Adds an axis' multiplicities to logits (base 2) `[cells, pixels]`."""
    if TABLE:
        known = (slot < WINDOW)[:, None] & inside[None, :]
        times = tl.load(visible + place[None, :] * WINDOW + slot[:, None], mask=known, other=float("-inf"))
        return logits + times
    first = tl.load(visible + place, mask=inside, other=0)
    last = tl.load(visible + length + place, mask=inside, other=0)
    seen = (slot[:, None] >= first[None, :]) & (slot[:, None] < last[None, :])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _block(base, channel, place, inside, stride, LIMIT):
    """`[channels, pixels]` of a map; channels from LIMIT on and pixels outside are zero."""
    pointers = base + channel[:, None].to(tl.int64) * stride + place[None, :]
    return tl.load(pointers, mask=(channel < LIMIT)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _cell_block(base, cell, channel, channels, LIMIT):
    """`[cells, channels]` of keys or values, whose channels lie last."""
    return tl.load(
        base + cell[:, None].to(tl.int64) * channels + channel[None, :],
        mask=(channel < LIMIT)[None, :],
        other=0.0,
    )


@triton.jit
def _softmax(
    queries, keys, rows, cols, row_slot, col_slot, row, col, inside, size, scale,
    ROW_WINDOW: tl.constexpr, COL_WINDOW: tl.constexpr,
    ROW_TABLE: tl.constexpr, COL_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights `[cells, pixels]` in float32; even ones for pixels outside, whose inputs are zero."""
    logits = _product(keys, queries, PRECISION) * (scale * 1.4426950408889634)
    logits = _restrict(logits, rows[1], row_slot, row, inside, size[0], ROW_WINDOW, ROW_TABLE)
    logits = _restrict(logits, cols[1], col_slot, col, inside, size[1], COL_WINDOW, COL_TABLE)
    logits = tl.where(inside[None, :], logits, 0.0)
    weights = tl.exp2(logits - tl.max(logits, 0)[None, :])
    return weights / tl.sum(weights, 0)[None, :]


@_tuned
@triton.jit
def forward(
    q, k, v, out, rows, cols, before, q_stride, size, low, col_tiles, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, AVERAGE: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COL_WINDOW: tl.constexpr, ROW_TILE: tl.constexpr, COLS: tl.constexpr,
    ROW_TABLE: tl.constexpr, COL_TABLE: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The attention's output; programs are (tiles, heads or 1, batch)."""
    row_tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups = 1 if AVERAGE else HEADS
    plane = size[0] * size[1]
    q += b * q_stride[0] + head * D * q_stride[1]
    k += b * low[0] * low[1] * HEADS * D + head * D
    v += b * low[0] * low[1] * groups * DV + head * DV
    out += (b * groups + head) * DV * plane
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row_slot, col_slot, cell = _cells(rows, cols, row_tile, col_tile, low[1], ROW_WINDOW, COL_WINDOW, CELLS)
    if not AVERAGE:
        keys = _cell_block(k, cell, d, HEADS * D, D)
    if DV <= BLOCK_V:
        values = tl.trans(_cell_block(v, cell, c, groups * DV, DV))
    for step in range(0, tl.cdiv(ROW_TILE, PIXELS // COLS)):
        row, col, inside = _pixels(step, row_tile, col_tile, before, size, ROW_TILE, COLS, PIXELS)
        place = row.to(tl.int64) * q_stride[2] + col * q_stride[3]
        if AVERAGE:
            weights = tl.zeros([CELLS, PIXELS], tl.float32)
            for n in range(0, HEADS):
                weights += _softmax(
                    _block(q + n * D * q_stride[1], d, place, inside, q_stride[1], D),
                    _cell_block(k + n * D, cell, d, HEADS * D, D),
                    rows, cols, row_slot, col_slot, row, col, inside, size, scale,
                    ROW_WINDOW, COL_WINDOW, ROW_TABLE, COL_TABLE, PRECISION,
                )  # fmt: skip
            weights *= 1.0 / HEADS
        else:
            weights = _softmax(
                _block(q, d, place, inside, q_stride[1], D), keys,
                rows, cols, row_slot, col_slot, row, col, inside, size, scale,
                ROW_WINDOW, COL_WINDOW, ROW_TABLE, COL_TABLE, PRECISION,
            )  # fmt: skip
        weights = weights.to(v.dtype.element_ty)
        for first in range(0, DV, BLOCK_V):
            if DV > BLOCK_V:
                values = tl.trans(_cell_block(v, cell, first + c, groups * DV, DV))
            dense = _product(values, weights, PRECISION)
            pointers = out + (first + c)[:, None].to(tl.int64) * plane + (row * size[1] + col)[None, :]
            known = (first + c < DV)[:, None] & inside[None, :]
            tl.store(pointers, dense.to(out.dtype.element_ty), mask=known, cache_modifier=".cs")


@_tuned
@triton.jit
def backward_queries_keys(
    q, k, v, grad, grad_q, grad_k, rows, cols, before, q_stride, grad_stride, size, low, col_tiles, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, AVERAGE: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COL_WINDOW: tl.constexpr, ROW_TILE: tl.constexpr, COLS: tl.constexpr,
    ROW_TABLE: tl.constexpr, COL_TABLE: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, and of each tile's keys `[B, tiles, CELLS, HEADS, D]`, by (tile, head, b)."""
    tile, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_tile, col_tile = tile // col_tiles, tile % col_tiles
    plane = size[0] * size[1]
    group, groups = (0, 1) if AVERAGE else (head, HEADS)
    q += b * q_stride[0] + head * D * q_stride[1]
    grad_q += b * grad_stride[0] + head * D * grad_stride[1]
    k += b * low[0] * low[1] * HEADS * D + head * D
    v += b * low[0] * low[1] * groups * DV + group * DV
    grad += (b * groups + group) * DV * plane
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    row_slot, col_slot, cell = _cells(rows, cols, row_tile, col_tile, low[1], ROW_WINDOW, COL_WINDOW, CELLS)
    keys = _cell_block(k, cell, d, HEADS * D, D)
    total = tl.zeros([CELLS, BLOCK_D], tl.float32)
    for step in range(0, tl.cdiv(ROW_TILE, PIXELS // COLS)):
        row, col, inside = _pixels(step, row_tile, col_tile, before, size, ROW_TILE, COLS, PIXELS)
        queries = _block(q, d, row.to(tl.int64) * q_stride[2] + col * q_stride[3], inside, q_stride[1], D)
        weights = _softmax(
            queries, keys, rows, cols, row_slot, col_slot, row, col, inside, size, scale,
            ROW_WINDOW, COL_WINDOW, ROW_TABLE, COL_TABLE, PRECISION,
        )  # fmt: skip
        change = tl.zeros([CELLS, PIXELS], tl.float32)
        for first in range(0, DV, BLOCK_V):
            values = _cell_block(v, cell, first + c, groups * DV, DV)
            arriving = _block(grad, first + c, row * size[1] + col, inside, plane, DV)
            change += _product(values, arriving.to(values.dtype), PRECISION)
        if AVERAGE:
            change *= 1.0 / HEADS
        change = weights * (change - tl.sum(weights * change, 0)[None, :]) * scale
        change = change.to(keys.dtype)
        dense = _product(tl.trans(keys), change, PRECISION)
        place = row.to(tl.int64) * grad_stride[2] + col * grad_stride[3]
        tl.store(
            grad_q + d[:, None].to(tl.int64) * grad_stride[1] + place[None, :],
            dense.to(grad_q.dtype.element_ty),
            mask=(d < D)[:, None] & inside[None, :],
        )
        total += _product(change, tl.trans(queries), PRECISION)
    slot = (b * tl.num_programs(0) + tile) * ROW_WINDOW * COL_WINDOW + tl.arange(0, CELLS)
    known = (row_slot < ROW_WINDOW)[:, None] & (d < D)[None, :]
    tl.store(grad_k + slot[:, None] * HEADS * D + head * D + d[None, :], total, mask=known)


@_tuned
@triton.jit
def backward_values(
    q, k, grad, grad_v, rows, cols, before, q_stride, size, low, col_tiles, scale,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, AVERAGE: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COL_WINDOW: tl.constexpr, ROW_TILE: tl.constexpr, COLS: tl.constexpr,
    ROW_TABLE: tl.constexpr, COL_TABLE: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Gradients of each tile's values `[B, tiles, CELLS, Cv]`, by (tile, blocks of channels, b)."""
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_tile, col_tile = tile // col_tiles, tile % col_tiles
    blocks = tl.cdiv(DV, BLOCK_V)
    group, first = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_V
    groups = 1 if AVERAGE else HEADS
    plane = size[0] * size[1]
    q += b * q_stride[0] + group * D * q_stride[1]
    k += b * low[0] * low[1] * HEADS * D + group * D
    grad += (b * groups + group) * DV * plane
    d, c = tl.arange(0, BLOCK_D), first + tl.arange(0, BLOCK_V)
    row_slot, col_slot, cell = _cells(rows, cols, row_tile, col_tile, low[1], ROW_WINDOW, COL_WINDOW, CELLS)
    total = tl.zeros([CELLS, BLOCK_V], tl.float32)
    for step in range(0, tl.cdiv(ROW_TILE, PIXELS // COLS)):
        row, col, inside = _pixels(step, row_tile, col_tile, before, size, ROW_TILE, COLS, PIXELS)
        place = row.to(tl.int64) * q_stride[2] + col * q_stride[3]
        weights = tl.zeros([CELLS, PIXELS], tl.float32)
        for n in range(0, HEADS if AVERAGE else 1):
            weights += _softmax(
                _block(q + n * D * q_stride[1], d, place, inside, q_stride[1], D),
                _cell_block(k + n * D, cell, d, HEADS * D, D),
                rows, cols, row_slot, col_slot, row, col, inside, size, scale,
                ROW_WINDOW, COL_WINDOW, ROW_TABLE, COL_TABLE, PRECISION,
            )  # fmt: skip
        if AVERAGE:
            weights *= 1.0 / HEADS
        arriving = _block(grad, c, row * size[1] + col, inside, plane, DV)
        total += _product(weights.to(arriving.dtype), tl.trans(arriving), PRECISION)
    slot = (b * tl.num_programs(0) + tile) * ROW_WINDOW * COL_WINDOW + tl.arange(0, CELLS)
    known = (row_slot < ROW_WINDOW)[:, None] & (c < DV)[None, :]
    tl.store(grad_v + slot[:, None] * groups * DV + group * DV + c[None, :], total, mask=known)


@triton.jit
def collect(
    per_tile, out, row_slots, col_slots, channels, low_width, tiles, col_tiles,
    ROW_LISTS: tl.constexpr, COL_LISTS: tl.constexpr, ROW_WINDOW: tl.constexpr, COL_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums tiles' gradients `[B, Tr, Tc, Kr, Kc, C]` into cells `[B, cells, C]`, in an order that is fixed.

    `row_slots` `[h, ROW_LISTS]` int32: tile * ROW_WINDOW + slot where a row of cells occurs, -1 at the end.
    Programs are (cells, blocks of channels, batch). The lists' lengths are constants, for the interpreter of
    Triton 3.5 (torch 2.9) cannot count to an argument with NumPy 2.4.
    """
    cell, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low_row, low_col = cell // low_width, cell % low_width
    per_tile += b * tiles * ROW_WINDOW * COL_WINDOW * channels
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, ROW_LISTS):
        row = tl.load(row_slots + low_row * ROW_LISTS + i)
        for j in range(0, COL_LISTS):
            col = tl.load(col_slots + low_col * COL_LISTS + j)
            tile = (row // ROW_WINDOW) * col_tiles + col // COL_WINDOW
            slot = (row % ROW_WINDOW) * COL_WINDOW + col % COL_WINDOW
            place = (tile.to(tl.int64) * ROW_WINDOW * COL_WINDOW + slot) * channels
            known = c < tl.where((row >= 0) & (col >= 0), channels, 0)
            total += tl.load(per_tile + place + c, mask=known, other=0.0)
    tl.store(out + (b * tl.num_programs(0) + cell) * channels + c, total, mask=c < channels)
