"""Semantic segmentation by a linear probe."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.contracts.task import Evaluator, Metric, Task
from upbench.errors import UpbenchError
from upbench.metrics import segmentation as M


class Segmentation(Task):
    """A class for every pixel: one logit per class, cross-entropy, 255 ignored.

    mIoU is of one confusion matrix over the split, and equals MMSegmentation's `IoUMetric`; boundary IoU
    (Cheng et al. 2021) is the mean over classes of the boundary bands' areas over the split.
    """

    name = "seg"
    title = "Segmentation"
    target = "label"
    metrics = (
        Metric("miou", "mIoU", higher_is_better=True, unit="%"),
        Metric("pixel_accuracy", "Pixel acc.", higher_is_better=True, unit="%"),
        Metric("boundary_iou", "Boundary IoU", higher_is_better=True, unit="%"),
    )
    primary = "miou"
    headline = ("miou", "boundary_iou")
    # Twice the preset's: with 60, three times as many still moved mIoU by 0.4 points (docs/protocol.md).
    probe = {"epochs": 120}

    def probe_channels(self, dataset: Dataset) -> int:
        """As many as the dataset has classes."""
        return len(dataset.classes)

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean cross-entropy over the labelled pixels; 0 where there is none.

        Raises:
            UpbenchError: Labels out of the range of the probe's classes.
        """
        target = target.masked_fill(~valid, IGNORE)
        labelled = target[target != IGNORE]
        if labelled.numel() and not 0 <= int(labelled.min()) <= int(labelled.max()) < prediction.shape[1]:
            raise UpbenchError(
                f"labels {int(labelled.min())} to {int(labelled.max())} are out of range: "
                f"the dataset names {prediction.shape[1]} classes"
            )
        total = F.cross_entropy(prediction, target, ignore_index=IGNORE, reduction="sum")
        return total / max(1, labelled.numel())

    def evaluator(self, dataset: Dataset) -> Evaluator:
        """Accumulates one confusion matrix and the areas of boundary bands."""
        return SegmentationEvaluator(len(dataset.classes))


class SegmentationEvaluator(Evaluator):
    """See `Segmentation`. An image's own value is the mean IoU over the classes that it or its prediction
    shows.

    These values are for paired tests between methods; their mean is not the dataset's mIoU.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.confusion: Tensor | None = None
        self.boundary: Tensor | None = None

    def update(self, prediction: Tensor, sample: Sample) -> float:
        """See `Evaluator`."""
        assert sample.label is not None
        target = sample.label.masked_fill(~sample.valid, IGNORE)
        labels = prediction.argmax(0)
        confusion = M.confusion_matrix(labels, target, self.num_classes)
        boundary = M.boundary_areas(labels, target, self.num_classes)
        self.confusion = confusion if self.confusion is None else self.confusion + confusion
        self.boundary = boundary if self.boundary is None else self.boundary + boundary
        return 100 * M.mean_iou(M.areas(confusion))

    def compute(self) -> dict[str, float]:
        """See `Evaluator`; in per cent."""
        if self.confusion is None or self.boundary is None:
            return {metric.name: math.nan for metric in Segmentation.metrics}
        return {
            "miou": 100 * M.mean_iou(M.areas(self.confusion)),
            "pixel_accuracy": 100 * M.pixel_accuracy(self.confusion),
            "boundary_iou": 100 * M.mean_iou(self.boundary),
        }
