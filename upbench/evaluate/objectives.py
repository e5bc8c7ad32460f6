"""Losses of published benchmarks of depth and normals, and the range of depths that they count.

The depths of a batch are `[B, H, W]` metres. An image's pixels are compared by g = ln(p + 0.001) -
ln(t + 0.001).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPSILON = 1e-3
_TINY = 1e-12  # keeps the slope of a root finite where all of g is 0
STRIDES = (1, 2, 4, 6)
_CLOSE = 1e-4  # cosines are kept so far from +-1, where the arc cosine has poles


@dataclass(frozen=True)
class DepthObjective:
    """How depth is trained and which pixels are scored.

    Attributes:
        scale_weight: Of the scale-invariant loss.
        gradient_weight: Of the gradient loss.
        axes: Axes of `[B, 1, H, W]` that the gradient loss works along: (2, 3) are those of the image. The
            published code took the first two for a time, and compared image b with image b + 2.
        unbiased: Whether the variance of g divides by one less than the number of pixels (as JAFAR's).
        warmup: Steps at the beginning that know the mean of g only.
        low: Depths up to here are not scored.
        closed: Whether the largest depth itself is scored.
    """

    scale_weight: float = 10.0
    gradient_weight: float = 0.5
    axes: tuple[int, int] = (2, 3)
    unbiased: bool = False
    warmup: int = 0
    low: float = 0.0
    closed: bool = True

    def loss(self, depth: Tensor, target: Tensor, valid: Tensor, high: float, step: int) -> Tensor:
        """Scalar; next to 0 where no pixel is valid.

        Args:
            depth: The prediction.
            target: The truth; only what is above 0 and at most `high` counts.
            valid: `[B, H, W]` bool.
            high: The largest depth.
            step: Of the training, from 0.
        """
        valid = valid & (target > 0) & (target <= high)
        g = (depth + _EPSILON).log() - (target.clamp(min=0) + _EPSILON).log()
        loss = self.scale_weight * scale_loss(g, valid, self.unbiased, mean_only=step < self.warmup)
        return loss + self.gradient_weight * gradient_loss(g, valid, self.axes)

    def scored(self, target: Tensor, valid: Tensor, high: float) -> Tensor:
        """`[B, H, W]` bool: the pixels that metrics are over."""
        return valid & (target > self.low) & ((target <= high) if self.closed else (target < high))


DEPTH: dict[str, DepthObjective] = {
    "probe3d": DepthObjective(),
    "probe3d_2025": DepthObjective(axes=(0, 1)),
    "jafar": DepthObjective(
        scale_weight=1.0, axes=(0, 1), unbiased=True, warmup=100, low=_EPSILON, closed=False
    ),
}
"""By the name of the protocol's objective."""


def scale_loss(g: Tensor, valid: Tensor, unbiased: bool = False, mean_only: bool = False) -> Tensor:
    """Square root of the variance of g plus 0.15 times the square of its mean, over all valid pixels.

    With the plain variance that is mean(g^2) - 0.85 mean(g)^2 (Eigen et al. 2014, the root as in AdaBins).

    Args:
        g: `[B, H, W]`.
        valid: Same shape, bool.
        unbiased: Whether the variance divides by the number of pixels less 1.
        mean_only: Whether the variance is left out.
    """
    count = valid.sum()
    mean = torch.where(valid, g, 0).sum() / count.clamp(min=1)
    total = 0.15 * mean.square()
    if not mean_only:
        spread = torch.where(valid, g - mean, 0).square().sum()
        total = total + spread / (count - int(unbiased)).clamp(min=1)
    return (total + _TINY).sqrt()


def gradient_loss(g: Tensor, valid: Tensor, axes: Sequence[int] = (2, 3)) -> Tensor:
    """Absolute differences of g over a distance of two, at strides 1, 2, 4 and 6, each over its valid pixels.

    Args:
        g: `[B, H, W]`.
        valid: Same shape, bool; both ends must be.
        axes: See `DepthObjective`.
    """
    total = g.new_zeros(())
    for stride in STRIDES:
        part, mask = g[:, None], valid[:, None]
        for axis in axes:
            index = torch.arange(0, part.shape[axis], stride, device=g.device)
            part, mask = part.index_select(axis, index), mask.index_select(axis, index)
        count = mask.sum().clamp(min=1)
        for axis in axes:
            n = int(part.shape[axis]) - 2
            if n < 1:
                continue
            both = mask.narrow(axis, 0, n) & mask.narrow(axis, 2, n)
            difference = part.narrow(axis, 0, n) - part.narrow(axis, 2, n)
            total = total + torch.where(both, difference, 0).abs().sum() / count
    return total


def angular_likelihood(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Negative log likelihood of normals whose spread is predicted, too (Bae et al. 2021, eq. 7).

    Args:
        prediction: `[B, 4, H, W]`: a direction of any length, and what the concentration is made of.
        target: `[B, 3, H, W]` unit normals.
        valid: `[B, H, W]` bool.

    Returns:
        Scalar, the mean over valid pixels; 0 where there is none.
    """
    kappa = F.elu(prediction[:, 3]) + 1.01
    cosine = F.cosine_similarity(prediction[:, :3], target, dim=1)
    angle = cosine.clamp(-1 + _CLOSE, 1 - _CLOSE).acos()
    loss = F.softplus(-math.pi * kappa) - (kappa.square() + 1).log() + kappa * angle
    return torch.where(valid, loss, 0).sum() / valid.sum().clamp(min=1)
