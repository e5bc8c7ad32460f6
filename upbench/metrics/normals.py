"""Surface normals: all valid pixels of the split are pooled (as Bae et al. 2021 do)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import NAN, same_shape

ANGLE_THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)
"""Degrees; shares of pixels are counted strictly under them."""

_MEDIAN_BINS = 18_000  # of 0.01 degrees: the pooled median is exact to half of that, in constant memory


@dataclass(frozen=True)
class AngleTotals:
    """What pooled angular errors add up to.

    Attributes:
        sums: `[3]` float64: number of pixels, sum of degrees, sum of squared degrees.
        under: Number of pixels strictly under each of `ANGLE_THRESHOLDS`.
        histogram: Number of pixels by hundredths of a degree.
    """

    sums: Tensor
    under: Tensor
    histogram: Tensor

    def __add__(self, other: AngleTotals) -> AngleTotals:
        return AngleTotals(self.sums + other.sums, self.under + other.under, self.histogram + other.histogram)


def angular_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Angle between vectors, in degrees.

    Args:
        prediction: `[..., 3, H, W]`, of any length; a zero vector is at 90 degrees.
        target: Same shape, of any length but 0.

    Returns:
        `[..., H, W]` in 0..180; by the arc tangent, which is exact for small angles too.
    """
    same_shape("normals", prediction, target)
    if prediction.ndim < 3 or prediction.shape[-3] != 3:
        raise UpbenchError(f"normals must be [..., 3, H, W], got {list(prediction.shape)}")
    sine = torch.linalg.cross(prediction, target, dim=-3).norm(dim=-3)
    cosine = (prediction * target).sum(-3)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    return torch.where((sine == 0) & (cosine == 0), torch.full_like(angle, 90), angle)


def angle_totals(prediction: Tensor, target: Tensor, valid: Tensor) -> AngleTotals:
    """Totals of the angular errors of valid pixels: the update of `angle_metrics`.

    Args:
        prediction: `[..., 3, H, W]`.
        target: Same shape; pixels where it is 0 are left out.
        valid: `[..., H, W]` bool.

    Raises:
        UpbenchError: Shapes that do not fit, or a prediction that is not finite at a valid pixel.
    """
    degrees = angular_error(prediction.double(), target.double())
    same_shape("normals and valid mask", degrees, valid)
    degrees = degrees[valid.bool() & (target != 0).any(-3)]
    if not bool(degrees.isfinite().all()):
        raise UpbenchError("predicted normals are not finite")
    count = torch.tensor(degrees.numel(), dtype=torch.float64, device=degrees.device)
    bins = (degrees * (_MEDIAN_BINS / 180)).long().clamp_(max=_MEDIAN_BINS - 1)
    return AngleTotals(
        torch.stack([count, degrees.sum(), degrees.square().sum()]),
        torch.stack([(degrees < threshold).sum() for threshold in ANGLE_THRESHOLDS]),
        torch.bincount(bins, minlength=_MEDIAN_BINS),
    )


def angle_metrics(totals: AngleTotals) -> dict[str, float]:
    """Metrics of surface normals over pooled pixels (Bae et al. 2021, section 4).

    Returns:
        `mean`, `median`, `rmse` in degrees (the median to 0.005 degrees, by linear interpolation within
        hundredths); `under_5`, `under_7.5`, `under_11.25`, `under_22.5`, `under_30`: shares of pixels
        strictly under the angle. All nan where there is no pixel.
    """
    count, total, squares = totals.sums.tolist()
    if not count:
        return dict.fromkeys(("mean", "median", "rmse", *map(angle_name, ANGLE_THRESHOLDS)), NAN)
    return {
        "mean": total / count,
        "median": _histogram_median(totals.histogram) * 180 / _MEDIAN_BINS,
        "rmse": math.sqrt(squares / count),
        **{angle_name(t): n / count for t, n in zip(ANGLE_THRESHOLDS, totals.under.tolist(), strict=True)},
    }


def angle_name(threshold: float) -> str:
    """Name of the share under an angle, as in "under_11.25"."""
    return f"under_{threshold:g}"


def _histogram_median(histogram: Tensor) -> float:
    """Position of the median in units of bins, linear within its bin."""
    below = histogram.cumsum(0)
    half = below[-1].double() / 2
    at = int(torch.searchsorted(below.double(), half))
    before = float(below[at]) - float(histogram[at])
    return at + (float(half) - before) / float(histogram[at])
