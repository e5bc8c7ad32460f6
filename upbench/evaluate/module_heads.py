"""Training and evaluation of heads that are more than a linear probe: dense features, and autograd through a
module.

What is linear commutes with upsampling, and is trained in `upbench.evaluate.probe`; a head of several layers
does not, so that it has to see every channel of every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from upbench.contracts.protocol import DPT_INPUTS, Recipe
from upbench.contracts.task import Evaluator, Truth
from upbench.errors import UpbenchError
from upbench.evaluate.batches import streams
from upbench.evaluate.dpt import DPT
from upbench.evaluate.probe import TrainingSet, View
from upbench.evaluate.schedule import learning_rate_factor, training_steps
from upbench.evaluate.score import Evaluation
from upbench.system.progress import Bar

HIDDEN = 512
"""Width of DPT heads, as in probe3d."""

_CHECK_EVERY = 50


class Headed(Interface):
    """What is asked of a task (`upbench.evaluate.task.ProbeTask`)."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...

    def answer(self, prediction: Tensor) -> Tensor: ...

    def enlarged(self, answer: Tensor, size: tuple[int, int]) -> Tensor: ...

    def loss_of_answer(self, answer: Tensor, target: Tensor, valid: Tensor) -> Tensor: ...

    def decode_answer(self, answer: Tensor) -> Tensor: ...

    def at_step(self, number: int) -> None: ...


def maps_of(view: View, indices: Sequence[int], layers: int) -> list[Tensor]:
    """What the head sees of some frames: four maps `[B, C, H, W]`, class tokens beside every pixel's own.

    Args: view: Of the split; indices: Of the frames; layers: 4, or 1 for one map given four times.
    """
    dense = view.dense.batch(indices).dense()
    maps = list(dense.chunk(layers, 1))
    if view.tokens is not None:
        each = view.tokens(indices).to(dense.device).chunk(layers, 1)
        pairs = zip(maps, each, strict=True)
        maps = [torch.cat([m, t[:, :, None, None].expand(-1, -1, *m.shape[2:])], 1) for m, t in pairs]
    return maps if layers > 1 else maps * DPT_INPUTS


def train_modules(
    task: Headed, outputs: int, recipe: Recipe, layers: int, data: TrainingSet, seeds: Sequence[int], bar: Bar
) -> list[nn.Module]:
    """A head for each seed, all in one pass over the batches where these are shared.

    The initial weights are PyTorch's, drawn from the seed.

    Args:
        task: Gives the loss.
        outputs: K.
        recipe: How to train; whole images only.
        layers: See `maps_of`.
        data: What to fit.
        seeds: Any integers.
        bar: Told after each step.

    Raises:
        UpbenchError: A recipe with crops or conditioning, or a loss that is not finite.
    """
    if recipe.crop != 1 or recipe.shrinkage is not None:
        raise UpbenchError(f"the head '{recipe.head}' sees whole images and features as they are: set crop=1")
    plain, count = data.plain, len(data.plain.images)
    channels = int(maps_of(plain, [0], layers)[0].shape[1])
    heads = [_head(recipe, channels, outputs, seed).to(data.device) for seed in seeds]
    optimizers = [_optimizer(recipe, head) for head in heads]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = training_steps(count, recipe)
    losses: list[Tensor] = []
    for number, batches in enumerate(
        streams(count, plain.dense.output_size, recipe, list(seeds), generators)
    ):
        task.at_step(number)
        seen: tuple[list[Tensor], Truth] | None = None
        for place, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            shown = batches[min(place, len(batches) - 1)]
            if seen is None or len(batches) > 1:
                view = data.view(shown.flipped)
                seen = maps_of(view, shown.indices, layers), view.images.truth(shown.indices, data.device)
            loss = _loss(task, head(seen[0]), seen[1])
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * learning_rate_factor(number, steps, recipe)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if len(losses) >= _CHECK_EVERY * len(heads) or number + 1 == steps:
            if not bool(torch.stack(losses).isfinite().all()):
                raise UpbenchError(f"the loss of task '{task.name}' is not finite: training diverged")
            losses.clear()
        bar.advance()
    return [head.eval() for head in heads]


@torch.no_grad()
def evaluate_modules(
    task: Headed,
    heads: Sequence[nn.Module],
    evaluators: Sequence[Evaluator],
    view: View,
    layers: int,
    device: torch.device,
    bar: Bar,
) -> list[Evaluation]:
    """Metrics of heads on a split, an image at a time; arguments as above.

    Raises:
        UpbenchError: Outputs that are not finite.
    """
    values: list[list[float]] = [[] for _ in heads]
    names: list[str] = []
    for index in range(len(view.images)):
        maps, truth = maps_of(view, [index], layers), view.images.truth([index], device)
        size = (int(truth.valid.shape[-2]), int(truth.valid.shape[-1]))
        names += truth.names
        for place, (head, evaluator) in enumerate(zip(heads, evaluators, strict=True)):
            answer = task.enlarged(task.answer(head(maps)), size)
            if not bool(answer.isfinite().all()):
                raise UpbenchError(f"the head's outputs for image '{truth.names[0]}' are not finite")
            values[place] += evaluator.update(task.decode_answer(answer), truth).tolist()
            bar.advance()
    return [Evaluation(one.compute(), own, names) for one, own in zip(evaluators, values, strict=True)]


def _loss(task: Headed, raw: Tensor, truth: Truth) -> Tensor:
    size = (int(truth.valid.shape[-2]), int(truth.valid.shape[-1]))
    return task.loss_of_answer(task.enlarged(task.answer(raw), size), truth.target(task.target), truth.valid)


def _head(recipe: Recipe, channels: int, outputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return DPT(channels, outputs, hidden=HIDDEN, enlarge=recipe.head == "dpt")


def _optimizer(recipe: Recipe, head: nn.Module) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam, "adam": torch.optim.Adam}
    made: torch.optim.Optimizer = kinds[recipe.optimizer](
        head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    return made
