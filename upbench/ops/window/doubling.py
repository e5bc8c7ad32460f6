"""A map doubled bicubically and then filtered with a kernel per pixel, as windows of the map itself.

Kernels k `[B, s * s, 2 h, 2 w]` on the doubled map U x U^T average low-resolution cells with the weights

    E[y, x, p, q] = sum_ij k[i s + j, y, x] U[r(y + i), p] U[r(x + j), q],

r the reflection at the border. Pixels of a tile share their cells, so that the filter becomes one small
matrix product a tile, and neither the doubled map nor its s * s shifted copies exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.ops.chain import LinearMap
from upbench.ops.resample import interpolation_matrix
from upbench.ops.window.attention import WindowOperator
from upbench.ops.window.tables import Tiling

TILE = 4
"""Side of a tile in pixels. A smaller one copies more, a larger one multiplies more."""

_BUDGET = {"cpu": 16 * 2**20}  # on a CPU about what its caches serve well
_BUDGET_ELSEWHERE = 1 << 28

Kernels = Callable[[slice], Tensor]


class DoublingMap(LinearMap):
    """The map of a `doubling`.

    Attributes:
        operator: Weights and tiles, one group of channels.
    """

    def __init__(self, operator: WindowOperator) -> None:
        self.operator = operator
        self.output_size = operator.output_size

    def __call__(self, values: Tensor) -> Tensor:
        """See `LinearMap`. Without gradients a strip of rows at a time."""
        values = values.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled():
            return self.operator(values.unsqueeze(1))
        b, c = int(values.shape[0]), int(values.shape[1])
        rows, cols = self.operator.rows, self.operator.cols
        out = values.new_empty(b, c, *self.output_size)
        tile_row = b * cols.count * c * (rows.window * cols.window + rows.size * cols.size)
        for first, last in _strips(rows.count, tile_row * values.element_size(), values.device):
            strip = slice(*rows.span(first, last))
            out[:, :, strip] = self.operator.crop(strip, slice(None))(values.unsqueeze(1))
        return out

    def crop(self, rows: slice, cols: slice) -> tuple[DoublingMap, slice, slice]:
        """See `LinearMap`; the weights are a view."""
        part = self.operator.crop(rows, cols)
        (row_tiles, row_cells), (col_tiles, col_cells) = _moved(part.rows), _moved(part.cols)
        return DoublingMap(WindowOperator(part.weights, row_tiles, col_tiles, 1)), row_cells, col_cells

    def to(self, *args: Any, **kwargs: Any) -> DoublingMap:
        """See `LinearMap`."""
        return DoublingMap(self.operator.to(*args, **kwargs))

    def nbytes(self) -> int:
        """See `LinearMap`."""
        return self.operator.nbytes()


def doubling(
    kernels: Kernels, grid: tuple[int, int], side: int, like: Tensor, memory_budget: int | None = None
) -> DoublingMap:
    """Doubles a map (bicubic, a = -0.75, border repeated) and applies each pixel's kernel to the result.

    Args:
        kernels: Rows of the doubled map (a slice) to their kernels `[B, side * side, rows, 2 w]`; tap n is
            the pixel n // side - side // 2 rows below and n % side - side // 2 columns to the right. What
            lies outside of the map is reflected; along an axis too short for it the border is repeated.
        grid: (h, w) of the map.
        side: Of the kernels, odd.
        like: Its batch, dtype and device are those of the weights.
        memory_budget: Bytes of working memory to stay near, beside the weights; without gradients only.

    Returns:
        From `[B, C, h, w]` to `[B, C, 2 h, 2 w]`.
    """
    rows, cols = (_Axis.of(cells, side, like.device) for cells in grid)
    b, window = len(like), rows.tiles.window * cols.tiles.window
    if torch.is_grad_enabled():
        weights = _fold(kernels(slice(0, 2 * grid[0])), rows, cols, 0, rows.tiles.count)
    else:
        weights = like.new_empty(b, rows.tiles.count, cols.tiles.count, window, TILE * TILE)
        tile_row = 4 * b * cols.tiles.count * TILE * TILE * (2 * window + 4 * side * side)
        for first, last in _strips(rows.tiles.count, tile_row, like.device, memory_budget):
            part = kernels(slice(*rows.tiles.span(first, last)))
            weights[:, first:last] = _fold(part, rows, cols, first, last)
    return DoublingMap(WindowOperator(weights.to(like.dtype), rows.tiles, cols.tiles, 1))


@dataclass(frozen=True)
class _Axis:
    """An axis of the doubled map.

    Attributes:
        tiles: Runs of its positions, and the cells that each sees.
        taps: `[T, n, side, K]` float32: how much of each of a tile's cells a tap of a position finds.
    """

    tiles: Tiling
    taps: Tensor

    @staticmethod
    def of(cells: int, side: int, device: torch.device) -> _Axis:
        """The axis of a map of so many cells."""
        length, reach = 2 * cells, side // 2
        count = -(-length // TILE)
        # Pixel p lies between cells floor((p - 0.5) / 2) and the next, and sees one more on either side. A
        # tile's taps go from pixel -reach to TILE - 1 + reach of its own.
        before = 1 - (-2 * reach - 1) // 4
        window = min(cells, before + (2 * (TILE - 1 + reach) - 1) // 4 + 3)
        start = TILE // 2 * torch.arange(count, device=device) - before
        index = start.clamp(0, cells - window)[:, None] + torch.arange(window, device=device)
        position = torch.arange(count * TILE, device=device).clamp(max=length - 1)
        seen = _reflected(position[:, None] + torch.arange(-reach, reach + 1, device=device), length, reach)
        matrix = interpolation_matrix(cells, length, "bicubic", device)
        seen = seen.view(count, TILE, side, 1)
        taps = matrix[seen, index[:, None, None, :]]
        return _Axis(Tiling(length, TILE, 0, index, None), taps)


def _reflected(position: Tensor, length: int, reach: int) -> Tensor:
    """Positions up to `reach` outside of an axis, reflected at its first and last; clamped where it is too
    short."""
    last = length - 1
    if reach > last:
        return position.clamp(0, last)
    return last - (last - position.abs()).abs()


def _fold(kernels: Tensor, rows: _Axis, cols: _Axis, first: int, last: int) -> Tensor:
    """Kernels `[B, s * s, strip, W]` of tile rows first..last-1 to weights `[B, R, T, Kr * Kc, n * m]`."""
    side = int(rows.taps.shape[2])
    padding = (*cols.tiles.padding(0, cols.tiles.count), *rows.tiles.padding(first, last))
    padded = F.pad(kernels.to(torch.promote_types(kernels.dtype, torch.float32)), padding)
    split = padded.view(len(padded), side, side, last - first, TILE, cols.tiles.count, TILE)
    half = torch.einsum("rnik,bijrntm->brnkjtm", rows.taps[first:last].to(padded.dtype), split)
    both = torch.einsum("tmjl,brnkjtm->brtklnm", cols.taps.to(padded.dtype), half)
    return both.reshape(len(padded), last - first, cols.tiles.count, -1, TILE * TILE)


def _moved(tiles: Tiling) -> tuple[Tiling, slice]:
    """Tiles on the cells that they see, counted from the first of these; and which cells those are."""
    low, high = int(tiles.cells.min()), int(tiles.cells.max()) + 1
    return Tiling(tiles.length, tiles.size, tiles.before, tiles.cells - low, None), slice(low, high)


def _strips(
    count: int, per_row: int, device: torch.device, budget: int | None = None
) -> Iterator[tuple[int, int]]:
    """Runs of tile rows that stay near a budget of bytes."""
    step = max(1, (budget or _BUDGET.get(device.type, _BUDGET_ELSEWHERE)) // per_row)
    for first in range(0, count, step):
        yield first, min(first + step, count)
