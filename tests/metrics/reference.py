"""The metrics, evaluators and losses as they were written first: an image at a time, in plain steps.

What is faster must give the same numbers, to the bit where nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.sample import IGNORE
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


DILATION_RATIO = 0.02
"""Width of boundary IoU's band, as a share of the image's diagonal (Cheng et al. 2021, section 5)."""


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Counts of pixels by class: the update of `iou`, `mean_iou` and `pixel_accuracy`.

    Args:
        prediction: `[...]` integer labels in 0..K-1.
        target: Same shape; labels in 0..K-1 or `ignore_index`. Pixels that are ignored count nowhere.
        num_classes: K.
        ignore_index: Label of pixels without ground truth.

    Returns:
        `[K, K]` int64; rows are the target's classes, columns the prediction's.

    Raises:
        UpbenchError: Shapes or types that do not fit, or labels out of range.
    """
    _validate_labels(prediction, target, num_classes, ignore_index)
    keep = target != ignore_index
    pairs = target[keep].long() * num_classes + prediction[keep].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def areas(confusion: Tensor) -> Tensor:
    """`[2, K]` intersections and unions of a `[K, K]` confusion matrix."""
    intersection = confusion.diagonal()
    return torch.stack([intersection, confusion.sum(0) + confusion.sum(1) - intersection])


def iou(intersection_union: Tensor) -> Tensor:
    """`[K]` float64 intersection over union of `[2, K]` areas; nan for a class that has no union."""
    intersection, union = intersection_union.double()
    return torch.where(union > 0, intersection / union.clamp(min=1), NAN)


def mean_iou(intersection_union: Tensor) -> float:
    """Mean IoU of `[2, K]` areas over the classes that are there.

    A class is left out where nobody has it: neither ground truth nor prediction (union 0). A class that is
    only predicted counts with 0. This is the rule of MMSegmentation's `IoUMetric`.
    """
    return mean(iou(intersection_union))


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of labelled pixels that are right, from a confusion matrix."""
    total = int(confusion.sum())
    return int(confusion.diagonal().sum()) / total if total else NAN


def boundary_areas(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    ratio: float = DILATION_RATIO,
    ignore_index: int = 255,
) -> Tensor:
    """Intersections and unions of the boundary bands of each class: the update of boundary IoU.

    Boundary IoU (Cheng et al., CVPR 2021, eq. 2) compares, for each class, the pixels of the two masks
    that are within d pixels of their own mask's contour, d = `ratio` times the image's diagonal, rounded,
    at least 1. As in the authors' code the distance is Chebyshev's and the image's border is a contour.
    Areas are to be added over the split; `mean_iou` of the sum is the metric.

    A pixel of a label map is in its class's band exactly where the square of radius d around it holds
    another label or leaves the image, so one minimum and one maximum filter serve all classes.

    Args:
        prediction: `[H, W]` or `[B, H, W]` integer labels in 0..K-1.
        target: Same shape; `ignore_index` counts nowhere, and its edge is a contour in both maps.
        num_classes: K.
        ratio: Width of the band as a share of the diagonal.
        ignore_index: Label of pixels without ground truth.

    Returns:
        `[2, K]` int64: areas of the intersections and of the unions.

    Raises:
        UpbenchError: As `confusion_matrix`.
    """
    _validate_labels(prediction, target, num_classes, ignore_index)
    height, width = target.shape[-2:]
    radius = max(1, round(ratio * math.hypot(height, width)))
    keep = target != ignore_index
    predicted = torch.where(keep, prediction.long(), ignore_index)
    in_target = _label_band(target.long(), radius) & keep
    in_prediction = _label_band(predicted, radius) & keep
    both = in_target & in_prediction & (predicted == target)
    counts = [
        torch.bincount(labels.long(), minlength=num_classes)
        for labels in (target[both], target[in_target], predicted[in_prediction])
    ]
    return torch.stack([counts[0], counts[1] + counts[2] - counts[0]])


def _label_band(labels: Tensor, radius: int) -> Tensor:
    """Pixels whose square of that radius holds another label or leaves the image."""
    height, width = labels.shape[-2:]
    values = labels.reshape(-1, 1, height, width).float()
    uniform = max_filter(values, radius) == -max_filter(-values, radius)
    band = ~uniform.reshape(labels.shape)
    band[..., :radius, :] = True
    band[..., max(0, height - radius) :, :] = True
    band[..., :radius] = True
    band[..., max(0, width - radius) :] = True
    return band


def _validate_labels(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    same_shape("labels", prediction, target)
    for name, labels in (("predicted", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise UpbenchError(f"{name} labels must be integers, got {labels.dtype}")
    if not target.numel():
        return
    keep = target != ignore_index
    for name, labels in (("target", target[keep]), ("predicted", prediction[keep])):
        if not labels.numel():
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise UpbenchError(
                f"{name} label {wrong} is out of range: "
                f"{num_classes} classes are numbered 0 to {num_classes - 1}"
            )


DEPTH_JUMP = 0.1
"""Relative difference of depth between neighbours above which there is a discontinuity between them."""


DEPTH_BAND_RATIO = 0.01
"""Reach of the band around depth discontinuities, as a share of the image's diagonal."""


MIN_DEPTH = 1e-3
"""Predictions are clamped to at least this many metres before logarithms and ratios are taken."""


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """Errors of one depth map over its valid pixels, p the prediction and t the target.

    Args:
        prediction: `[H, W]` metres; clamped to at least `MIN_DEPTH`.
        target: `[H, W]` metres.
        valid: `[H, W]` bool; pixels whose target is not above 0 are left out as well.

    Returns:
        `delta1`, `delta2`, `delta3`: share of pixels with max(p/t, t/p) < 1.25, 1.25^2, 1.25^3.
        `absrel`: mean |p - t| / t. `rmse`: root mean square of p - t, in metres.
        `log10`: mean |log10 p - log10 t|. `silog`: 100 times the standard deviation of ln p - ln t
        (Eigen et al. 2014, with lambda = 1, as on KITTI).
        `rmse_edge`: RMSE over the valid pixels of `depth_discontinuities`, in metres.
        All nan where no pixel is valid, `rmse_edge` also where there is no discontinuity.

    Raises:
        UpbenchError: Shapes that do not fit, or a prediction that is not finite at a valid pixel.
    """
    valid = _validate_depth(prediction, target, valid)
    edge = depth_discontinuities(target, valid)[valid]
    p = prediction[valid].double().clamp(min=MIN_DEPTH)
    t = target[valid].double()
    ratio = torch.maximum(p / t, t / p)
    log = p.log() - t.log()
    error = p - t
    return {
        **{f"delta{n}": mean((ratio < 1.25**n).double()) for n in (1, 2, 3)},
        "absrel": mean(error.abs() / t),
        "rmse": root_mean_square(error),
        "log10": mean(log.abs()) / math.log(10),
        "silog": 100 * root_mean_square(log - log.mean()),
        "rmse_edge": root_mean_square(error[edge]),
    }


def depth_discontinuities(
    depth: Tensor, valid: Tensor, jump: float = DEPTH_JUMP, ratio: float = DEPTH_BAND_RATIO
) -> Tensor:
    """The band around depth discontinuities.

    Two valid 4-neighbours a, b are on a discontinuity where max(a, b) > (1 + `jump`) min(a, b). The band
    is every pixel within r pixels (Chebyshev) of such a pixel, r = `ratio` times the diagonal, rounded, at
    least 1.

    Args:
        depth: `[H, W]` metres.
        valid: `[H, W]` bool.
        jump: Relative difference.
        ratio: Reach of the band as a share of the diagonal.

    Returns:
        `[H, W]` bool; not restricted to valid pixels.
    """
    same_shape("depth and valid mask", depth, valid)
    at_edge = torch.zeros_like(valid, dtype=torch.bool)
    for axis in (0, 1):
        n = depth.shape[axis] - 1
        a, b = depth.narrow(axis, 0, n), depth.narrow(axis, 1, n)
        both = valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        jumps = (torch.maximum(a, b) > (1 + jump) * torch.minimum(a, b)) & both
        at_edge.narrow(axis, 0, n).logical_or_(jumps)
        at_edge.narrow(axis, 1, n).logical_or_(jumps)
    radius = max(1, round(ratio * math.hypot(*depth.shape)))
    return max_filter(at_edge[None, None].float(), radius)[0, 0] > 0


def mean_over_images(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the images where it is not nan; nan where it is nowhere."""
    names = images[0] if images else ()
    values = {name: torch.tensor([image[name] for image in images], dtype=torch.float64) for name in names}
    return {name: mean(value) for name, value in values.items()}


def _validate_depth(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    same_shape("depth", prediction, target)
    same_shape("depth and valid mask", target, valid)
    if target.ndim != 2:
        raise UpbenchError(f"depth must be [H, W], got {list(target.shape)}")
    valid = valid.bool() & (target > 0) & target.isfinite()
    if not bool(prediction[valid].isfinite().all()):
        raise UpbenchError("predicted depth is not finite")
    return valid


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


# --------------------------------------------------------------------- evaluators, one image at a time


class SegmentationEvaluator:
    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.boundary = torch.zeros(2, num_classes, dtype=torch.int64)

    def update(self, answer: Tensor, label: Tensor, valid: Tensor) -> float:
        target = label.masked_fill(~valid, IGNORE)
        confusion = confusion_matrix(answer, target, self.num_classes)
        self.confusion = self.confusion + confusion
        self.boundary = self.boundary + boundary_areas(answer, target, self.num_classes)
        return 100 * mean_iou(areas(confusion))

    def compute(self) -> dict[str, float]:
        return {
            "miou": 100 * mean_iou(areas(self.confusion)),
            "pixel_accuracy": 100 * pixel_accuracy(self.confusion),
            "boundary_iou": 100 * mean_iou(self.boundary),
        }


class DepthEvaluator:
    def __init__(self) -> None:
        self.images: list[dict[str, float]] = []

    def update(self, answer: Tensor, depth: Tensor, valid: Tensor) -> float:
        values = depth_metrics(answer, depth, valid & (depth <= 10.0))
        values = {name: value * (100 if name.startswith("delta") else 1) for name, value in values.items()}
        self.images.append(values)
        return values["rmse"]

    def compute(self) -> dict[str, float]:
        return mean_over_images(self.images)


class NormalsEvaluator:
    def __init__(self) -> None:
        self.totals: AngleTotals | None = None

    def update(self, answer: Tensor, normal: Tensor, valid: Tensor) -> float:
        totals = angle_totals(answer, normal, valid)
        self.totals = totals if self.totals is None else self.totals + totals
        return angle_metrics(totals)["mean"]

    def compute(self) -> dict[str, float]:
        assert self.totals is not None
        values = angle_metrics(self.totals)
        return {name: value * (100 if name.startswith("under") else 1) for name, value in values.items()}


# ----------------------------------------------------------------------------------------------- losses


def cross_entropy(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    target = target.masked_fill(~valid, IGNORE)
    labelled = target[target != IGNORE]
    total = F.cross_entropy(prediction, target, ignore_index=IGNORE, reduction="sum")
    return total / max(1, labelled.numel())


def depth_from_bins(z: Tensor, low: float = 1e-3, high: float = 10.0, floor: float = 0.1) -> Tensor:
    step = (high - low) / z.shape[1]
    centres = low + step * (torch.arange(z.shape[1], dtype=z.dtype) + 0.5)
    r = z.relu() + floor
    return (r * centres[:, None, None]).sum(1) / r.sum(1)


def gradient_loss(log: Tensor, valid: Tensor) -> Tensor:
    total = log.new_zeros(())
    for step in (1, 2, 4, 8):
        g, mask = log[:, ::step, ::step], valid[:, ::step, ::step]
        count = mask.sum().clamp(min=1)
        for axis in (1, 2):
            n = g.shape[axis] - 1
            if n < 1:
                continue
            both = mask.narrow(axis, 0, n) & mask.narrow(axis, 1, n)
            difference = (g.narrow(axis, 1, n) - g.narrow(axis, 0, n)).abs()
            total = total + torch.where(both, difference, 0).sum() / count
    return total
