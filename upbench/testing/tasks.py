"""The contract of `Task`, as checks that run on any task in seconds: for every task, then for probes."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.contracts.task import Context, Metric, Scores, Task, Truth
from upbench.evaluate.task import ProbeTask
from upbench.testing.checks import ContractError, NotApplicable, require, run_checks
from upbench.testing.closeness import assert_close
from upbench.testing.toys.context import ToyContext
from upbench.testing.toys.samples import TOYS, ToyDataset, toy_sample

__all__ = ["TASK_CHECKS", "TaskCase", "ToyDataset", "check_task", "toy_case", "toy_sample"]

STEPS = 80
ROWS = 7
"""Of a strip that is decoded by itself."""


@dataclass
class TaskCase:
    """A task under test, with a context to evaluate it in.

    Attributes:
        cls: Its class.
        new_context: Makes a context, always the same; called once and for each repetition.
    """

    cls: type[Task]
    new_context: Callable[[], Context]

    @cached_property
    def task(self) -> Task:
        """An instance."""
        return self.cls()

    @cached_property
    def context(self) -> Context:
        """A context for checks that change nothing of it."""
        return self.new_context()

    @property
    def dataset(self) -> Dataset:
        """What the images are from."""
        return self.context.dataset

    @property
    def probe(self) -> ProbeTask:
        """The task, of those that train a probe.

        Raises:
            NotApplicable: It does not.
        """
        if not isinstance(self.task, ProbeTask):
            raise NotApplicable("trains no probe")
        return self.task

    @property
    def declared(self) -> set[str]:
        """Names of the metrics."""
        return {metric.name for metric in self.task.metrics}

    @cached_property
    def truth(self) -> Truth:
        """Ground truth of the first two frames of the training split."""
        images = self.context.samples(self.dataset.train_split)
        return images.truth(range(min(2, len(images))))

    @property
    def target(self) -> Tensor:
        """The field of it that a probe is trained on, `[B, ...]`."""
        return self.truth.target(self.probe.target)

    @property
    def valid(self) -> Tensor:
        """`[B, H, W]`."""
        return self.truth.valid

    @property
    def outputs(self) -> int:
        """K, of the probe."""
        return self.probe.outputs(self.dataset, self.context.protocol)

    def noise(self, seed: int = 0) -> Tensor:
        """A prediction that knows nothing, `[B, K, H, W]`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(self.valid), self.outputs, *self.valid.shape[1:], generator=generator)

    @cached_property
    def fitted(self) -> Tensor:
        """A prediction that the task's own loss was minimised on, `[B, K, H, W]`."""
        prediction = self.noise().requires_grad_()
        optimizer = torch.optim.Adam([prediction], lr=0.3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.probe.loss(prediction, self.target, self.valid).backward()
            optimizer.step()
        return prediction.detach()

    def score(self, *batches: tuple[Tensor, Truth]) -> tuple[dict[str, float], list[float]]:
        """All metrics, and each image's own value of the primary one.

        Args: batches: Predictions `[B, K, H, W]`, and the ground truth of the same images.
        """
        evaluator = self.probe.evaluator(self.dataset, self.context.protocol)
        own: list[float] = []
        for prediction, truth in batches:
            values = evaluator.update(self.probe.decode(prediction), truth)
            fits = isinstance(values, Tensor) and tuple(values.shape) == (len(truth),)
            require(
                fits, f"update returns {values!r} for {len(truth)} images, not a tensor of as many values"
            )
            own += values.tolist()
        return evaluator.compute(), own

    def evaluate(self, seed: int) -> Scores:
        """The whole task in a fresh context, with the global random numbers of some seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.task.evaluate(self.new_context())

    @cached_property
    def scores(self) -> Scores:
        """The whole task, once."""
        return self.evaluate(0)


def check_task(
    cls: type[Task],
    new_context: Callable[[], Context] | None = None,
    *,
    skip: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Holds a task to the contract of `Task`, on a made-up dataset unless a context is given.

    Args:
        cls: The class.
        new_context: Makes a context, such as `lambda: ToyContext(MyDataset())`; toys serve most tasks.
        skip: Name of a check (a key of `TASK_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok", or why it says nothing about this task.

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    case = toy_case(cls) if new_context is None else TaskCase(cls, new_context)
    return run_checks(f"task '{cls.name}'", TASK_CHECKS, case, skip or {})


def toy_case(cls: type[Task]) -> TaskCase:
    """The task on a toy dataset of its content."""
    content = cls.content if cls.content in TOYS else "images"
    return TaskCase(cls, lambda: ToyContext(content=content))


# -------------------------------------------------------------------------------------------- every task


def declarations(case: TaskCase) -> None:
    """Metrics, needs and content are declared and fit one another; nothing abstract is left."""
    cls = case.cls
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    require(not inspect.isabstract(cls), f"does not define {', '.join(missing)}")
    names = [metric.name for metric in cls.metrics]
    require(names and all(isinstance(m, Metric) for m in cls.metrics), "metrics are not `Metric`s")
    require(len(set(names)) == len(names), f"metrics are named twice: {names}")
    require(cls.primary in names, f"primary '{cls.primary}' is not among {names}")
    require(set(cls.headline) <= set(names), f"headline {list(cls.headline)} is not among {names}")
    known = {f.name for f in fields(Sample)}
    require(set(cls.needs) <= known, f"needs {sorted(set(cls.needs) - known)} are no fields of Sample")
    require(cls.content in TOYS, f"content '{cls.content}' is none of {', '.join(TOYS)}")
    require(isinstance(cls.title, str), "title is not a text")
    texts = [*cls.needs, *cls.datasets]
    sequences = not isinstance(cls.needs, str) and not isinstance(cls.datasets, str)
    require(sequences and all(isinstance(t, str) for t in texts), "needs and datasets are not lists of names")
    if isinstance(case.task, ProbeTask):
        require(case.task.target in known, f"target '{case.task.target}' is no field of Sample")
        require(isinstance(case.outputs, int) and case.outputs > 0, f"outputs is {case.outputs!r}")


def skip_reason(case: TaskCase) -> None:
    """A dataset without what is needed, or of another content, is refused in words; the right one is not."""
    task, protocol = case.task, case.context.protocol
    refused = task.skip_reason(case.dataset, protocol)
    require(refused is None, f"refuses a dataset that has all that it needs: {refused}")
    needs = {*task.needs, *([task.target] if isinstance(task, ProbeTask) else [])}
    if needs & set(case.dataset.targets):
        bare = TOYS[task.content]()
        bare.targets = frozenset()
        reason = task.skip_reason(bare, protocol)
        require(isinstance(reason, str) and reason, "takes a dataset that lacks what it needs")
    for content in set(TOYS) - {task.content}:
        other = TOYS[content]()
        other.targets = frozenset(needs)
        reason = task.skip_reason(other, protocol)
        require(isinstance(reason, str) and reason, f"takes a dataset of {content}, runs on {task.content}")


def settings(case: TaskCase) -> None:
    """Settings can be written to a record."""
    try:
        json.dumps(case.task.settings(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ContractError(f"settings cannot be written to a record: {error}") from error


def evaluation(case: TaskCase) -> None:
    """The scores of every evaluation split have exactly the declared metrics, as finite numbers, one for each
    seed or one in all; and each image's own values, by its name."""
    scores, splits = case.scores, list(case.dataset.eval_splits)
    require(isinstance(scores, Scores), f"evaluate returns {type(scores).__name__}, not Scores")
    require(list(scores.metrics) == splits, f"scores are of {list(scores.metrics)}, not of {splits}")
    require(set(scores.per_image) <= set(splits), f"values of images are of {list(scores.per_image)}")
    seeds = len(case.context.seeds)
    for split in splits:
        found = scores.metrics[split]
        require(set(found) == case.declared, f"gives {sorted(found)}, declares {sorted(case.declared)}")
        counts = {len(values) for values in found.values()}
        require(counts <= {seeds} or counts == {1}, f"{counts} values of metrics for {seeds} seeds")
        for name, values in found.items():
            require(all(math.isfinite(v) for v in values), f"{name} is {values} on {split}")
        if split not in scores.per_image:
            continue
        held = scores.per_image[split]
        require(len(held["values"]) in counts, "images have values for other seeds than metrics do")
        require(len(set(held["names"])) == len(held["names"]), "an image is named twice")
        if isinstance(case.task, ProbeTask):
            names = list(case.context.samples(split).names)
            require(held["names"] == names, f"values are of {held['names']}, the images are {names}")
        for values in held["values"]:
            require(any(math.isfinite(v) for v in values), f"no image of {split} has a value of its own")


def repeatable(case: TaskCase) -> None:
    """The same scores again, whatever the global random numbers are."""
    again, scores = case.evaluate(1), case.scores
    for split, metrics in scores.metrics.items():
        for name, values in metrics.items():
            other = again.metrics[split][name]
            same = len(values) == len(other) and all(map(_same, values, other))
            require(same, f"{name} is {values}, then {other}: draw what is random from the context's seeds")
    require(again.notes == scores.notes, "notes differ from one evaluation to the next")


# ------------------------------------------------------------------------------------------------ probes


def loss(case: TaskCase) -> None:
    """The loss is a finite scalar, with a gradient that is finite and not zero."""
    prediction = case.noise().requires_grad_()
    value = case.probe.loss(prediction, case.target, case.valid)
    require(value.ndim == 0, f"loss has shape {list(value.shape)}")
    require(bool(value.isfinite()), f"loss is {float(value.detach())}")
    value.backward()
    grad = prediction.grad
    require(grad is not None and bool(grad.isfinite().all()), "gradient is missing or not finite")
    require(grad is not None and float(grad.abs().sum()) > 0, "gradient is zero")


def invalid_pixels(case: TaskCase) -> None:
    """Pixels that are not valid carry no loss and change no metric."""
    prediction = case.noise().requires_grad_()
    case.probe.loss(prediction, case.target, case.valid).backward()
    assert prediction.grad is not None
    outside = prediction.grad.movedim(1, -1)[~case.valid]
    require(not outside.any(), "pixels that are not valid get a gradient")
    changed = prediction.detach().clone()
    changed.movedim(1, -1)[~case.valid] = case.noise(1).movedim(1, -1)[~case.valid]
    if case.probe.target == "label":
        return  # measures of regions may look at a prediction's shape beyond the valid pixels
    before, after = (case.score((p, case.truth))[0] for p in (prediction.detach(), changed))
    for name, value in before.items():
        require(_same(value, after[name]), f"{name} looks at pixels that are not valid")


def nothing_valid(case: TaskCase) -> None:
    """Images without a valid pixel: a finite loss, no value of their own, and no effect on the metrics."""
    prediction = case.noise().requires_grad_()
    value = case.probe.loss(prediction, case.target, torch.zeros_like(case.valid))
    require(bool(value.isfinite()), f"loss is {float(value.detach())}")
    value.backward()
    require(prediction.grad is not None and bool(prediction.grad.isfinite().all()), "gradient is not finite")
    empty = replace(case.truth, valid=torch.zeros_like(case.valid))
    noise = case.noise()
    only, own = case.score((noise, empty))
    require(all(map(math.isnan, own)), f"images without a valid pixel have the values {own}, not nan")
    require(set(only) == case.declared, "metrics are missing where no pixel is valid")
    (with_it, _), (without, _) = (
        case.score((noise, case.truth), (noise, empty)),
        case.score((noise, case.truth)),
    )
    for name, score in without.items():
        require(_same(score, with_it[name]), f"{name} changes with images that have no valid pixel")


def metric_names(case: TaskCase) -> None:
    """The evaluator gives exactly the declared metrics, as finite numbers; nan before the first image."""
    found, own = case.score((case.noise(), case.truth))
    require(set(found) == case.declared, f"computes {sorted(found)}, declares {sorted(case.declared)}")
    for name, value in found.items():
        require(isinstance(value, float) and math.isfinite(value), f"{name} is {value!r}")
    require(all(map(math.isfinite, own)), f"images have the values {own}")
    empty = case.probe.evaluator(case.dataset, case.context.protocol).compute()
    require(set(empty) == case.declared, "metrics are missing before the first image")
    require(all(math.isnan(v) for v in empty.values()), "metrics are not nan before the first image")


def better_is_better(case: TaskCase) -> None:
    """A prediction fitted by the task's loss beats noise in every metric, in the declared direction."""
    first, last = (float(case.probe.loss(p, case.target, case.valid)) for p in (case.noise(), case.fitted))
    require(last < 0.5 * first, f"the loss only falls from {first:.3g} to {last:.3g} on free predictions")
    (noise, own_noise), (fitted, own_fitted) = (
        case.score((p, case.truth)) for p in (case.noise(), case.fitted)
    )
    for metric in case.probe.metrics:
        gain = (fitted[metric.name] - noise[metric.name]) * (1 if metric.higher_is_better else -1)
        best = metric.unit == "%" and noise[metric.name] == (100 if metric.higher_is_better else 0)
        require(
            gain > 0 or (best and gain == 0),  # a coarse fraction may leave nothing to gain
            f"{metric.name}: {noise[metric.name]:.4g} for noise, {fitted[metric.name]:.4g} fitted",
        )
    primary = next(m for m in case.probe.metrics if m.name == case.probe.primary)
    for one, two in zip(own_noise, own_fitted, strict=True):
        gain = (two - one) * (1 if primary.higher_is_better else -1)
        require(gain > 0, f"an image's own value goes from {one:.4g} to {two:.4g}")


def order(case: TaskCase) -> None:
    """The order of images and their batches play no part, and evaluators do not share state."""
    noise, truth = case.noise(), case.truth
    each = [(noise[i : i + 1], _image(truth, i)) for i in range(len(truth))]
    (together, own), (forward, own_each), (backward, _) = (
        case.score(*batches) for batches in ([(noise, truth)], each, each[::-1])
    )
    for name, value in together.items():
        require(_same(value, forward[name]), f"{name} depends on what is in a batch")
        require(_same(value, backward[name]), f"{name} depends on the order of images")
    require(all(map(_same, own, own_each)), "an image's own value depends on what else is in its batch")


def strips(case: TaskCase) -> None:
    """Rows are decoded by themselves: a strip of them means what it means in the whole."""
    prediction, height = case.noise(), int(case.valid.shape[1])
    whole = case.probe.decode(prediction)
    parts = [case.probe.decode(prediction[:, :, top : top + ROWS]) for top in range(0, height, ROWS)]
    found = torch.cat(parts, -2)
    require(found.shape == whole.shape, f"decode gives {list(whole.shape)}, by strips {list(found.shape)}")
    require(len(whole) == len(prediction), f"decode gives {len(whole)} answers to {len(prediction)} images")
    if whole.is_floating_point():
        assert_close(found, whole, what="decode, which looks at more than its strip")
    else:
        require(torch.equal(found, whole), "decode looks at more than its strip")


def inputs_unchanged(case: TaskCase) -> None:
    """Predictions and ground truth are left as they are."""
    prediction = case.noise()
    given = {"prediction": prediction, "target": case.target, "valid": case.valid}
    kept = {name: tensor.clone() for name, tensor in given.items()}
    case.probe.loss(prediction, case.target, case.valid)
    case.score((prediction, case.truth))
    for name, tensor in given.items():
        require(torch.equal(tensor, kept[name]), f"{name} was changed")


def gpu(case: TaskCase) -> None:
    """On a GPU loss and metrics are those of the CPU."""
    noise, truth = case.noise(), case.truth
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU on this machine")
    parts = (truth.valid, truth.label, truth.depth, truth.normal)
    there = Truth(truth.names, *(None if part is None else part.cuda() for part in parts))  # type: ignore[arg-type]
    here = case.probe.loss(noise, case.target, case.valid)
    found = case.probe.loss(noise.cuda(), there.target(case.probe.target), there.valid)
    assert_close(found.cpu(), here, dtype=torch.float16, terms=1, what="loss on a GPU")
    (metrics, own), (metrics_there, own_there) = case.score((noise, truth)), case.score((noise.cuda(), there))
    for name, value in metrics.items():
        close = math.isclose(metrics_there[name], value, rel_tol=1e-3)
        require(close, f"{name} is {metrics_there[name]} on a GPU, {value} on the CPU")
    require(all(map(_same, own, own_there)), "images' own values on a GPU are not those on the CPU")


def _image(truth: Truth, index: int) -> Truth:
    parts = (truth.valid, truth.label, truth.depth, truth.normal)
    chosen = (None if part is None else part[index : index + 1] for part in parts)
    return Truth(truth.names[index : index + 1], *chosen)  # type: ignore[arg-type]


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b))


TASK_CHECKS: dict[str, Callable[[TaskCase], None]] = {
    "declarations": declarations,
    "skip reason": skip_reason,
    "settings": settings,
    "evaluation": evaluation,
    "repeatable": repeatable,
    "loss": loss,
    "invalid pixels": invalid_pixels,
    "nothing valid": nothing_valid,
    "metric names": metric_names,
    "better is better": better_is_better,
    "order": order,
    "strips": strips,
    "inputs unchanged": inputs_unchanged,
    "gpu": gpu,
}
