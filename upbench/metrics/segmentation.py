"""Segmentation: totals are added over the split, so that there is one confusion matrix.

A mean of per-image IoUs is another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import (
    NAN,
    any_within,
    count_in_rows,
    diagonal_fraction,
    mean,
    mean_of_rows,
    same_shape,
)

DILATION_RATIO = 0.02
"""Width of boundary IoU's band, as a fraction of the image's diagonal (Cheng et al. 2021, section 5)."""

INTERSECTION, TARGET, PREDICTION = range(3)
"""Rows of a count of pixels by class."""


@dataclass(frozen=True)
class LabelCounts:
    """What label maps add up to.

    Attributes:
        mask: `[B, 3, K]` int64, of each image and class: pixels that are right, that have the class, that are
            predicted to have it.
        band: The same within the boundary bands of the class; right pixels are in both maps' bands.
        wrong: `[]` bool: whether a pixel that counts has a class out of range, so that the counts mean
            nothing.
    """

    mask: Tensor
    band: Tensor
    wrong: Tensor


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
    pairs = target.long() * num_classes + prediction.long()
    pairs = torch.where(target == ignore_index, num_classes**2, pairs)
    counts = count_in_rows(pairs.reshape(1, -1), num_classes**2 + 1)
    return counts[0, :-1].reshape(num_classes, num_classes)


def areas(confusion: Tensor) -> Tensor:
    """`[2, K]` intersections and unions of a `[K, K]` confusion matrix."""
    return areas_of_counts(torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)]))


def areas_of_counts(counts: Tensor) -> Tensor:
    """`[..., 2, K]` intersections and unions of `[..., 3, K]` counts (`LabelCounts`)."""
    both, target, prediction = counts.unbind(-2)
    return torch.stack([both, target + prediction - both], -2)


def iou(intersection_union: Tensor) -> Tensor:
    """`[..., K]` float64: intersection over union, of `[..., 2, K]` areas; nan where the union is 0."""
    intersection, union = intersection_union.double().unbind(-2)
    return torch.where(union > 0, intersection / union.clamp(min=1), NAN)


def mean_iou(intersection_union: Tensor, leave_out: int | None = None) -> float:
    """Mean IoU of `[2, K]` areas over the classes that are there.

    A class is left out where nobody has it: neither ground truth nor prediction (union 0). A class that is
    only predicted counts with 0. This is the rule of MMSegmentation's `IoUMetric`.

    Args:
        intersection_union: `[2, K]`.
        leave_out: A class whose IoU is not part of the mean. Its pixels still count in the unions of others.

    Returns:
        In 0..1; nan where no class is there.
    """
    return mean(_left_out(iou(intersection_union), leave_out))


def mean_iou_of_images(intersection_union: Tensor, leave_out: int | None = None) -> Tensor:
    """`mean_iou` of each image: `[B]` float64 of `[B, 2, K]` areas."""
    return mean_of_rows(_left_out(iou(intersection_union), leave_out))


def pixel_accuracy(confusion: Tensor) -> float:
    """Fraction of labelled pixels that are right, from a confusion matrix; nan where there is none."""
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

    Args:
        prediction: `[H, W]` or `[B, H, W]` integer labels in 0..K-1.
        target: Same shape; `ignore_index` counts nowhere, and its edge is a contour in both maps.
        num_classes: K.
        ratio: Width of the band as a fraction of the diagonal.
        ignore_index: Label of pixels without ground truth.

    Returns:
        `[2, K]` int64: areas of the intersections and of the unions.

    Raises:
        UpbenchError: As `confusion_matrix`.
    """
    _validate_labels(prediction, target, num_classes, ignore_index)
    shape = (-1, *target.shape[-2:])
    counts = label_counts(prediction.reshape(shape), target.reshape(shape), num_classes, ratio, ignore_index)
    return areas_of_counts(counts.band.sum(0))


def label_counts(
    prediction: Tensor,
    target: Tensor,
    num_classes: int,
    ratio: float = DILATION_RATIO,
    ignore_index: int = 255,
) -> LabelCounts:
    """All that segmentation's metrics are made of, image by image.

    Validates nothing and does not wait for the device; see `LabelCounts.wrong`.

    Args:
        prediction: `[B, H, W]` integer labels.
        target: Same shape; see `boundary_areas`.
        num_classes: K.
        ratio: Width of the bands as a fraction of the diagonal.
        ignore_index: Label of pixels without ground truth.
    """
    keep = target != ignore_index
    maps, wrong = [], torch.zeros((), dtype=torch.bool, device=target.device)
    for labels in (target, prediction):
        labels = torch.where(keep, labels.long(), 0)
        if labels.numel():
            low, high = labels.aminmax()
            wrong = wrong | (low < 0) | (high >= num_classes)
        small = labels.clamp(0, num_classes).to(_smallest(num_classes))
        maps.append(small.masked_fill_(~keep, num_classes))  # one class more: what is ignored
    radius = diagonal_fraction(ratio, *target.shape[-2:])
    target, prediction = maps
    in_target, in_prediction = (_band(labels, radius).view(torch.uint8) for labels in maps)
    # One histogram over the target's classes and one over the prediction's, with flags as the lowest digits.
    flags = (target == prediction).view(torch.uint8) * 4 + in_target * 2 + in_prediction
    by_target = count_in_rows(target.int() * 8 + flags, 8 * (num_classes + 1))
    by_prediction = count_in_rows(prediction.int() * 2 + in_prediction, 2 * (num_classes + 1))
    by_target = by_target.view(-1, num_classes + 1, 2, 2, 2)[:, :-1]
    by_prediction = by_prediction.view(-1, num_classes + 1, 2)[:, :-1]
    mask = [by_target[:, :, 1].sum((2, 3)), by_target.sum((2, 3, 4)), by_prediction.sum(2)]
    band = [by_target[:, :, 1, 1, 1], by_target[:, :, :, 1].sum((2, 3)), by_prediction[:, :, 1]]
    return LabelCounts(torch.stack(mask, 1), torch.stack(band, 1), wrong)


def _left_out(values: Tensor, which: int | None) -> Tensor:
    if which is None:
        return values
    values = values.clone()
    values[..., which] = NAN
    return values


def _smallest(highest: int) -> torch.dtype:
    """The dtype of the fewest bytes that holds 0..highest."""
    return torch.uint8 if highest < 2**8 else torch.int16 if highest < 2**15 else torch.int32


def _band(labels: Tensor, radius: int) -> Tensor:
    """Pixels of label maps `[B, H, W]` whose square of that radius holds another label or leaves the image.

    They are in their class's band, so that one pass serves all classes. A square holds two labels exactly
    where two neighbours differ in one of its rows, or in the column through its middle.
    """
    height, width = labels.shape[-2:]
    band = torch.ones(labels.shape, dtype=torch.bool, device=labels.device)
    if min(height, width) <= 2 * radius:
        return band
    middle = slice(radius, width - radius)
    rows = any_within(labels[..., 1:] ^ labels[..., :-1], 2 * radius, -1)
    column = labels[..., 1:, middle] ^ labels[..., :-1, middle]
    square = any_within(rows[..., :-1, :] | column, 2 * radius, -2) | rows[..., 2 * radius :, :]
    band[..., radius : height - radius, middle] = square != 0
    return band


def _validate_labels(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> None:
    same_shape("labels", prediction, target)
    for name, labels in (("predicted", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise UpbenchError(f"{name} labels must be integers, got {labels.dtype}")
    if not target.numel():
        return
    keep = target != ignore_index
    for name, labels in (("target", target), ("predicted", prediction)):
        low, high = (int(end) for end in torch.where(keep, labels.long(), 0).aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise UpbenchError(
                f"{name} label {wrong} is out of range: "
                f"{num_classes} classes are numbered 0 to {num_classes - 1}"
            )
