"""An affine map of features under which a linear probe is easy to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.features.moments import Moments

_TINY = 1e-6  # of the mean variance: what is below it is rounding


@dataclass(frozen=True)
class Conditioning:
    """An affine map of features under which a linear probe is easy to train: z = scale (x - mean).

    A probe (V, c) on z is the probe (V scale, c - V scale mean) on x. As upsamplers are applied to x, or to
    outputs that are linear in x, the map is never applied to features: it is folded into the probe.

    Features of a vision transformer need it: of 384 axes the first few hold most of the variance, and descent
    along them limits the step for all others. Full whitening goes too far, as it gives the axes that
    hold next to nothing the same say; see `Recipe.shrinkage`.

    Attributes:
        mean: `[C]`.
        scale: `[C, C]`, symmetric.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, moments: Moments, shrinkage: float) -> Conditioning:
        """From the moments of low-resolution features over the training split.

        Args:
            moments: Summed while the features were written.
            shrinkage: See `Recipe`.
        """
        mean, covariance = moments.mean, moments.covariance
        variances, axes = torch.linalg.eigh((covariance + covariance.T) / 2)
        damped = variances.clamp(min=0) + (shrinkage + _TINY) * variances.mean() + 1e-30
        return cls(mean.float(), (axes * damped.rsqrt() @ axes.T).float())

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on another device."""
        return Conditioning(self.mean.to(device), self.scale.to(device))

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The probe on x that equals the probe (`weight` `[..., K, C]`, `bias` `[..., K]`) on z."""
        folded = weight @ self.scale
        return folded, bias - folded @ self.mean

    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The probe on z that equals the probe (`weight`, `bias`) on x: what `fold` takes back."""
        return torch.linalg.solve(self.scale, weight, left=False), bias + weight @ self.mean


def learning_rate_scale(channels: int) -> float:
    """How many times as fast as a weight the bias learns where a recipe scales it.

    Conditioned features have zero mean, so that the bias alone carries the mean of an output, while C weights
    move together for everything else; at one rate for both, absolute depth would take most of the training.
    """
    return math.sqrt(channels)
