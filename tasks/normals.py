"""Surface normals by a linear probe."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Evaluator, Metric, Truth
from upbench.errors import UpbenchError
from upbench.evaluate.task import ProbeTask
from upbench.metrics.normals import (
    ANGLE_THRESHOLDS,
    AngleTotals,
    angle_metrics,
    angle_name,
    angle_totals_of_images,
)

_TINY = 1e-12  # keeps the gradient of the norm finite where prediction and target are parallel


class Normals(ProbeTask):
    """A unit vector for every pixel in camera space: three channels, only their direction counts.

    The loss is the mean angle. Metrics are over all valid pixels of the split, pooled (Bae et al. 2021,
    section 4).
    """

    name = "normals"
    title = "Normals"
    target = "normal"
    metrics = (
        Metric("mean", "Mean", higher_is_better=False, unit="deg"),
        Metric("median", "Median", higher_is_better=False, unit="deg"),
        Metric("rmse", "RMSE", higher_is_better=False, unit="deg"),
        *(Metric(angle_name(t), f"< {t:g} deg", higher_is_better=True, unit="%") for t in ANGLE_THRESHOLDS),
    )
    primary = "mean"
    probe = {"weight_decay": 1.0, "shrinkage": 10.0}
    headline = ("mean", "under_11.25")

    def outputs(self, dataset: Dataset, protocol: Protocol) -> int:
        """Three: x, y, z."""
        return 3

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean angle in radians over the valid pixels; 0 where there is none.

        The arc tangent of |p x t| over p . t rather than the arc cosine of the normalised product, whose
        gradient has a pole at both ends.
        """
        valid = valid & (target != 0).any(1)
        sine = (torch.linalg.cross(prediction, target, dim=1).square().sum(1) + _TINY).sqrt()
        angle = torch.atan2(sine, (prediction * target).sum(1))
        return torch.where(valid, angle, 0).sum() / valid.sum().clamp(min=1)

    def evaluator(self, dataset: Dataset, protocol: Protocol) -> Evaluator:
        """Pools the angles of all images."""
        return NormalsEvaluator()


class NormalsEvaluator(Evaluator):
    """See `Normals`. An image's own value is its mean angle in degrees."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # `[B, 3]` each; added up at the end, so that batches play no part in it
        self.under: Tensor | None = None
        self.histogram: Tensor | None = None
        self.wrong: Tensor | None = None

    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        """See `Evaluator`: `[B, 3, H, W]` vectors of any length."""
        totals, wrong = angle_totals_of_images(prediction, truth.target("normal"), truth.valid)
        self.sums.append(totals.sums)
        self.under = totals.under if self.under is None else self.under + totals.under
        self.histogram = totals.histogram if self.histogram is None else self.histogram + totals.histogram
        self.wrong = wrong if self.wrong is None else self.wrong | wrong
        return totals.sums[:, 1] / totals.sums[:, 0]

    def compute(self) -> dict[str, float]:
        """See `Evaluator`; angles in degrees, fractions of pixels in per cent.

        Raises:
            UpbenchError: A prediction was not finite where it counts.
        """
        if self.under is None or self.histogram is None or self.wrong is None:
            return {metric.name: math.nan for metric in Normals.metrics}
        if bool(self.wrong):
            raise UpbenchError("predicted normals are not finite")
        images = torch.cat(self.sums).cpu()
        sums = sum(images[1:], images[0])  # one after the other
        values = angle_metrics(AngleTotals(sums, self.under.cpu(), self.histogram.cpu()))
        return {m.name: values[m.name] * (100 if m.unit == "%" else 1) for m in Normals.metrics}
