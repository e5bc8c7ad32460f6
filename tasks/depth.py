"""Monocular depth by a linear probe to bins."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Evaluator, Metric, Truth
from upbench.errors import UpbenchError
from upbench.evaluate.objectives import DEPTH, DepthObjective
from upbench.evaluate.task import ProbeTask
from upbench.metrics.depth import (
    ALIGNED_METRICS,
    DEPTH_METRICS,
    aligned_values,
    depth_values,
    mean_of_values,
)

BINS = 256
MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0
FLOOR = 0.1
"""Added to every bin's activation, so that no pixel is without a depth and no gradient is divided by 0."""

_PIECE = 2**20  # elements

SIGLOSS_WEIGHT, GRADIENT_WEIGHT = 10.0, 0.5
VARIANCE_FOCUS = 0.85
SCALES = 4


class Depth(ProbeTask):
    """Depth in metres: 256 bins from 1 mm to 10 m, evenly spaced, weighted by a linear probe's outputs.

    The depth of a pixel is sum(r b) / sum(r) with b the bins' centres and r = relu(z) + 0.1 of the probe's
    outputs z (the "linear" normalisation of AdaBins' successors and of DINOv2's depth heads). The loss is
    10 times the scale-invariant loss of Eigen et al. 2014 plus 0.5 times the multi-scale gradient loss of
    Li and Snavely 2018, the weights of probe3d. Metrics are per image and averaged over images, as there
    and in JAFAR; "aligned" ones after scale and shift of each image's prediction were fitted to its truth.

    Protocols that follow a paper (`Protocol.objective`) have its bins, the first at 1 mm and the last at
    10 m, its losses (`upbench.evaluate.objectives`) and its range of depths that count.
    """

    name = "depth"
    title = "Depth"
    target = "depth"
    metrics = (
        Metric("rmse", "RMSE", higher_is_better=False, unit="m"),
        Metric("delta1", "delta1", higher_is_better=True, unit="%"),
        Metric("delta2", "delta2", higher_is_better=True, unit="%"),
        Metric("delta3", "delta3", higher_is_better=True, unit="%"),
        Metric("absrel", "AbsRel", higher_is_better=False),
        Metric("log10", "log10", higher_is_better=False),
        Metric("silog", "SILog", higher_is_better=False),
        Metric("rmse_edge", "Edge RMSE", higher_is_better=False, unit="m"),
        Metric("rmse_aligned", "Aligned RMSE", higher_is_better=False, unit="m"),
        Metric("delta1_aligned", "Aligned delta1", higher_is_better=True, unit="%"),
        Metric("delta2_aligned", "Aligned delta2", higher_is_better=True, unit="%"),
        Metric("delta3_aligned", "Aligned delta3", higher_is_better=True, unit="%"),
    )
    primary = "rmse"
    headline: ClassVar[Sequence[str]] = ("rmse", "delta1", "rmse_edge")
    probe = {"epochs": 30, "batch_size": 4, "lr": 0.03, "weight_decay": 0.1, "shrinkage": 10.0}

    def __init__(self, objective: DepthObjective | None = None) -> None:
        """Args: objective: A paper's; the project's own by default."""
        self.objective = objective
        self.step = 0

    def under(self, protocol: Protocol) -> Depth:
        """See `Task.under`."""
        if protocol.objective not in DEPTH:
            return self
        other = copy.copy(self)
        other.objective = DEPTH[protocol.objective]
        other.headline = ("rmse", "delta1", "rmse_aligned", "delta1_aligned")  # type: ignore[misc]
        return other

    def outputs(self, dataset: Dataset, protocol: Protocol) -> int:
        """One per bin."""
        return BINS

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """10 times the scale-invariant loss over all valid pixels, plus 0.5 times the gradient loss, or the
        paper's; see `loss_of_answer`."""
        return self.loss_of_answer(self.decode(prediction), target, valid)

    def answer(self, prediction: Tensor) -> Tensor:
        """See `ProbeTask.answer`: metres."""
        return self.decode(prediction)

    def decode_answer(self, answer: Tensor) -> Tensor:
        """See `ProbeTask.answer`."""
        return answer

    def loss_of_answer(self, answer: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `ProbeTask.answer`. Pixels whose depth is not between 1 mm and 10 m carry none."""
        if self.objective is not None:
            return self.objective.loss(answer, target, valid, MAX_DEPTH, self.step)
        valid = valid & (target >= MIN_DEPTH) & (target <= MAX_DEPTH)
        log = answer.log() - target.clamp(min=MIN_DEPTH).log()
        return SIGLOSS_WEIGHT * scale_invariant_loss(log, valid) + GRADIENT_WEIGHT * gradient_loss(log, valid)

    def at_step(self, number: int) -> None:
        """See `ProbeTask.at_step`: a paper's first steps have another loss."""
        self.step = number

    def decode(self, prediction: Tensor) -> Tensor:
        """`[B, 256, H, W]` outputs to `[B, H, W]` metres."""
        return depth_from_bins(prediction, ends=self.objective is not None)

    def evaluator(self, dataset: Dataset, protocol: Protocol) -> Evaluator:
        """Averages per-image metrics."""
        return DepthEvaluator(self.objective or DepthObjective())


class DepthEvaluator(Evaluator):
    """See `Depth`. An image's own value is its RMSE in metres. Pixels beyond 10 m count nowhere."""

    def __init__(self, objective: DepthObjective | None = None) -> None:
        """Args: objective: Says which depths count."""
        self.objective = objective or DepthObjective()
        self.images: list[Tensor] = []  # `[B, metrics]` each
        self.wrong: Tensor | None = None

    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        """See `Evaluator`: `[B, H, W]` metres."""
        depth = truth.target("depth")
        valid = self.objective.scored(depth, truth.valid, MAX_DEPTH)
        values, wrong = depth_values(prediction, depth, valid)
        aligned, _ = aligned_values(prediction, depth, valid)
        self.images.append(torch.cat([values, aligned], 1))
        self.wrong = wrong if self.wrong is None else self.wrong | wrong
        return values[:, DEPTH_METRICS.index(Depth.primary)]

    def compute(self) -> dict[str, float]:
        """See `Evaluator`; lengths in metres, deltas in per cent.

        Raises:
            UpbenchError: A predicted depth was not finite where it counts.
        """
        if self.wrong is None:
            return {metric.name: math.nan for metric in Depth.metrics}
        if bool(self.wrong):
            raise UpbenchError("predicted depth is not finite")
        units = {metric.name: metric.unit for metric in Depth.metrics}
        names = (*DEPTH_METRICS, *ALIGNED_METRICS)
        scale = torch.tensor([100.0 if units[name] == "%" else 1.0 for name in names])
        values = mean_of_values(torch.cat(self.images).cpu() * scale, names)
        return {name: values[name] for name in units}


def depth_from_bins(prediction: Tensor, ends: bool = False) -> Tensor:
    """`[B, K, H, W]` outputs of the probe to `[B, H, W]` metres.

    Args:
        prediction: The outputs.
        ends: Whether the first bin stands for the least depth and the last for the largest, as in probe3d and
            JAFAR; by default bins stand for their centres.
    """
    index = torch.arange(prediction.shape[1], dtype=prediction.dtype, device=prediction.device)
    if ends:
        place = MIN_DEPTH + (MAX_DEPTH - MIN_DEPTH) / (prediction.shape[1] - 1) * index
    else:
        place = MIN_DEPTH + (MAX_DEPTH - MIN_DEPTH) / prediction.shape[1] * (index + 0.5)
    depth: Tensor = _BinAverage.apply(prediction, place)
    return depth


class _BinAverage(torch.autograd.Function):
    """sum_k r_k b_k / sum_k r_k with r = relu(z) + FLOOR, in as few passes over z as there can be.

    The probe's output at K = 256 is the largest tensor of the training. Written out, the formula keeps
    four copies of it for the backward pass and walks through ten. This keeps z alone, works through it in
    pieces that stay in a CPU's cache, and masks the gradient in place. In which order the bins of a pixel are
    added up is the matrix product's business: rounding may differ between pieces of different sizes.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, centres: Tensor) -> Tensor:
        basis = torch.stack([centres, torch.ones_like(centres)])
        sums = _active_sums(z, basis) + FLOOR * basis.sum(1)[:, None, None]
        depth = sums[:, :1] / sums[:, 1:]
        ctx.save_for_backward(z, basis, depth, sums[:, 1:])
        return depth.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, basis, depth, total = ctx.saved_tensors
        scaled = grads[0].unsqueeze(1) / total  # the derivative by an active r_k is (b_k - depth) / sum(r)
        grad = (basis.T @ torch.cat([scaled, -scaled * depth], 1).flatten(2)).view_as(z)
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad), None


def _active_sums(z: Tensor, basis: Tensor) -> Tensor:
    """`[B, 2, H, W]`: `basis` (`[2, K]`) times relu(z)."""
    b, k, h, w = z.shape
    if z.device.type != "cpu":
        return (basis @ z.clamp(min=0).flatten(2)).view(b, 2, h, w)
    sums = z.new_empty(b, 2, h, w)
    rows = min(h, max(1, _PIECE // max(1, k * w)))
    active = z.new_empty(k, rows, w)
    for image in range(b):
        for top in range(0, h, rows):
            part = z[image, :, top : top + rows]
            piece = active if part.shape[1] == rows else active[:, : part.shape[1]].contiguous()
            torch.clamp(part, min=0, out=piece)
            sums[image, :, top : top + rows] = (basis @ piece.flatten(1)).view(2, -1, w)
    return sums


def scale_invariant_loss(log: Tensor, valid: Tensor) -> Tensor:
    """Square root of mean(g^2) - 0.85 mean(g)^2 over valid pixels, g the difference of logarithms `log`.

    Args:
        log: `[B, H, W]` ln prediction - ln target.
        valid: `[B, H, W]` bool.

    Returns:
        Scalar (Eigen et al. 2014, eq. 4; the square root and 0.85 as in AdaBins, eq. 2); 0 where nothing
        is valid.
    """
    count = valid.sum().clamp(min=1)
    g = torch.where(valid, log, 0)
    squared = g.square().sum() / count - VARIANCE_FOCUS * (g.sum() / count).square()
    return (squared.clamp(min=0) + 1e-8).sqrt()


def gradient_loss(log: Tensor, valid: Tensor) -> Tensor:
    """Mean absolute difference of `log` between neighbours, summed over directions and four scales.

    Args:
        log: `[B, H, W]` ln prediction - ln target.
        valid: `[B, H, W]` bool; both neighbours must be.

    Returns:
        Scalar (Li and Snavely, CVPR 2018, eq. 4; scale s keeps every 2^s-th row and column); 0 where nothing
        is valid. Its second derivative is not defined.
    """
    loss: Tensor = _GradientLoss.apply(log, valid)
    return loss


class _GradientLoss(torch.autograd.Function):
    """The gradient of a sum of absolute values is made of signs, and is added up along with the values."""

    @staticmethod
    def forward(ctx: Any, log: Tensor, valid: Tensor) -> Tensor:
        total = log.new_zeros(())
        slope = torch.zeros_like(log)
        for step in (2**scale for scale in range(SCALES)):
            g, mask, at = (part[:, ::step, ::step] for part in (log, valid, slope))
            count = mask.sum().clamp(min=1)
            for axis in (1, 2):
                n = g.shape[axis] - 1
                if n < 1:
                    continue
                both = mask.narrow(axis, 0, n) & mask.narrow(axis, 1, n)
                difference = torch.where(both, g.narrow(axis, 1, n) - g.narrow(axis, 0, n), 0)
                total = total + difference.abs().sum() / count
                signs = difference.sign_() / count
                at.narrow(axis, 1, n).add_(signs)
                at.narrow(axis, 0, n).sub_(signs)
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None
