"""Training of linear probes: the same for every method and task, all seeds in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor

from upbench.contracts.protocol import Recipe
from upbench.contracts.task import DenseBatch, DenseFeatures, Images, Truth
from upbench.dense.untouched import Untouched
from upbench.errors import UpbenchError
from upbench.evaluate.batches import Shown, streams
from upbench.evaluate.conditioning import Conditioning, learning_rate_scale
from upbench.evaluate.schedule import learning_rate_factor, training_steps
from upbench.evaluate.strips import Owners, by_pixel, loss_in_strips, owners_of, worth_it
from upbench.features.moments import Moments
from upbench.system.ahead import ahead
from upbench.system.progress import Bar

_INITIAL_STD = 0.01
_CHECK_EVERY = 50
"""Steps between two looks at the losses: each look waits for the device."""
_TOGETHER_BYTES = {"cpu": 8_000_000}
_TOGETHER_BYTES_ELSEWHERE = 600_000_000
"""Outputs of a step beyond which seeds go through it one after the other: on a CPU what its cache serves
well, elsewhere what leaves memory for the rest."""
_AHEAD = 4
_FRAMES_AHEAD = 96
"""Steps whose images are read while an earlier one is computed, and how many images these may be."""
_READERS = 2

Tokens = Callable[[Sequence[int]], Tensor]
"""Indices of frames to their class tokens, `[B, C']`."""


@dataclass(frozen=True)
class Probe:
    """A trained 1x1 convolution on the method's own features.

    Attributes:
        weight: `[K, C]` float32.
        bias: `[K]` float32.
        loss: Mean training loss over the last tenth of the steps.
        steps: Number of steps.
        token_weight: `[K, C']` for the class token, of heads that see it.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    steps: int
    token_weight: Tensor | None = None

    def outputs(self, batch: DenseBatch, tokens: Tensor | None = None) -> Tensor:
        """`[B, K, H, W]` of some frames; `tokens`: `[B, C']` theirs, for a probe that sees them."""
        bias = self.bias
        if self.token_weight is not None:
            assert tokens is not None
            bias = bias + tokens @ self.token_weight.T
        return batch.project(self.weight, bias)


@dataclass(frozen=True)
class View:
    """A method's view of some frames.

    Attributes:
        images: The frames, with their ground truth.
        dense: The method's features of them.
        tokens: Their class tokens, for recipes that use them.
    """

    images: Images
    dense: DenseFeatures
    tokens: Tokens | None = None


@dataclass(frozen=True)
class TrainingSet:
    """What probes are trained on.

    Attributes:
        plain: The frames.
        channels: C of the features.
        moments: Gives those of the low-resolution features, for recipes with conditioning.
        mirrored: Gives the frames with left and right exchanged, for recipes with flips.
        device: Where to compute.
    """

    plain: View
    channels: int
    moments: Callable[[], Moments]
    mirrored: Callable[[], View] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def view(self, flipped: bool) -> View:
        """The frames, mirrored or not."""
        if not flipped:
            return self.plain
        if self.mirrored is None:
            raise UpbenchError("a recipe with flips needs mirrored images")
        return self.mirrored()


class Trainable(Interface):
    """What is asked of a task (`upbench.evaluate.task.ProbeTask`)."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Head:
    """A probe that is to be trained, for each seed.

    Attributes:
        task: Gives the loss.
        outputs: K.
        recipe: How to train.
        start: A probe for each seed to begin with; drawn at random where there is none.
    """

    task: Trainable
    outputs: int
    recipe: Recipe
    start: Sequence[Probe] = ()

    def goes_with(self, other: Head) -> bool:
        """Whether both see the same batches, so that one upsampling serves them."""
        ours, theirs = self.recipe, other.recipe
        names = ("order", "epochs", "batch_size", "crop", "flip", "cls_token", "head", "trained_on")
        return ours.order != "own" and all(getattr(ours, n) == getattr(theirs, n) for n in names)


def train_probes(
    heads: Sequence[Head], data: TrainingSet, seeds: Sequence[int], progress: Bar | None = None
) -> list[list[Probe]]:
    """Fits linear probes to a training split, for each head and each seed, in one pass over the batches.

    A step sees one cell of each image (`upbench.evaluate.batches`). The seed decides on the initial weights
    and, unless the recipe says otherwise, on the order and the flips; nothing else is random, and no head's
    result depends on which others are trained with it.

    The probes of all seeds are rows of one tensor: a step is one backward pass and one update. Where seeds
    share their batches, they share the upsampling, too, and so do heads.

    Args:
        heads: One, or several that go with one another (`Head.goes_with`).
        data: What to fit.
        seeds: Any integers.
        progress: Told after each of the `training_steps`.

    Returns:
        For each head, a probe for each seed.

    Raises:
        UpbenchError: Images without a task's ground truth, features that are not finite, or a loss that is
            not.
    """
    if not all(heads[0].goes_with(other) for other in heads[1:]):
        raise UpbenchError("probes that do not see the same batches cannot be trained in one pass")
    reader = _Reader(data)
    trainings = [_Training(head, data, list(seeds), reader) for head in heads]
    for step, batches in enumerate(trainings[0].batches()):
        for training in trainings:
            training.step(step, batches)
        if progress:
            progress.advance()
    return [training.finish() for training in trainings]


class _Reader:
    """Reads batches; the latest one is kept, for heads that see the same."""

    def __init__(self, data: TrainingSet) -> None:
        self.data = data
        self._latest: tuple[Shown, tuple[DenseBatch, Truth, Tensor | None]] | None = None

    def __call__(self, shown: Shown) -> tuple[DenseBatch, Truth, Tensor | None]:
        if self._latest is None or self._latest[0] is not shown:
            self._latest = None
            self._latest = shown, self._read(shown)
        return self._latest[1]

    def _read(self, shown: Shown) -> tuple[DenseBatch, Truth, Tensor | None]:
        view = self.data.view(shown.flipped)
        truth = view.images.truth(shown.indices, self.data.device, shown.crops)
        tokens = None if view.tokens is None else view.tokens(shown.indices)
        return view.dense.batch(shown.indices, shown.crops), truth, tokens


class _Training:
    """The state of one training; S seeds, K outputs, C channels."""

    def __init__(self, head: Head, data: TrainingSet, seeds: list[int], reader: _Reader) -> None:
        self.task, self.recipe, outputs = head.task, head.recipe, head.outputs
        self.data, self.seeds, self.read, recipe = data, seeds, reader, head.recipe
        self.count = len(data.plain.images)
        if self.count != len(data.plain.dense) or not self.count:
            found = f"{len(data.plain.dense)} upsampled images do not go with {self.count} samples"
            raise UpbenchError(found)
        self.steps = training_steps(self.count, recipe)
        self.conditioning: Conditioning | None = None
        if recipe.shrinkage is not None:
            self.conditioning = Conditioning.of(data.moments(), recipe.shrinkage).to(data.device)
        token = 0 if data.plain.tokens is None else int(data.plain.tokens([0]).shape[1])
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if head.start:
            drawn = [self._from(probe) for probe in head.start]
        else:
            drawn = [_initial(recipe, outputs, data.channels + token, g) for g in self.generators]
        weight = torch.stack([w for w, _ in drawn]).to(data.device)
        self.weight = weight[..., : data.channels].contiguous().requires_grad_()  # [S, K, C]
        self.token_weight = weight[..., data.channels :].contiguous().requires_grad_()  # [S, K, C']
        self.bias = torch.stack([b for _, b in drawn]).to(data.device).requires_grad_()  # [S, K]
        self.optimizer = _optimizer(recipe, [self.weight, self.token_weight], self.bias, data.channels)
        self.losses = torch.zeros(self.steps, len(seeds), device=data.device)
        self.seen: dict[tuple[bool, int], None] = {}  # frames since the losses were last looked at
        self.checked = 0

    def _from(self, probe: Probe) -> tuple[Tensor, Tensor]:
        """The weight and bias of a trained probe, on conditioned features where there are such."""
        weight, bias = probe.weight, probe.bias
        if self.conditioning is not None:
            weight, bias = self.conditioning.unfold(weight, bias)
        if probe.token_weight is not None:
            weight = torch.cat([weight, probe.token_weight], 1)
        return weight, bias

    def batches(self) -> Iterator[list[Shown]]:
        """What each step shows. Images that are not in memory are read while earlier steps are computed."""
        plain = self.data.plain
        each = streams(self.count, plain.dense.output_size, self.recipe, self.seeds, self.generators)
        images = {False: plain.images}
        if self.recipe.flip:
            images[True] = self.data.view(flipped=True).images

        def read(batches: list[Shown]) -> tuple[list[Shown], list[object]]:
            return batches, [images[shown.flipped].prefetch(shown.indices) for shown in batches]

        most = _FRAMES_AHEAD // (self.recipe.batch_size * len(self.seeds))
        window = max(1, min(_AHEAD, most))
        readers = _READERS if any(split.reads for split in images.values()) else 0
        for batches, _held in ahead(read, each, readers, window):  # held for as long as the step takes
            yield batches

    def step(self, number: int, batches: list[Shown]) -> None:
        """One update of every probe."""
        factor = learning_rate_factor(number, self.steps, self.recipe)
        tell = getattr(self.task, "at_step", None)
        if tell:
            tell(number)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad()
        weight, bias = self.weight, self.bias
        if self.conditioning is not None:
            weight, bias = self.conditioning.fold(weight, bias)
        folded = (weight, self.token_weight, bias)
        leaves = [part.detach().requires_grad_() for part in folded]
        losses = []
        for rows, shown in self._groups(batches):
            loss = self._loss([leaf[rows] for leaf in leaves], shown)
            loss.sum().backward()
            losses.append(loss.detach())
        pairs = [
            (part, leaf.grad) for part, leaf in zip(folded, leaves, strict=True) if leaf.grad is not None
        ]
        torch.autograd.backward([part for part, _ in pairs], [grad for _, grad in pairs])
        self.losses[number] = torch.cat(losses)
        self.optimizer.step()
        self.seen.update({(shown.flipped, index): None for shown in batches for index in shown.indices})
        if number + 1 - self.checked >= _CHECK_EVERY or number + 1 == self.steps:
            self._check(number + 1)

    def finish(self) -> list[Probe]:
        """The probes, on the features themselves."""
        with torch.no_grad():
            weight, bias = self.weight, self.bias
            if self.conditioning is not None:
                weight, bias = self.conditioning.fold(weight, bias)
        tail = self.losses[-max(1, self.steps // 10) :].double().mean(0).tolist()
        token = self.token_weight.detach() if self.data.plain.tokens is not None else None
        return [
            Probe(
                weight[s].detach(), bias[s].detach(), tail[s], self.steps, None if token is None else token[s]
            )
            for s in range(len(self.seeds))
        ]

    def _groups(self, batches: list[Shown]) -> Iterator[tuple[slice, list[Shown]]]:
        """Seeds that go through a backward pass together: all, unless their outputs take too much memory."""
        shared = len(batches) < len(self.seeds)
        if shared and self._in_strips(self.read(batches[0])[0], len(self.seeds)):
            yield slice(0, len(self.seeds)), batches
            return
        each = 4 * batches[0].pixels * int(self.weight.shape[1])
        budget = _TOGETHER_BYTES.get(self.data.device.type, _TOGETHER_BYTES_ELSEWHERE)
        most = max(1, budget // max(1, each))
        for first in range(0, len(self.seeds), most):
            rows = slice(first, min(first + most, len(self.seeds)))
            yield rows, (batches if shared else batches[rows])

    def _loss(self, leaves: list[Tensor], shown: list[Shown]) -> Tensor:
        """`[s]` losses of s seeds, on one batch for all of them or on one for each."""
        weight, token_weight, bias = leaves
        seeds, outputs, channels = weight.shape
        if len(shown) == 1:  # one upsampling of all seeds' outputs
            batch, truth, tokens = self.read(shown[0])
            per_frame = bias.reshape(-1)
            if tokens is not None:
                per_frame = per_frame + tokens @ token_weight.reshape(seeds * outputs, -1).T
            flat = weight.reshape(-1, channels)
            if self._in_strips(batch, seeds):
                return loss_in_strips(self._by_pixel, batch, truth, flat, per_frame, Owners(seeds))
            made = batch.project(flat, per_frame)
            parts = [made] if seeds == 1 else made.unflatten(1, (seeds, outputs)).unbind(1)
            return torch.stack([self._task_loss(part, truth) for part in parts])
        losses: dict[int, Tensor] = {}
        for flipped in {each.flipped for each in shown}:
            own = [s for s, each in enumerate(shown) if each.flipped == flipped]
            merged = Shown(
                [i for s in own for i in shown[s].indices], [c for s in own for c in shown[s].crops], flipped
            )
            batch, truth, tokens = self.read(merged)
            counts = [len(shown[s].indices) for s in own]
            per_frame = _repeated(bias, own, counts)
            if tokens is not None:
                of_frame = _repeated(token_weight, own, counts)
                per_frame = per_frame + (of_frame @ tokens[:, :, None])[..., 0]
            each = _repeated(weight, own, counts)
            if self._in_strips(batch, 1):
                found = loss_in_strips(self._by_pixel, batch, truth, each, per_frame, owners_of(counts))
                losses.update(zip(own, found, strict=True))
                continue
            made = batch.project(each, per_frame).split(counts)
            stops = list(itertools.accumulate(counts))
            for s, part, stop in zip(own, made, stops, strict=True):
                losses[s] = self._task_loss(part, truth.rows(stop - len(part), stop))
        return torch.stack([losses[s] for s in range(seeds)])

    @property
    def _by_pixel(self) -> Any:
        return self.task

    def _in_strips(self, batch: DenseBatch, seeds: int) -> bool:
        """Whether the outputs of so many seeds are never there at once."""
        outputs = seeds * int(self.weight.shape[1])
        return by_pixel(self.task) and worth_it(batch, outputs)

    def _task_loss(self, prediction: Tensor, truth: Truth) -> Tensor:
        target = truth.target(self.task.target)  # other seeds and tasks see it, too
        inputs = Untouched(f"task '{self.task.name}'", target=target, valid=truth.valid)
        loss = self.task.loss(prediction, target, truth.valid)
        inputs.check()
        return loss

    def _check(self, step: int) -> None:
        """Raises where a loss since the last look is not finite."""
        losses = self.losses[self.checked : step]
        if not bool(losses.isfinite().all()):
            place = int((~losses.isfinite()).any(1).nonzero()[0])
            value = float(losses[place][~losses[place].isfinite()][0])
            raise self._cause() or UpbenchError(
                f"the loss of task '{self.task.name}' is {value} at step {self.checked + place}: "
                "training diverged"
            )
        self.checked, self.seen = step, {}

    def _cause(self) -> UpbenchError | None:
        """Why losses since the last look are not finite, if it is the method's doing."""
        for flipped in sorted({flipped for flipped, _ in self.seen}):
            explain = getattr(self.data.view(flipped).dense, "explain", None)
            cause: UpbenchError | None = (
                explain([i for f, i in self.seen if f == flipped]) if explain else None
            )
            if cause is not None:
                return cause
        return None


def _repeated(values: Tensor, rows: list[int], counts: list[int]) -> Tensor:
    """Some rows of a tensor, each so many times in a row; without an index that a device would be waited
    for."""
    return torch.cat(
        [values[row].expand(count, *values.shape[1:]) for row, count in zip(rows, counts, strict=True)]
    )


def _initial(
    recipe: Recipe, outputs: int, channels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`[K, C]` and `[K]`."""
    if recipe.init == "conv":
        bound = 1 / math.sqrt(channels)
        weight = (2 * torch.rand(outputs, channels, generator=generator) - 1) * bound
        return weight, (2 * torch.rand(outputs, generator=generator) - 1) * bound
    return torch.randn(outputs, channels, generator=generator) * _INITIAL_STD, torch.zeros(outputs)


def _optimizer(
    recipe: Recipe, weights: Iterable[Tensor], bias: Tensor, channels: int
) -> torch.optim.Optimizer:
    scale = learning_rate_scale(channels) if recipe.bias_lr == "scaled" else 1.0
    decay = recipe.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [w for w in weights if w.numel()], "weight_decay": decay, "peak": recipe.lr},
        {"params": [bias], "weight_decay": decay if recipe.decay_bias else 0.0, "peak": recipe.lr * scale},
    ]
    if recipe.optimizer == "nadam":
        return torch.optim.NAdam(groups, lr=recipe.lr, decoupled_weight_decay=True)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
