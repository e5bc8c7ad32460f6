"""Tasks that train a linear probe on dense features: a subclass says what it puts out, its loss, its
metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.task import Context, Evaluator, Scores, Task
from upbench.evaluate.module_heads import evaluate_modules, train_modules
from upbench.evaluate.own_features import own_features
from upbench.evaluate.probe import Head, Probe, TrainingSet, View, train_probes
from upbench.evaluate.schedule import training_steps
from upbench.evaluate.score import Evaluation, evaluate_probes


class ProbeTask(Task):
    """A linear probe for every pixel: a 1x1 convolution on the upsampled features, trained for each method.

    Attributes:
        target: Field of `Sample` that holds the ground truth: "label", "depth" or "normal".
        probe: Settings of `upbench.contracts.protocol.Recipe` that differ from the protocol's for this task,
            where the protocol lets tasks have their own.
        by_pixel: Whether the loss is the mean of a function of each pixel's own outputs, so that it can be
            computed a part of the pixels at a time; `counted` and `summed` are then to be defined.
    """

    target: ClassVar[str]
    probe: ClassVar[Mapping[str, Any]] = {}
    by_pixel: ClassVar[bool] = False

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

    def counted(self, target: Tensor, valid: Tensor) -> Tensor:
        """`[B, H, W]` bool: the pixels whose losses `loss` averages, for tasks with `by_pixel`."""
        raise NotImplementedError

    def summed(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The sum of the losses of those pixels, and its slope, for tasks with `by_pixel`.

        Args: as `loss`, for some rows; prediction: replaced by the slope of the sum, in place.

        Returns:
            Scalar: `loss` times the number of pixels that count.
        """
        raise NotImplementedError

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

    def answer(self, prediction: Tensor) -> Tensor:
        """What of a head's outputs is brought to another size, where the head has one of its own.

        `loss(z)` is `loss_of_answer(answer(z))`, and `decode(z)` is `decode_answer(answer(z))`.

        Args: prediction: `[B, K, H, W]`, the head's raw outputs.

        Returns:
            `[B, ..., H, W]`; the outputs themselves by default.
        """
        return prediction

    def enlarged(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        """An answer at the size of the ground truth; bilinear by default, corners aligned (as probe3d's)."""
        if tuple(answer.shape[-2:]) == size:
            return answer
        maps = answer if answer.ndim == 4 else answer[:, None]
        made = F.interpolate(maps, size, mode="bilinear", align_corners=True)
        return made if answer.ndim == 4 else made[:, 0]

    def loss_of_answer(self, answer: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """See `answer`."""
        return self.loss(answer, target, valid)

    def decode_answer(self, answer: Tensor) -> Tensor:
        """See `answer`."""
        return self.decode(answer)

    def at_step(self, number: int) -> None:
        """Told before each step of a training, for losses that change on the way. Nothing by default."""

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
        recipe = context.recipe(self.probe)
        views = {split: _view(context, split, recipe) for split in context.dataset.splits}
        scored = context.dataset.eval_splits
        frames = sum(len(views[split].images) for split in scored)
        train = views[context.dataset.train_split]
        scores = Scores()
        total = training_steps(len(train.images), recipe) + len(context.seeds) * frames
        with context.progress(self.name, total) as bar:
            if recipe.head == "linear":
                evaluate = self._linear(context, train, bar)
            else:
                evaluate = self._modules(context, recipe, train, bar)
            for split in scored:
                for one in evaluate(views[split]):
                    scores.add(split, one.metrics, one.names, one.per_image)
        return scores

    def _linear(self, context: Context, train: View, bar: Any) -> Callable[[View], list[Evaluation]]:
        """Trains linear probes; gives what evaluates them."""
        probes = self._probes(context, train, bar)

        def evaluate(view: View) -> list[Evaluation]:
            evaluators = [self.evaluator(context.dataset, context.protocol) for _ in probes]
            return evaluate_probes(self, probes, evaluators, view, context.protocol, bar)

        return evaluate

    def _modules(
        self, context: Context, recipe: Recipe, train: View, bar: Any
    ) -> Callable[[View], list[Evaluation]]:
        """The same of heads of several layers."""
        layers, outputs = context.protocol.layers, self.outputs(context.dataset, context.protocol)
        data = _training_set(context, recipe, train)
        heads = train_modules(self, outputs, recipe, layers, data, context.seeds, bar)

        def evaluate(view: View) -> list[Evaluation]:
            evaluators = [self.evaluator(context.dataset, context.protocol) for _ in heads]
            return evaluate_modules(self, heads, evaluators, view, layers, context.device, bar)

        return evaluate

    def _probes(self, context: Context, plain: View, bar: Any) -> list[Probe]:
        """This task's probes, of a training that it may share with others."""
        own = self._head(context)
        if own.recipe.trained_on != "method":
            first = self._on_own_features(context, own)
            if own.recipe.trained_on == "backbone":
                bar.advance(training_steps(len(plain.images), own.recipe))
                return first
            own = replace(own, start=first)
        data = _training_set(context, own.recipe, plain)
        if own.start:
            return train_probes([own], data, context.seeds, bar)[0]
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

    def _on_own_features(self, context: Context, head: Head) -> list[Probe]:
        """Probes on the backbone's own features, made once for all methods."""
        recipe = replace(head.recipe, trained_on="method", lr=head.recipe.first_lr or head.recipe.lr)
        recipe = replace(recipe, first_lr=0.0)

        def train() -> list[Probe]:
            view = _view(context, context.dataset.train_split, recipe, own=True)
            data = _training_set(context, recipe, view, own=True)
            steps = training_steps(len(data.plain.images), recipe)
            with context.progress(f"{self.name}, head on the backbone's own features", steps) as bar:
                return train_probes([replace(head, recipe=recipe)], data, context.seeds, bar)[0]

        return context.shared(("head", recipe, context.seeds), train)

    def _head(self, context: Context) -> Head:
        return Head(self, self.outputs(context.dataset, context.protocol), context.recipe(self.probe))


def _training_set(context: Context, recipe: Recipe, plain: View, own: bool = False) -> TrainingSet:
    """The training split; plain: as probes see it unmirrored; own: see `_view`."""
    train = context.dataset.train_split
    return TrainingSet(
        plain,
        channels=context.channels,
        moments=lambda: context.features(train).moments(),
        mirrored=lambda: _view(context, train, recipe, mirrored=True, own=own),
        device=context.device,
    )


def _view(context: Context, split: str, recipe: Recipe, mirrored: bool = False, own: bool = False) -> View:
    """A split as probes see it; own: the backbone's own features instead of the method's."""
    images = context.samples(split, mirrored=mirrored)
    dense = own_features(context, split, mirrored) if own else context.dense(split, mirrored=mirrored)
    if not recipe.cls_token:
        return View(images, dense)
    store = context.features(split, mirrored=mirrored, token=True)

    def tokens(indices: Sequence[int]) -> Tensor:
        found = torch.stack([store.token(index) for index in indices])
        return F.normalize(found, dim=1) if recipe.cls_token == "unit" else found

    return View(images, dense, tokens)
