"""Surface normals by a linear probe."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Evaluator, Metric, Truth
from upbench.errors import UpbenchError
from upbench.evaluate.objectives import angular_likelihood
from upbench.evaluate.task import ProbeTask
from upbench.metrics._common import mean
from upbench.metrics.normals import (
    ANGLE_THRESHOLDS,
    IMAGE_METRICS,
    IMAGE_THRESHOLDS,
    AngleTotals,
    angle_metrics,
    angle_name,
    angle_totals_of_images,
    image_values,
)
from upbench.ops.resample import resize

_TINY = 1e-12  # keeps the gradient of the norm finite where prediction and target are parallel


class Normals(ProbeTask):
    """A unit vector for every pixel in camera space: three channels, only their direction counts.

    The loss is the mean angle. Metrics are over all valid pixels of the split, pooled (Bae et al. 2021,
    section 4); those that begin with "image" are means over images of each image's own, as in probe3d.

    Protocols that follow probe3d (`Protocol.objective`) have a fourth output, the concentration, and the
    likelihood of Bae et al. as the loss.
    """

    name = "normals"
    title = "Normals"
    target = "normal"
    metrics = (
        Metric("mean", "Mean", higher_is_better=False, unit="deg"),
        Metric("median", "Median", higher_is_better=False, unit="deg"),
        Metric("rmse", "RMSE", higher_is_better=False, unit="deg"),
        *(Metric(angle_name(t), f"< {t:g} deg", higher_is_better=True, unit="%") for t in ANGLE_THRESHOLDS),
        Metric("image_rmse", "Image RMSE", higher_is_better=False, unit="deg"),
        *(
            Metric(f"image_under_{t:g}", f"Image < {t:g} deg", higher_is_better=True, unit="%")
            for t in IMAGE_THRESHOLDS
        ),
    )
    primary = "mean"
    probe = {"weight_decay": 1.0, "shrinkage": 10.0}
    headline: ClassVar[Sequence[str]] = ("mean", "under_11.25")

    def __init__(self, likelihood: bool = False) -> None:
        """Args: likelihood: Whether the spread of the normals is predicted and trained, too."""
        self.likelihood = likelihood

    def under(self, protocol: Protocol) -> Normals:
        """See `Task.under`."""
        if not protocol.objective.startswith("probe3d"):
            return self
        other = copy.copy(self)
        other.likelihood, other.headline = True, IMAGE_METRICS  # type: ignore[misc]
        return other

    def outputs(self, dataset: Dataset, protocol: Protocol) -> int:
        """Three: x, y, z; and the concentration where it is trained."""
        return 4 if self.likelihood else 3

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Mean angle in radians over the valid pixels; 0 where there is none.

        The arc tangent of |p x t| over p . t rather than the arc cosine of the normalised product, whose
        gradient has a pole at both ends.
        """
        valid = valid & (target != 0).any(1)
        if self.likelihood:
            return angular_likelihood(prediction, target, valid)
        sine = (torch.linalg.cross(prediction, target, dim=1).square().sum(1) + _TINY).sqrt()
        angle = torch.atan2(sine, (prediction * target).sum(1))
        return torch.where(valid, angle, 0).sum() / valid.sum().clamp(min=1)

    def decode(self, prediction: Tensor) -> Tensor:
        """`[B, 3, H, W]` directions."""
        return prediction[:, :3]

    def enlarged(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        """See `ProbeTask.enlarged`: bicubic, as in probe3d."""
        return answer if tuple(answer.shape[-2:]) == size else resize(answer, size, "bicubic")

    def evaluator(self, dataset: Dataset, protocol: Protocol) -> Evaluator:
        """Pools the angles of all images."""
        return NormalsEvaluator()


class NormalsEvaluator(Evaluator):
    """See `Normals`. An image's own value is its mean angle in degrees."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # `[B, 3]` each; added up at the end, so that batches play no part in it
        self.images: list[Tensor] = []  # `[B, 4]` each
        self.under: Tensor | None = None
        self.histogram: Tensor | None = None
        self.wrong: Tensor | None = None

    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        """See `Evaluator`: `[B, 3, H, W]` vectors of any length."""
        totals, wrong = angle_totals_of_images(prediction, truth.target("normal"), truth.valid)
        self.sums.append(totals.sums)
        self.images.append(image_values(totals))
        under = totals.under.sum(0)
        self.under = under if self.under is None else self.under + under
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
        each = torch.cat(self.images).cpu().unbind(1)
        values.update({name: mean(column) for name, column in zip(IMAGE_METRICS, each, strict=True)})
        return {m.name: values[m.name] * (100 if m.unit == "%" else 1) for m in Normals.metrics}
