"""What several metrics share. Nothing here waits for the device, except where it says so."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from upbench.errors import UpbenchError

NAN = float("nan")


def same_shape(what: str, a: Tensor, b: Tensor) -> None:
    """Raises UpbenchError where two tensors differ in shape."""
    if a.shape != b.shape:
        raise UpbenchError(f"{what} must have the same shape, got {list(a.shape)} and {list(b.shape)}")


def mean(values: Tensor) -> float:
    """Mean of what is not nan; nan of nothing. Waits for the device."""
    return float(mean_of_rows(values.reshape(1, -1)))


def mean_of_rows(values: Tensor) -> Tensor:
    """`[B]` means over each row of `[B, N]` of what is not nan; nan where there is nothing."""
    there = ~values.isnan()
    if values.device.type == "cpu":
        return torch.stack([row[kept].mean() for row, kept in zip(values, there, strict=True)])
    return torch.where(there, values, 0).sum(1) / there.sum(1)


def root(values: Tensor) -> Tensor:
    """Square root of float64, rounded correctly on a CPU, too, where `Tensor.sqrt` need not be."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.asarray(np.sqrt(values.numpy())))
    return values.sqrt()


def count_in_rows(index: Tensor, bins: int) -> Tensor:
    """How often each of `bins` numbers occurs in each row.

    Args:
        index: `[B, ...]` integers in 0..bins - 1; not looked at.
        bins: Number of bins.

    Returns:
        `[B, bins]` int64.
    """
    rows = index.flatten(1)
    count = len(rows)
    if index.device.type != "cpu":  # bincount would ask for the largest
        rows = rows.long()
        return rows.new_zeros(count, bins).scatter_add_(1, rows, torch.ones_like(rows))
    if count > 1:
        dtype = torch.int32 if count * bins < 2**31 else torch.int64
        rows = rows + torch.arange(0, count * bins, bins, dtype=dtype)[:, None]
    return torch.bincount(rows.flatten(), minlength=count * bins).view(count, bins)


def any_within(bits: Tensor, length: int, dim: int) -> Tensor:
    """Bitwise or over every `length` entries in a row along a dimension.

    Args:
        bits: Integers; n of them along `dim`.
        length: From 1 to n.
        dim: The dimension.

    Returns:
        The same with n - length + 1 entries along `dim`; in log2(length) passes.
    """
    reach = 1
    while reach < length:
        step = min(reach, length - reach)
        left = int(bits.shape[dim]) - step
        bits = bits.narrow(dim, 0, left) | bits.narrow(dim, step, left)
        reach += step
    return bits


def spread(mask: Tensor, radius: int) -> Tensor:
    """`[B, H, W]` bool: where the square of that radius, cut at the border, holds a pixel of a mask."""
    bits = mask.view(torch.uint8)
    for dim in (-2, -1):
        reach = min(radius, int(bits.shape[dim]) - 1)
        shape = list(bits.shape)
        shape[dim] += 2 * reach
        padded = bits.new_zeros(shape)
        padded.narrow(dim, reach, int(bits.shape[dim])).copy_(bits)
        bits = any_within(padded, 2 * reach + 1, dim)
    return bits.view(torch.bool)


def diagonal_fraction(fraction: float, height: int, width: int) -> int:
    """A fraction of an image's diagonal in whole pixels, at least 1."""
    return max(1, round(fraction * math.hypot(height, width)))
