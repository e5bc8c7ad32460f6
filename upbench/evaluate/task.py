"""Tasks that train a linear probe on dense features: a subclass says what it puts out, its loss, its
metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.task import Context, Evaluator, Scores, Task
from upbench.evaluate.probe import Head, Probe, TrainingSet, View, train_probes
from upbench.evaluate.schedule import training_steps
from upbench.evaluate.score import evaluate_probes


class ProbeTask(Task):
    """A linear probe for every pixel: a 1x1 convolution on the upsampled features, trained for each method.

    Attributes:
        target: Field of `Sample` that holds the ground truth: "label", "depth" or "normal".
        probe: Settings of `upbench.contracts.protocol.Recipe` that differ from the protocol's for this task,
            where the protocol lets tasks have their own.
    """

    target: ClassVar[str]
    probe: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def outputs(self, dataset: Dataset, protocol: Protocol) -> int:
        """K, the outputs of the probe."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Scalar training loss.

        Args:
            prediction: `[B, K, H, W]`, the probe's raw output.
            target: `[B, H, W]` labels (int64, 255 ignored), `[B, H, W]` depth in metres or `[B, 3, H, W]`
                unit normals.
            valid: `[B, H, W]` bool; False pixels carry no loss.
        """

    @abstractmethod
    def evaluator(self, dataset: Dataset, protocol: Protocol) -> Evaluator:
        """A fresh accumulator of this task's metrics."""

    def decode(self, prediction: Tensor) -> Tensor:
        """What the probe's outputs say, pixel by pixel: what the evaluator is given.

        Args: prediction: `[B, K, H, W]`, possibly a strip of rows.

        Returns:
            `[B, ..., H, W]`; the outputs themselves by default.
        """
        return prediction

    def skip_reason(self, dataset: Dataset, protocol: Protocol | None = None) -> str | None:
        """See `Task.skip_reason`."""
        if self.target not in dataset.targets:
            return f"dataset '{dataset.name}' has no {self.target}"
        return super().skip_reason(dataset, protocol)

    def settings(self) -> dict[str, Any]:
        """See `Task.settings`."""
        return {"probe": dict(self.probe)}

    def evaluate(self, context: Context) -> Scores:
        """Trains a probe for each seed on the training split and scores it on each evaluation split.

        Tasks of the same run that see the same batches are trained together, by whichever comes first.
        """
        views = {split: _view(context, split, context.recipe(self.probe)) for split in context.dataset.splits}
        scored = context.dataset.eval_splits
        frames = sum(len(views[split].images) for split in scored)
        steps = training_steps(len(views[context.dataset.train_split].images), context.recipe(self.probe))
        scores = Scores()
        with context.progress(self.name, steps + len(context.seeds) * frames) as bar:
            probes = self._probes(context, views[context.dataset.train_split], bar)
            for split in scored:
                evaluators = [self.evaluator(context.dataset, context.protocol) for _ in probes]
                for one in evaluate_probes(self, probes, evaluators, views[split], context.protocol, bar):
                    scores.add(split, one.metrics, one.names, one.per_image)
        return scores

    def _probes(self, context: Context, plain: View, bar: Any) -> list[Probe]:
        """This task's probes, of a training that it may share with others."""
        train, own = context.dataset.train_split, self._head(context)
        data = TrainingSet(
            plain,
            channels=context.channels,
            moments=lambda: context.features(train).moments(),
            mirrored=lambda: _view(context, train, own.recipe, mirrored=True),
            device=context.device,
        )
        others = [task for task in context.tasks if isinstance(task, ProbeTask)]
        heads = {task.name: task._head(context) for task in others}
        together = {name: head for name, head in heads.items() if name == self.name or own.goes_with(head)}
        if len(together) < 2:
            return train_probes([own], data, context.seeds, bar)[0]

        def train_all() -> dict[str, list[Probe]]:
            found = train_probes(list(together.values()), data, context.seeds, bar)
            return dict(zip(together, found, strict=True))

        try:
            return context.of_method(("probes", *together), train_all)[self.name]
        except KeyboardInterrupt:
            raise
        except BaseException:  # another task's fault must not be this one's: alone, it tells its own
            return train_probes([own], data, context.seeds, bar)[0]

    def _head(self, context: Context) -> Head:
        return Head(self, self.outputs(context.dataset, context.protocol), context.recipe(self.probe))


def _view(context: Context, split: str, recipe: Recipe, mirrored: bool = False) -> View:
    """A split as probes see it."""
    images, dense = context.samples(split, mirrored=mirrored), context.dense(split, mirrored=mirrored)
    if not recipe.cls_token:
        return View(images, dense)
    store = context.features(split, mirrored=mirrored, token=True)

    def tokens(indices: Sequence[int]) -> Tensor:
        found = torch.stack([store.token(index) for index in indices])
        return F.normalize(found, dim=1) if recipe.cls_token == "unit" else found

    return View(images, dense, tokens)
