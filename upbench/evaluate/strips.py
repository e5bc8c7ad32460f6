"""The loss of a step and its gradient, a strip of rows at a time: for losses that are means over pixels.

K outputs of every pixel are the largest tensor of a training. Where each pixel's loss depends on its own
outputs only, none of them need ever exist together: a strip of rows is upsampled, its losses and their slope
are computed where it lies in a cache, and the slope goes straight back to the low-resolution outputs.

    W f  ──upsampling──►  strip  ──►  losses, slope  ──upsampling, transposed──►  slope of W f
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor

from upbench.contracts.operator import FunctionOperator, Operator
from upbench.contracts.task import DenseBatch, Truth
from upbench.dense.project import Part, project_each
from upbench.dense.view import Batch

STRIP_BYTES = 1 << 20
"""Outputs of a strip: what stays in the cache of a core."""

WORTH_BYTES = 1 << 23
"""Outputs of a step below which they are computed at once."""


class ByPixel(Interface):
    """What is asked of a task (`upbench.evaluate.task.ProbeTask`)."""

    @property
    def target(self) -> str: ...

    def counted(self, target: Tensor, valid: Tensor) -> Tensor: ...

    def summed(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Owners:
    """Whose outputs they are.

    Attributes:
        seeds: S; the outputs of every frame are those of S seeds, one after the other.
        frames: The loss that each frame counts in; where S is 1. All count in one where empty.
    """

    seeds: int = 1
    frames: tuple[int, ...] = ()

    @property
    def losses(self) -> int:
        """How many losses there are."""
        return max(self.frames) + 1 if self.frames else self.seeds


def by_pixel(task: object) -> bool:
    """Whether a task's loss can be computed a part of the pixels at a time: its class says so, and the loss
    is the one that `summed` adds up, not that of a subclass which knows nothing of it."""
    if not getattr(task, "by_pixel", False):
        return False
    order = type(task).__mro__
    summed, loss = (next(n for n, c in enumerate(order) if name in vars(c)) for name in ("summed", "loss"))
    return summed <= loss


def worth_it(batch: DenseBatch, outputs: int) -> bool:
    """Whether a step's outputs are computed in strips: on a CPU, where there are many.

    Args: batch: Of the step; outputs: K of every frame, all seeds together.
    """
    if not isinstance(batch, Batch) or batch.split.call.device.type != "cpu":
        return False
    sizes = {part.size for part in batch.parts}
    if len(sizes) != 1 or any(_whole_only(part.view) for part in batch.parts):
        return False
    ((height, width),) = sizes
    return 4 * len(batch) * outputs * height * width > WORTH_BYTES


def _whole_only(view: Operator | Tensor) -> bool:
    """Whether each of its crops would compute the whole."""
    return isinstance(getattr(view, "operator", view), FunctionOperator)


def loss_in_strips(
    task: ByPixel, batch: DenseBatch, truth: Truth, weight: Tensor, bias: Tensor, owners: Owners
) -> Tensor:
    """Mean losses over the pixels that count; differentiable with respect to weight and bias.

    Args:
        task: Gives the losses.
        batch: The frames, B of them.
        truth: Theirs.
        weight: `[K, C]`, or `[B, K, C]`; K of all seeds together.
        bias: `[K]`, or `[B, K]`.
        owners: Whose outputs they are.

    Returns:
        One for each owner; 0 where no pixel counts.
    """
    assert isinstance(batch, Batch)
    losses: Tensor = _InStrips.apply(task, batch, truth, weight, bias, owners)
    return losses


class _InStrips(torch.autograd.Function):
    """Computes the slopes along with the losses, as the outputs are there only once."""

    @staticmethod
    def forward(
        ctx: Any, task: ByPixel, batch: Batch, truth: Truth, weight: Tensor, bias: Tensor, owners: Owners
    ) -> Tensor:
        count = len(batch)
        target, valid = truth.target(task.target), truth.valid
        each = weight if weight.ndim == 3 else weight.expand(count, *weight.shape)
        biases = bias if bias.ndim == 2 else bias.expand(count, *bias.shape)
        slopes, of_bias = each.new_zeros(each.shape), biases.new_zeros(biases.shape)
        sums = torch.zeros(count, owners.seeds, dtype=torch.float64)
        for part in batch.parts:
            places = list(part.places)
            staged = _Staged(part, torch.stack([each[place] for place in places]))
            own = torch.stack([biases[place] for place in places])[:, :, None, None]
            outputs = int(each.shape[1]) // owners.seeds
            for seeds, rows in _strips(part, outputs, owners.seeds):
                which = slice(seeds.start * outputs, seeds.stop * outputs)
                made = staged.outputs(rows, which)
                prediction = made.detach() + own[:, which]
                for row, place in enumerate(places):
                    seen = target[place, ..., rows, :][None], valid[place, rows][None]
                    for seed, of_seed in zip(seeds, prediction[row].split(outputs), strict=True):
                        sums[place, seed] += task.summed(of_seed[None], *seen)
                    of_bias[place, which] += prediction[row].sum((1, 2))
                staged.add(made, prediction)
            for row, slope in enumerate(staged.slope()):
                slopes[places[row]] = slope
        counts = task.counted(target, valid).flatten(1).sum(1)
        frames = owners.frames or (0,) * count
        total = torch.zeros(max(frames) + 1, dtype=torch.int64)
        for place, frame in enumerate(frames):
            total[frame] += counts[place]
        share = torch.stack([1.0 / total[frame].clamp(min=1) for frame in frames])  # [B]
        if owners.frames:
            losses = torch.zeros(owners.losses, dtype=torch.float64)
            losses.index_add_(0, torch.tensor(frames), sums[:, 0] * share)
        else:
            losses = (sums * share[:, None]).sum(0)
        slopes *= share[:, None, None]
        of_bias *= share[:, None]
        ctx.owners = owners
        ctx.save_for_backward(
            slopes if weight.ndim == 3 else slopes.sum(0), of_bias if bias.ndim == 2 else of_bias.sum(0)
        )
        return losses.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor, Tensor, None]:
        slopes, of_bias = ctx.saved_tensors
        owners: Owners = ctx.owners
        if owners.frames:
            factor = grads[0][torch.tensor(owners.frames)]  # [B]
            return None, None, None, slopes * factor[:, None, None], of_bias * factor[:, None], None
        outputs = slopes.shape[-2] // owners.seeds
        factor = grads[0].repeat_interleave(outputs)  # [K]
        return None, None, None, slopes * factor[:, None], of_bias * factor, None


class _Staged:
    """A part whose probe was applied to the low-resolution features once, for strips of its output."""

    def __init__(self, part: Part, weight: Tensor) -> None:
        """Args: part: The frames; weight: `[b, K, C]` theirs."""
        self.part = part
        self.weight = weight.detach().requires_grad_()
        self.low: Tensor | None = None
        if isinstance(part.view, Operator):
            features = part.view.takes(part.features)
            with torch.enable_grad():
                self.low = project_each(self.weight, features, part.view.groups)
            self.grad = torch.zeros_like(self.low, requires_grad=False)
        else:
            self.grad = torch.zeros_like(weight)
        self._own = self.weight
        self._at: tuple[slice, ...] = ()

    def outputs(self, rows: slice, which: slice) -> Tensor:
        """`[b, k, r, W]` without bias, with a graph that ends at the strip's own low-resolution outputs.

        Args: rows: Of the output; which: k of the K outputs.
        """
        view = self.part.view
        if isinstance(view, Operator):
            assert self.low is not None
            top, left, inner = view.crop(rows, slice(0, self.part.size[1])).narrowed()
            self._at = (slice(None), slice(None), which, top, left)
            self._own = self.low.detach()[self._at].requires_grad_()
            with torch.enable_grad():
                return inner(self._own)
        self._at = (slice(None), which)
        self._own = self.weight.detach()[self._at].requires_grad_()
        strip = view[..., rows, :].to(self.weight.dtype)
        with torch.enable_grad():
            made: Tensor = (self._own @ strip.flatten(2)).unflatten(2, strip.shape[2:])
        return made

    def add(self, made: Tensor, slope: Tensor) -> None:
        """Takes the slope of the strip that was asked for last."""
        (found,) = torch.autograd.grad((made,), (self._own,), (slope,))
        self.grad[self._at] += found

    def slope(self) -> Tensor:
        """`[b, K, C]` of the weights."""
        if self.low is None:
            return self.grad
        (found,) = torch.autograd.grad((self.low,), (self.weight,), (self.grad,))
        return found


def _strips(part: Part, outputs: int, seeds: int) -> Iterator[tuple[range, slice]]:
    """Seeds and rows that are computed together: whole rows of low-resolution cells for operators.

    Args: part: The frames; outputs: K of a seed; seeds: How many there are.
    """
    height, width = part.size
    cell = 1
    if isinstance(part.view, Operator):
        cell = max(1, round(height / int(part.features.shape[-2])))
    cells = STRIP_BYTES // (4 * len(part.places) * outputs * width * cell)  # of all seeds together
    together = min(seeds, max(1, cells))
    rows = max(1, cells // together) * cell
    for first in range(0, seeds, together):
        for top in range(0, height, rows):
            yield range(first, min(first + together, seeds)), slice(top, min(top + rows, height))


def owners_of(counts: Sequence[int]) -> Owners:
    """Frames of several seeds in one batch, so many of each, one seed after the other."""
    return Owners(1, tuple(seed for seed, count in enumerate(counts) for _ in range(count)))
