"""Surface normals: all valid pixels of the split are pooled (as Bae et al. 2021 do)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import NAN, count_in_rows, root, same_shape

ANGLE_THRESHOLDS = (5.0, 7.5, 11.25, 22.5, 30.0)
"""Degrees; fractions of pixels are counted strictly under them."""

_MEDIAN_BINS = 18_000  # of 0.01 degrees: the pooled median is exact to half of that, in constant memory


@dataclass(frozen=True)
class AngleTotals:
    """What pooled angular errors add up to.

    Attributes:
        sums: `[3]` float64: number of pixels, sum of degrees, sum of squared degrees.
        under: `[5]` number of pixels strictly under each of `ANGLE_THRESHOLDS`.
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

    Raises:
        UpbenchError: Shapes that do not fit.
    """
    _validate(prediction, target)
    return _angles(prediction, target, -3)


def angle_totals(prediction: Tensor, target: Tensor, valid: Tensor) -> AngleTotals:
    """Totals of the angular errors of valid pixels: the update of `angle_metrics`.

    Args:
        prediction: `[..., 3, H, W]`.
        target: Same shape; pixels where it is 0 are left out.
        valid: `[..., H, W]` bool.

    Raises:
        UpbenchError: Shapes that do not fit, or a prediction that is not finite at a valid pixel.
    """
    _validate(prediction, target)
    same_shape("normals and valid mask", target.select(-3, 0), valid)
    prediction, target = (part.movedim(-3, 0).reshape(1, 3, -1) for part in (prediction, target))
    found, wrong = angle_totals_of_images(prediction, target, valid.reshape(1, -1).bool())
    if bool(wrong):
        raise UpbenchError("predicted normals are not finite")
    return AngleTotals(found.sums[0], found.under[0], found.histogram)


def angle_totals_of_images(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[AngleTotals, Tensor]:
    """`angle_totals` of a batch. Validates nothing and does not wait for the device.

    Args:
        prediction: `[B, 3, ...]`.
        target: Same shape; pixels where it is 0 are left out.
        valid: `[B, ...]` bool.

    Returns:
        Totals whose `sums` (`[B, 3]`) and `under` (`[B, 5]`) are of each image, and the rest of all; and `[]`
        bool, whether a prediction at a valid pixel is not finite, so that the totals mean nothing.
    """
    valid = (valid & (target != 0).any(1)).flatten(1)
    prediction, target = prediction.flatten(2), target.flatten(2)
    if target.device.type == "cpu":  # there it is cheaper to add up what is valid only
        found = [_totals(*image) for image in zip(prediction, target, valid, strict=True)]
        totals = AngleTotals(
            torch.stack([one.sums for one, _ in found]),
            torch.stack([one.under for one, _ in found]),
            torch.stack([one.histogram for one, _ in found]).sum(0),
        )
        return totals, ~torch.stack([finite for _, finite in found]).all()
    degrees = _angles(prediction.double(), target.double(), 1)
    wrong = (valid & ~degrees.isfinite()).any()
    counted = torch.where(valid, degrees, 0)
    sums = torch.stack([valid.sum(1).double(), counted.sum(1), counted.square().sum(1)], 1)
    far = torch.where(valid, degrees, torch.inf)
    under = torch.stack([(far < threshold).sum(1) for threshold in ANGLE_THRESHOLDS], 1)
    bins = torch.where(valid, _bins(degrees.nan_to_num(0)), _MEDIAN_BINS)  # one more, for what does not count
    histogram = count_in_rows(bins.reshape(1, -1), _MEDIAN_BINS + 1)[0, :-1]
    return AngleTotals(sums, under, histogram), wrong


def _totals(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[AngleTotals, Tensor]:
    """Totals of one image's pixels (`[3, N]`, `[N]`), and whether all of them are finite."""
    degrees = _angles(prediction.double(), target.double(), 0)[valid]
    count = torch.tensor(degrees.numel(), dtype=torch.float64)
    sums = torch.stack([count, degrees.sum(), degrees.square().sum()])
    under = torch.stack([(degrees < threshold).sum() for threshold in ANGLE_THRESHOLDS])
    histogram = torch.bincount(_bins(degrees.nan_to_num(0)), minlength=_MEDIAN_BINS)
    return AngleTotals(sums, under, histogram), degrees.isfinite().all()


def _angles(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Degrees between vectors along a dimension."""
    cross = torch.linalg.cross(a, b, dim=dim)
    if cross.dtype == torch.float64 and not cross.requires_grad:
        sine = root(cross.square().sum(dim))  # what `norm` gives, in a fraction of its time
    else:
        sine = cross.norm(dim=dim)
    cosine = (a * b).sum(dim)
    angle = torch.rad2deg(torch.atan2(sine, cosine))
    return torch.where((sine == 0) & (cosine == 0), 90, angle)


def _bins(degrees: Tensor) -> Tensor:
    return (degrees * (_MEDIAN_BINS / 180)).long().clamp_(max=_MEDIAN_BINS - 1)


def _validate(prediction: Tensor, target: Tensor) -> None:
    same_shape("normals", prediction, target)
    if prediction.ndim < 3 or prediction.shape[-3] != 3:
        raise UpbenchError(f"normals must be [..., 3, H, W], got {list(prediction.shape)}")


def angle_metrics(totals: AngleTotals) -> dict[str, float]:
    """Metrics of surface normals over pooled pixels (Bae et al. 2021, section 4).

    Returns:
        `mean`, `median`, `rmse` in degrees (the median to 0.005 degrees, by linear interpolation within
        hundredths); `under_5`, `under_7.5`, `under_11.25`, `under_22.5`, `under_30`: fractions of
        pixels strictly under the angle. All nan where there is no pixel.
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


IMAGE_THRESHOLDS = (11.25, 22.5, 30.0)
IMAGE_METRICS = ("image_rmse", *(f"image_under_{threshold:g}" for threshold in IMAGE_THRESHOLDS))
"""What `image_values` gives."""


def image_values(totals: AngleTotals) -> Tensor:
    """Metrics of each image by itself, whose mean over images is what probe3d reports.

    Args: totals: As `angle_totals_of_images` gives them.

    Returns:
        `[B, 4]` float64 in the order of `IMAGE_METRICS`: root mean square of the angles in degrees, fractions
        of pixels under 11.25, 22.5 and 30 degrees; nan for an image without a valid pixel.
    """
    count, _, squares = totals.sums.unbind(1)
    which = [ANGLE_THRESHOLDS.index(threshold) for threshold in IMAGE_THRESHOLDS]
    fractions = [totals.under[:, at].double() / count for at in which]
    return torch.stack([root(squares / count), *fractions], 1)


def angle_name(threshold: float) -> str:
    """Name of the fraction under an angle, as in "under_11.25"."""
    return f"under_{threshold:g}"


def _histogram_median(histogram: Tensor) -> float:
    """Position of the median in units of bins, linear within its bin."""
    below = histogram.cumsum(0)
    half = below[-1].double() / 2
    at = int(torch.searchsorted(below.double(), half))
    before = float(below[at]) - float(histogram[at])
    return at + (float(half) - before) / float(histogram[at])
