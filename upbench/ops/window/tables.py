"""Which low-resolution cells a query sees, one axis at a time.

The windows of the methods here are products of a row window and a column window. Each axis is described by a
table `[N, K]` of int64: row i lists the low-resolution cells that output position i sees, -1 where there is
none. A cell that is listed twice counts twice in the softmax.

`Tiling` turns a table into equal runs of neighbouring positions that share one list of cells, so that
attention becomes one small matrix product per tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.window.constants import constant

# Cost of gathering a tile's keys and values, in multiply-adds per copied number and axis; only the ratio to
# the products matters, and only for choosing tile sizes.
_GATHER_COST = 4.0
_MAX_TILE = 64


def nearest_exact(size: int, cells: int) -> np.ndarray:
    """`[size]` cell of each output position under PyTorch's `nearest-exact` resize.

    The position is rounded to float32 before the floor, as there: at ties float64 would pick another cell.
    """
    scale = np.float32(cells / size)
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale
    index: np.ndarray = np.minimum(np.floor(position).astype(np.int64), cells - 1)
    return index


def neighbourhood(size: int, kernel: int, dilation: int = 1) -> np.ndarray:
    """`[size, K]` neighbours of each position on its own axis (Hassani et al., Neighborhood Attention, CVPR
    2023).

    Positions that are congruent modulo `dilation` form a group. A window holds the K nearest members of the
    position's own group; at borders it is shifted, never cut; an even K has one more neighbour before than
    after.

    Args:
        size: Length of the axis.
        kernel: Window size. Where the smallest group has fewer members, K is that number instead.
        dilation: Distance between neighbours; at most `size`.
    """
    if not 1 <= dilation <= size:
        raise UpbenchError(f"dilation {dilation} does not fit an axis of {size}")
    kernel = min(kernel, size // dilation)
    position = np.arange(size)
    group, place = position % dilation, position // dilation
    members = (size - group + dilation - 1) // dilation
    start = np.clip(place - kernel // 2, 0, members - kernel)
    return (group + dilation * start)[:, None] + dilation * np.arange(kernel)


@constant
def neighbourhood_table(size: int, cells: int, kernel: int) -> Tensor:
    """`[size, K]` low-resolution cells of a neighbourhood attention whose keys were resized to the output
    grid.

    The keys' nearest-exact resize is folded into the table; the dilation is `size // cells`, at least 1.
    """
    grid = neighbourhood(size, kernel, max(1, size // cells))
    return torch.from_numpy(nearest_exact(size, cells)[grid])


def neighbourhood_tables(
    feature_size: tuple[int, int], output_size: tuple[int, int], kernel: int
) -> tuple[Tensor, Tensor]:
    """`neighbourhood_table` of the rows and of the columns."""
    rows, cols = (neighbourhood_table(n, m, kernel) for n, m in zip(output_size, feature_size, strict=True))
    return rows, cols


@constant
def fraction_table(size: int, cells: int, radius: float) -> Tensor:
    """`[size, K]` low-resolution cells within `radius` of each position, as a fraction of the axis.

    Cells that overlap [p - radius, p + radius], p = (i + 0.5) / size. All in float32 and in this order:
    window edges can fall on cell borders, where another rounding would give another cell.
    """
    one, zero, r = np.float32(1), np.float32(0), np.float32(radius)
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    low = np.floor(np.clip(position - r, zero, one) * np.float32(cells)).astype(np.int64)
    high = np.ceil(np.clip(position + r, zero, one) * np.float32(cells)).astype(np.int64)
    table = low[:, None] + np.arange(int((high - low).max()))
    return torch.from_numpy(np.where(table < high[:, None], table, -1))


@constant
def radius_table(size: int, cells: int, radius: int) -> Tensor:
    """`[size, 2 radius + 1]` low-resolution cells around the one that holds each position; -1 beyond the
    ends."""
    table = nearest_exact(size, cells)[:, None] + np.arange(-radius, radius + 1)
    return torch.from_numpy(np.where((table >= 0) & (table < cells), table, -1))


@dataclass(frozen=True)
class Tiling:
    """An axis cut into runs of `size` positions; the first may begin before it and the last may end after it.

    Attributes:
        length: Positions on the axis.
        size: Positions per tile, n.
        before: Positions of the first tile that lie before the axis.
        cells: `[T, K]` int64, the low-resolution cells of each tile.
        bias: `[T, n, K]` float64, log of how often a position lists a cell (-inf: never); None where all are
            once.
    """

    length: int
    size: int
    before: int
    cells: Tensor
    bias: Tensor | None

    @property
    def count(self) -> int:
        """Number of tiles, T."""
        return int(self.cells.shape[0])

    @property
    def window(self) -> int:
        """Cells per tile, K."""
        return int(self.cells.shape[1])

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Positions of the axis that tiles first..last-1 hold, as (start, stop)."""
        return max(0, first * self.size - self.before), min(self.length, last * self.size - self.before)

    def padding(self, first: int, last: int) -> tuple[int, int]:
        """Positions of tiles first..last-1 that lie before and after the axis."""
        start, stop = first * self.size - self.before, last * self.size - self.before
        return max(0, -start), max(0, stop - self.length)

    def crop(self, start: int, stop: int) -> tuple[slice, Tiling]:
        """The tiles that positions start..stop-1 touch, and those positions as an axis of their own."""
        first, last = (start + self.before) // self.size, -(-(stop + self.before) // self.size)
        before = start + self.before - first * self.size
        bias = None if self.bias is None else self.bias[first:last]
        return slice(first, last), Tiling(stop - start, self.size, before, self.cells[first:last], bias)

    def on(self, device: torch.device) -> Tiling:
        """The same tiling with its tensors on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Tiling(self.length, self.size, self.before, self.cells.to(device), bias)


def tiling(table: Tensor, cells: int, device: torch.device, size: int | None = None) -> Tiling:
    """The cheapest tiling of a table `[N, K]` into an axis of `cells` cells. Cached.

    With `size`: tiles of this size, the first beginning with the axis.

    Raises:
        UpbenchError: A position sees no cell, or one outside the axis.
    """
    tiles = _tiling(table, cells, device, size)
    # A trace knows the methods of what it has seen made, not of constants.
    return Tiling(tiles.length, tiles.size, tiles.before, tiles.cells, tiles.bias)


@constant
def _tiling(table: Tensor, cells: int, device: torch.device, size: int | None) -> Tiling:
    array = np.ascontiguousarray(table.cpu().numpy(), dtype=np.int64)
    if array.ndim != 2:
        raise UpbenchError(f"window table must be [N, K], got {list(array.shape)}")
    return _on_device(array.tobytes(), array.shape[0], cells, device, size)


@lru_cache(maxsize=64)
def _on_device(
    table: bytes, length: int, cells: int, device: torch.device, asked: int | None = None
) -> Tiling:
    size, before, index, bias = _tile(table, length, cells, asked)
    with torch.inference_mode(False):  # the cache outlives the caller's mode
        kept = None if bias is None else torch.from_numpy(bias)
        return Tiling(length, size, before, torch.from_numpy(index), kept).on(device)


@lru_cache(maxsize=64)
def _tile(
    raw: bytes, length: int, cells: int, asked: int | None = None
) -> tuple[int, int, np.ndarray, np.ndarray | None]:
    table = np.frombuffer(raw, dtype=np.int64).reshape(length, -1)
    if table.size == 0 or table.max() >= cells or table.min() < -1:
        raise UpbenchError(f"window table {list(table.shape)} points outside of its {cells} cells")
    counts = np.zeros((length, cells + 1), dtype=np.int64)
    np.add.at(counts, (np.arange(length)[:, None], table), 1)  # absent cells (-1) fall into the last column
    counts = counts[:, :cells]
    if not counts.any(1).all():
        raise UpbenchError(f"window table: position {int(np.argmin(counts.any(1)))} sees no cell")
    size, before = (asked, 0) if asked else _cheapest(counts > 0)
    return (size, before, *_cut(counts, size, before))


def _cheapest(seen: np.ndarray) -> tuple[int, int]:
    """Tile size and offset with the least work per position."""
    length = seen.shape[0]
    changes = np.flatnonzero((seen[1:] != seen[:-1]).any(1)) + 1
    run = max(1, round(length / (len(changes) + 1)))
    sizes = {n for r in (run, round(length / seen.shape[1])) for n in (r, 2 * r, 3 * r)} | {
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        12,
        16,
    }
    best = (float("inf"), 1, 0)
    for size in sorted(n for n in sizes if 1 <= n <= min(length, _MAX_TILE)):
        phases = np.bincount(changes % size, minlength=size)
        for phase in {0, *(int(p) for p in np.argsort(-phases, kind="stable")[:4])}:
            before = -phase % size
            starts = np.maximum(np.arange(-before, length, size), 0)
            union = int(np.logical_or.reduceat(seen, starts, axis=0).sum(1).max())
            cost = union * (1 + _GATHER_COST / size) * len(starts) * size / length
            best = min(best, (cost, size, before))
    return best[1], best[2]


def _cut(counts: np.ndarray, size: int, before: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The tiles' cells `[T, K]` and log multiplicities `[T, n, K]`."""
    length = counts.shape[0]
    tiles = -(-(length + before) // size)
    position = np.clip(np.arange(tiles * size) - before, 0, length - 1).reshape(tiles, size)
    per_tile = counts[position]  # positions outside of the axis repeat its ends; their output is dropped
    union = (per_tile > 0).any(1)
    window = int(union.sum(1).max())
    cells = np.argsort(~union, axis=1, kind="stable")[:, :window]
    times = np.take_along_axis(per_tile, cells[:, None, :], axis=2)
    if (times == 1).all():
        return cells, None
    with np.errstate(divide="ignore"):
        return cells, np.log(times)
