"""Segmentation: totals are added over the split, so that there is one confusion matrix.

A mean of per-image IoUs is another number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import NAN, max_filter, mean, same_shape

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
