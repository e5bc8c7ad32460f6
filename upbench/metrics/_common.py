"""What several metrics share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.errors import UpbenchError

NAN = float("nan")


def max_filter(values: Tensor, radius: int) -> Tensor:
    """Maximum over the square of that radius, cut at the border; `[B, 1, H, W]`."""
    for axis in (0, 1):
        reach = [0, 0]
        reach[axis] = min(radius, values.shape[2 + axis] - 1)
        kernel = (2 * reach[0] + 1, 2 * reach[1] + 1)
        padded = F.pad(values, (reach[1], reach[1], reach[0], reach[0]), value=-torch.inf)
        values = F.max_pool2d(padded, kernel, stride=1)
    return values


def mean(values: Tensor) -> float:
    """Mean of what is not nan; nan of nothing."""
    values = values[~values.isnan()]
    return float(values.mean()) if values.numel() else NAN


def root_mean_square(values: Tensor) -> float:
    """Root of the mean square; nan of nothing."""
    return math.sqrt(float(values.square().mean())) if values.numel() else NAN


def same_shape(what: str, a: Tensor, b: Tensor) -> None:
    """Raises UpbenchError where two tensors differ in shape."""
    if a.shape != b.shape:
        raise UpbenchError(f"{what} must have the same shape, got {list(a.shape)} and {list(b.shape)}")
