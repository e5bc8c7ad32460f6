"""Semantic segmentation by a linear probe."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.sample import IGNORE
from upbench.contracts.task import Evaluator, Metric, Truth
from upbench.errors import UpbenchError
from upbench.evaluate.task import ProbeTask
from upbench.metrics.segmentation import (
    INTERSECTION,
    TARGET,
    areas_of_counts,
    label_counts,
    mean_iou,
    mean_iou_of_images,
)

_PIECE = 2**18  # elements


class Segmentation(ProbeTask):
    """A class for every pixel: one logit per class, cross-entropy, 255 ignored.

    mIoU is of one confusion matrix over the split, and equals MMSegmentation's `IoUMetric`; boundary IoU
    (Cheng et al. 2021) is the mean over classes of the boundary bands' areas over the split.

    A dataset's class "other" counts as all do, unless the protocol says otherwise: `labels` can ignore its
    pixels, or `scoring.other` can leave its IoU out of the means. In the second case there still is one
    confusion matrix of all classes: a real class that is predicted on a pixel of "other" has it in its union,
    and pixel accuracy is over all pixels. `miou_named` is that mean whatever the protocol says: ADE20K's 150
    classes out of one confusion matrix of 151.
    """

    name = "seg"
    title = "Segmentation"
    target = "label"
    metrics = (
        Metric("miou", "mIoU", higher_is_better=True, unit="%"),
        Metric("pixel_accuracy", "Pixel acc.", higher_is_better=True, unit="%"),
        Metric("boundary_iou", "Boundary IoU", higher_is_better=True, unit="%"),
        Metric("miou_named", "mIoU w/o other", higher_is_better=True, unit="%"),
    )
    primary = "miou"
    by_pixel = True
    headline = ("miou", "boundary_iou")
    # Twice the preset's: with 60, three times as many still moved mIoU by 0.4 points (docs/protocol.md).
    probe = {"epochs": 120}

    def outputs(self, dataset: Dataset, protocol: Protocol) -> int:
        """As many as the dataset has classes, "other" only where it is not ignored."""
        ignored = protocol.labels == "without_other" and dataset.other_class is not None
        return len(dataset.classes) - ignored

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean cross-entropy over the labelled pixels; 0 where there is none.

        Labels must be in the range of the outputs: PyTorch raises where one is not, on a GPU at a later time.
        """
        target = target.masked_fill(~valid, IGNORE)
        total = F.cross_entropy(prediction, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp(min=1)

    def counted(self, target: Tensor, valid: Tensor) -> Tensor:
        """See `ProbeTask.counted`: pixels with a label."""
        return valid & (target != IGNORE)

    def summed(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `ProbeTask.summed`: cross-entropy, whose slope is the softmax less 1 at the label."""
        kept = self.counted(target, valid).unsqueeze(1)
        label = target.unsqueeze(1).where(kept, 0)
        highest = prediction.amax(1, keepdim=True)
        chosen = prediction.gather(1, label).sub_(highest)
        total = prediction.sub_(highest).exp_().sum(1, keepdim=True)
        loss = chosen.neg_().add_(total.log()).where(kept, 0).sum(dtype=torch.float64)
        prediction.mul_(total.reciprocal_().where(kept, 0))
        prediction.scatter_add_(1, label, -kept.to(prediction.dtype))
        return loss

    def decode(self, prediction: Tensor) -> Tensor:
        """`[B, K, H, W]` logits to `[B, H, W]` classes, the first of equals."""
        return highest(prediction)

    def evaluator(self, dataset: Dataset, protocol: Protocol) -> Evaluator:
        """Accumulates one confusion matrix and the areas of boundary bands."""
        other = dataset.other_class if protocol.labels == "all" else None
        left_out = None if protocol.scoring.other else other
        return SegmentationEvaluator(self.outputs(dataset, protocol), left_out, other)


class SegmentationEvaluator(Evaluator):
    """See `Segmentation`. An image's own value is the mean IoU, in per cent, over the classes that it or its
    prediction shows.

    These values are for paired tests between methods; their mean is not the dataset's mIoU.
    """

    def __init__(self, num_classes: int, left_out: int | None = None, other: int | None = None) -> None:
        """Starts from nothing.

        Args:
            num_classes: K.
            left_out: A class whose IoU is not part of any mean.
            other: A class whose IoU is not part of `miou_named`.
        """
        self.num_classes = num_classes
        self.left_out = left_out
        self.other = other
        self.mask: Tensor | None = None  # `[3, K]`: see `LabelCounts`
        self.band: Tensor | None = None
        self.wrong: Tensor | None = None

    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        """See `Evaluator`: `[B, H, W]` classes."""
        target = truth.target("label").masked_fill(~truth.valid, IGNORE)
        counts = label_counts(prediction, target, self.num_classes)
        mask, band = counts.mask.sum(0), counts.band.sum(0)
        self.mask = mask if self.mask is None else self.mask + mask
        self.band = band if self.band is None else self.band + band
        self.wrong = counts.wrong if self.wrong is None else self.wrong | counts.wrong
        return 100 * mean_iou_of_images(areas_of_counts(counts.mask), self.left_out)

    def compute(self) -> dict[str, float]:
        """See `Evaluator`; in per cent.

        Raises:
            UpbenchError: A label or a predicted class that counts was out of range.
        """
        if self.mask is None or self.band is None or self.wrong is None:
            return {metric.name: math.nan for metric in Segmentation.metrics}
        mask, band, wrong = self.mask.cpu(), self.band.cpu(), bool(self.wrong)
        if wrong:
            raise UpbenchError(
                f"a label or a predicted class is out of range: {self.num_classes} classes are numbered "
                f"0 to {self.num_classes - 1}"
            )
        right, labelled = int(mask[INTERSECTION].sum()), int(mask[TARGET].sum())
        return {
            "miou": 100 * mean_iou(areas_of_counts(mask), self.left_out),
            "pixel_accuracy": 100 * (right / labelled) if labelled else math.nan,
            "boundary_iou": 100 * mean_iou(areas_of_counts(band), self.left_out),
            "miou_named": 100 * mean_iou(areas_of_counts(mask), self.other),
        }


def highest(prediction: Tensor) -> Tensor:
    """`[B, H, W]` int64: `prediction.argmax(1)` of `[B, K, H, W]`, on a CPU in a fifth of its time.

    PyTorch walks through the classes of one pixel after the other; maximum and comparison go through all
    pixels of a class, in pieces that stay in a processor's cache.
    """
    b, k, h, w = prediction.shape
    if prediction.device.type != "cpu" or prediction.dtype != torch.float32:
        return prediction.argmax(1)
    found = torch.empty(b, h, w, dtype=torch.int64)
    ranks = torch.arange(k, 0, -1, dtype=torch.float32).view(-1, 1, 1)  # the first of equals has the highest
    for image, rows in _pieces(prediction):
        part = prediction[image, :, rows]
        at_top = torch.eq(part, part.amax(0), out=torch.empty_like(part))
        found[image, rows] = k - at_top.mul_(ranks).amax(0).long()
    return found.clamp_(max=k - 1)  # nan is nowhere the highest


def _pieces(prediction: Tensor) -> Iterator[tuple[int, slice]]:
    """Blocks of rows of each image, of some hundred thousand elements."""
    b, k, h, w = prediction.shape
    rows = max(1, _PIECE // max(1, k * w))
    for image in range(b):
        for top in range(0, h, rows):
            yield image, slice(top, top + rows)
