"""Surface normals by a linear probe."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.contracts.task import Evaluator, Metric, Task
from upbench.metrics import normals as M

_TINY = 1e-12  # keeps the gradient of the norm finite where prediction and target are parallel


class Normals(Task):
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
        *(
            Metric(M.angle_name(t), f"< {t:g} deg", higher_is_better=True, unit="%")
            for t in M.ANGLE_THRESHOLDS
        ),
    )
    primary = "mean"
    probe = {"weight_decay": 1.0, "shrinkage": 10.0}
    headline = ("mean", "under_11.25")

    def probe_channels(self, dataset: Dataset) -> int:
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

    def evaluator(self, dataset: Dataset) -> Evaluator:
        """Pools the angles of all images."""
        return NormalsEvaluator()


class NormalsEvaluator(Evaluator):
    """See `Normals`. An image's own value is its mean angle in degrees."""

    def __init__(self) -> None:
        self.totals: M.AngleTotals | None = None

    def update(self, prediction: Tensor, sample: Sample) -> float:
        """See `Evaluator`."""
        assert sample.normal is not None
        totals = M.angle_totals(prediction, sample.normal, sample.valid)
        self.totals = totals if self.totals is None else self.totals + totals
        return M.angle_metrics(totals)["mean"]

    def compute(self) -> dict[str, float]:
        """See `Evaluator`; angles in degrees, shares in per cent."""
        if self.totals is None:
            return {metric.name: math.nan for metric in Normals.metrics}
        values = M.angle_metrics(self.totals)
        return {m.name: values[m.name] * (100 if m.unit == "%" else 1) for m in Normals.metrics}
