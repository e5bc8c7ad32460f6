"""The contract of `Task`, as checks that run on any task in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Camera, Sample
from upbench.contracts.task import Metric, Task
from upbench.testing.checks import ContractError, NotApplicable, require, run_checks

HEIGHT, WIDTH = 24, 32
CLASSES = 4
STEPS = 80


class ToyDataset(Dataset):
    """Two scenes of tilted planes with every kind of ground truth; not registered."""

    targets = frozenset({"label", "depth", "normal"})
    classes = tuple(f"class {i}" for i in range(CLASSES))

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return ["toy 0", "toy 1"]

    def load(self, split: str, index: int, size: int) -> Sample:
        """See `Dataset.load`; always of 24x32 pixels."""
        return toy_sample(index)

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        return "toy"


ToyDataset.name = "toy"  # set after the class body, so that the registry does not see it


def toy_sample(seed: int) -> Sample:
    """Four planes, one class each, with ignored labels, unknown depth and pixels that count nowhere."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    label = (y > HEIGHT // 2 - seed % 5).long() * 2 + (x > WIDTH // 2 + seed % 7).long()
    slopes = torch.rand(CLASSES, 2, generator=generator) * 0.04 - 0.02
    depth = 2.0 + label.float() + slopes[label, 0] * y + slopes[label, 1] * x
    normal = torch.stack([slopes[label, 1] * 20, slopes[label, 0] * 20, -torch.ones_like(depth)])
    normal = normal / normal.norm(dim=0)
    valid = torch.rand(HEIGHT, WIDTH, generator=generator) > 0.1
    label[:2] = IGNORE
    depth[~valid] = 0
    normal[:, ~valid] = 0
    camera = Camera(torch.tensor([[WIDTH, HEIGHT, WIDTH / 2, HEIGHT / 2]], dtype=torch.float32))
    image = torch.rand(3, HEIGHT, WIDTH, generator=generator)
    return Sample(f"toy {seed}", image, valid, label, depth, normal, camera)


@dataclass
class TaskCase:
    """A task under test, with labelled samples for it.

    Attributes:
        task: An instance.
        dataset: What the samples are from.
        samples: At least two.
    """

    task: Task
    dataset: Dataset
    samples: Sequence[Sample]

    @property
    def channels(self) -> int:
        """Outputs of the probe."""
        return self.task.probe_channels(self.dataset)

    @cached_property
    def target(self) -> Tensor:
        """Ground truth of all samples, `[B, ...]`."""
        found = [getattr(s, self.task.target) for s in self.samples]
        return torch.stack(found)

    @cached_property
    def valid(self) -> Tensor:
        """`[B, H, W]`."""
        return torch.stack([s.valid for s in self.samples])

    def noise(self, seed: int = 0) -> Tensor:
        """A prediction that knows nothing, `[B, K, H, W]`."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.samples), self.channels, *self.valid.shape[1:])
        return torch.randn(shape, generator=generator)

    @cached_property
    def fitted(self) -> Tensor:
        """A prediction that the task's own loss was minimised on, `[B, K, H, W]`."""
        prediction = self.noise().requires_grad_()
        optimizer = torch.optim.Adam([prediction], lr=0.3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.task.loss(prediction, self.target, self.valid).backward()
            optimizer.step()
        return prediction.detach()

    def evaluate(
        self, predictions: Tensor, samples: Sequence[Sample] | None = None
    ) -> tuple[dict[str, float], list[float]]:
        """All metrics, and each image's own value of the primary one."""
        evaluator = self.task.evaluator(self.dataset)
        pairs = zip(predictions, samples or self.samples, strict=True)
        per_image = [evaluator.update(prediction, sample) for prediction, sample in pairs]
        return evaluator.compute(), per_image


def check_task(
    cls: type[Task],
    dataset: Dataset | None = None,
    samples: Sequence[Sample] | None = None,
    *,
    skip: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Holds a task to the contract of `Task`, on made-up planes unless samples are given.

    Args:
        cls: The class.
        dataset: What the samples are from; needed where the toy's labels, depth and normals do not serve.
        samples: At least two labelled samples of one size.
        skip: Name of a check (a key of `TASK_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok", or why it says nothing about this task.

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    case = toy_case(cls) if dataset is None or samples is None else TaskCase(cls(), dataset, samples)
    return run_checks(f"task '{cls.name}'", TASK_CHECKS, case, skip or {})


def toy_case(cls: type[Task]) -> TaskCase:
    """The task on two made-up scenes."""
    return TaskCase(cls(), ToyDataset(Path()), [toy_sample(0), toy_sample(1)])


def declarations(case: TaskCase) -> None:
    """Metrics, target and primary metric are declared and fit one another."""
    task = case.task
    names = [metric.name for metric in task.metrics]
    require(names and all(isinstance(m, Metric) for m in task.metrics), "metrics are not `Metric`s")
    require(len(set(names)) == len(names), f"metrics are named twice: {names}")
    require(task.primary in names, f"primary '{task.primary}' is not among {names}")
    require(set(task.headline) <= set(names), f"headline {list(task.headline)} is not among {names}")
    require(task.target in {f.name for f in fields(Sample)}, f"target '{task.target}' is no field of Sample")
    require(isinstance(task.title, str), "title is not a text")
    require(isinstance(case.channels, int) and case.channels > 0, f"probe_channels is {case.channels!r}")


def skip_reason(case: TaskCase) -> None:
    """A dataset without the target is refused in words, one with it is not."""
    require(case.task.skip_reason(case.dataset) is None, "refuses a dataset that has its target")

    class Bare(ToyDataset):
        targets = frozenset()

    reason = case.task.skip_reason(Bare(Path()))
    require(isinstance(reason, str) and reason, "takes a dataset that lacks its target")


def loss(case: TaskCase) -> None:
    """The loss is a finite scalar, with a gradient that is finite and not zero."""
    prediction = case.noise().requires_grad_()
    value = case.task.loss(prediction, case.target, case.valid)
    require(value.ndim == 0, f"loss has shape {list(value.shape)}")
    require(bool(value.isfinite()), f"loss is {float(value.detach())}")
    value.backward()
    grad = prediction.grad
    require(grad is not None and bool(grad.isfinite().all()), "gradient is missing or not finite")
    require(grad is not None and float(grad.abs().sum()) > 0, "gradient is zero")


def invalid_pixels(case: TaskCase) -> None:
    """Pixels that are not valid carry no loss and change no metric."""
    prediction = case.noise().requires_grad_()
    case.task.loss(prediction, case.target, case.valid).backward()
    assert prediction.grad is not None
    outside = prediction.grad.movedim(1, -1)[~case.valid]
    require(not outside.any(), "pixels that are not valid get a gradient")
    changed = prediction.detach().clone()
    changed.movedim(1, -1)[~case.valid] = case.noise(1).movedim(1, -1)[~case.valid]
    if case.task.target == "label":
        return  # measures of regions may look at a prediction's shape beyond the valid pixels
    before, after = case.evaluate(prediction.detach())[0], case.evaluate(changed)[0]
    for name, value in before.items():
        require(_same(value, after[name]), f"{name} looks at pixels that are not valid")


def nothing_valid(case: TaskCase) -> None:
    """Images without a valid pixel: a finite loss, no value of their own, and no effect on the metrics."""
    prediction = case.noise().requires_grad_()
    value = case.task.loss(prediction, case.target, torch.zeros_like(case.valid))
    require(bool(value.isfinite()), f"loss is {float(value.detach())}")
    value.backward()
    require(prediction.grad is not None and bool(prediction.grad.isfinite().all()), "gradient is not finite")
    empty = replace(case.samples[0], valid=torch.zeros_like(case.samples[0].valid))
    noise = case.noise()
    only, own = case.evaluate(noise[:1], [empty])
    require(math.isnan(own[0]), f"an image without a valid pixel has the value {own[0]}, not nan")
    require(set(only) == _declared(case), "metrics are missing where no pixel is valid")
    with_it, _ = case.evaluate(torch.cat([noise, noise[:1]]), [*case.samples, empty])
    without, _ = case.evaluate(noise)
    for name, score in without.items():
        require(_same(score, with_it[name]), f"{name} changes with an image that has no valid pixel")


def metric_names(case: TaskCase) -> None:
    """The evaluator gives exactly the declared metrics, as finite numbers; nan before the first image."""
    found, per_image = case.evaluate(case.noise())
    require(set(found) == _declared(case), f"computes {sorted(found)}, declares {sorted(_declared(case))}")
    for name, value in found.items():
        require(isinstance(value, float) and math.isfinite(value), f"{name} is {value!r}")
    require(all(isinstance(v, float) for v in per_image), f"update returns {per_image[0]!r}, not a float")
    empty = case.task.evaluator(case.dataset).compute()
    require(set(empty) == _declared(case), "metrics are missing before the first image")
    require(all(math.isnan(v) for v in empty.values()), "metrics are not nan before the first image")


def better_is_better(case: TaskCase) -> None:
    """A prediction fitted by the task's loss beats noise in every metric, in the declared direction."""
    first, last = (float(case.task.loss(p, case.target, case.valid)) for p in (case.noise(), case.fitted))
    require(last < 0.5 * first, f"the loss only falls from {first:.3g} to {last:.3g} on free predictions")
    (noise, own_noise), (fitted, own_fitted) = case.evaluate(case.noise()), case.evaluate(case.fitted)
    for metric in case.task.metrics:
        gain = (fitted[metric.name] - noise[metric.name]) * (1 if metric.higher_is_better else -1)
        require(
            gain > 0, f"{metric.name}: {noise[metric.name]:.4g} for noise, {fitted[metric.name]:.4g} fitted"
        )
    primary = next(m for m in case.task.metrics if m.name == case.task.primary)
    for one, two in zip(own_noise, own_fitted, strict=True):
        gain = (two - one) * (1 if primary.higher_is_better else -1)
        require(gain > 0, f"an image's own value goes from {one:.4g} to {two:.4g}")


def order(case: TaskCase) -> None:
    """The order of images plays no part, and evaluators do not share state."""
    noise = case.noise()
    forward, _ = case.evaluate(noise)
    backward, _ = case.evaluate(noise.flip(0), list(reversed(case.samples)))
    for name, value in forward.items():
        require(_same(value, backward[name]), f"{name} depends on the order of images")


def inputs_unchanged(case: TaskCase) -> None:
    """Predictions and samples are left as they are."""
    prediction = case.noise()
    kept = prediction.clone(), case.target.clone(), case.valid.clone()
    case.task.loss(prediction, case.target, case.valid)
    truth = [getattr(s, case.task.target).clone() for s in case.samples]
    case.evaluate(prediction)
    for name, now, before in zip(
        ("prediction", "target", "valid"), (prediction, case.target, case.valid), kept, strict=True
    ):
        require(torch.equal(now, before), f"{name} was changed")
    same = all(torch.equal(getattr(s, case.task.target), t) for s, t in zip(case.samples, truth, strict=True))
    require(same, "a sample was changed")


def gpu(case: TaskCase) -> None:
    """On a GPU loss and metrics are those of the CPU."""
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU on this machine")
    noise = case.noise()
    here = case.task.loss(noise, case.target, case.valid)
    there = case.task.loss(noise.cuda(), case.target.cuda(), case.valid.cuda())
    if not torch.allclose(there.cpu(), here, rtol=1e-3):
        raise ContractError(f"loss is {float(there)} on a GPU, {float(here)} on the CPU")


def _declared(case: TaskCase) -> set[str]:
    return {metric.name for metric in case.task.metrics}


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) or (math.isnan(a) and math.isnan(b))


TASK_CHECKS: dict[str, Callable[[TaskCase], None]] = {
    "declarations": declarations,
    "skip reason": skip_reason,
    "loss": loss,
    "invalid pixels": invalid_pixels,
    "nothing valid": nothing_valid,
    "metric names": metric_names,
    "better is better": better_is_better,
    "order": order,
    "inputs unchanged": inputs_unchanged,
    "gpu": gpu,
}
