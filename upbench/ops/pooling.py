"""Adaptive average pooling of a part of a map, where the whole is too large to be held."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LONG = 4  # windows of more cells are averaged by a matrix product


def pooled_span(size: int, output_size: int, positions: slice) -> slice:
    """The cells of an axis that some of its pooled positions average.

    Position i of n averages the cells floor(i size / n) .. ceil((i + 1) size / n) - 1, as
    `torch.nn.functional.adaptive_avg_pool2d` does.

    Args:
        size: Length of the axis.
        output_size: Its length after pooling, n; may be larger than `size`.
        positions: Of the pooled axis, start and stop given, not empty.
    """
    first, last = positions.start, positions.stop - 1
    return slice(first * size // output_size, -(-(last + 1) * size // output_size))


def pool_part(
    x: Tensor, size: tuple[int, int], output_size: tuple[int, int], rows: slice, cols: slice
) -> Tensor:
    """A rectangle of the adaptive average pooling of a map.

    Args:
        x: `[B, C, n, m]`, the cells of the map that the rectangle depends on: `pooled_span` of either axis.
        size: (h, w) of the whole map.
        output_size: (H, W) after pooling.
        rows: Of the rectangle of H x W, start and stop given.
        cols: Of it.

    Returns:
        `[B, C, rows, cols]`; equal to the same part of the whole pooling but for rounding.
    """
    windows = [_windows(*sizes) for sizes in zip(size, output_size, (rows, cols), strict=True)]
    steps = [_even(low, high) for low, high in windows]
    if steps[0] and steps[1]:
        return x if steps == [1, 1] else F.avg_pool2d(x, (steps[0], steps[1]))
    for axis, (low, high) in zip((2, 3), windows, strict=True):
        x = _pool_axis(x, axis, low, high)
    return x


def _windows(size: int, output_size: int, positions: slice) -> tuple[np.ndarray, np.ndarray]:
    """First and last + 1 cell of each position, counted from the first cell of all."""
    place = np.arange(positions.start, positions.stop)
    low, high = place * size // output_size, -(-(place + 1) * size // output_size)
    return low - low[0], high - low[0]


def _even(low: np.ndarray, high: np.ndarray) -> int:
    """The length of windows that are equal and follow upon one another, else 0."""
    length = int(high[0])
    return length if np.array_equal(high, length * np.arange(1, len(high) + 1)) and _apart(low, high) else 0


def _apart(low: np.ndarray, high: np.ndarray) -> bool:
    return bool((low[1:] == high[:-1]).all())


def _pool_axis(x: Tensor, axis: int, low: np.ndarray, high: np.ndarray) -> Tensor:
    length = high - low
    if length.max() > _LONG:
        cell = np.arange(x.shape[axis])
        inside = (cell >= low[:, None]) & (cell < high[:, None])
        matrix = torch.from_numpy(inside / length[:, None]).to(x.device, torch.float32)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        matrix = matrix.to(precise.dtype)
        return (matrix @ precise if axis == 2 else precise @ matrix.T).to(x.dtype)
    total = None
    for t in range(int(length.max())):
        part = x.index_select(axis, torch.from_numpy(np.minimum(low + t, high - 1)).to(x.device))
        weight = torch.from_numpy((t < length) / length).to(x.device, x.dtype)
        part = part * weight.view(-1, *(1,) * (3 - axis))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
