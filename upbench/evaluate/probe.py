"""Linear probes on upsampled features: training and evaluation, the same for every method and task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.contracts.task import Task
from upbench.dense.view import Crop, Upsampled
from upbench.errors import UpbenchError
from upbench.evaluate.protocol import ProbeConfig
from upbench.system.progress import Bar

_INITIAL_STD = 0.01
_TINY = 1e-6  # of the mean variance: what is below it is rounding


@dataclass(frozen=True)
class Probe:
    """A trained 1x1 convolution on the method's own features.

    Attributes:
        weight: `[K, C]` float32.
        bias: `[K]` float32.
        loss: Mean training loss over the last tenth of the steps.
        steps: Number of steps.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a probe on one split.

    Attributes:
        metrics: By name, in the metric's unit.
        per_image: The primary metric of each image alone; nan where it has no valid pixel.
        names: The images.
    """

    metrics: dict[str, float]
    per_image: list[float]
    names: list[str]


@dataclass(frozen=True)
class Conditioning:
    """An affine map of features under which a linear probe is easy to train: z = scale (x - mean).

    A probe (V, c) on z is the probe (V scale, c - V scale mean) on x. As upsamplers are applied to x, or to
    outputs that are linear in x, the map is never applied to features: it is folded into the probe.

    Features of a vision transformer need it: of 384 axes the first few hold most of the variance, and descent
    along them limits the step for all others. Full whitening goes too far, as it gives the axes that
    hold next to nothing the same say; see `ProbeConfig.shrinkage`.

    Attributes:
        mean: `[C]`.
        scale: `[C, C]`, symmetric.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor, shrinkage: float) -> Conditioning:
        """From `[N, C, h, w]` low-resolution features of the training split."""
        x = features.transpose(0, 1).flatten(1)
        mean = x.mean(1)
        x = x - mean[:, None]
        variances, axes = torch.linalg.eigh((x @ x.T).double() / x.shape[1])
        damped = variances.clamp(min=0) + (shrinkage + _TINY) * variances.mean() + 1e-30
        return cls(mean, (axes * damped.rsqrt() @ axes.T).float())

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The probe on x that equals the probe (`weight`, `bias`) on z."""
        folded = weight @ self.scale
        return folded, bias - folded @ self.mean


def train_probe(
    task: Task,
    dataset: Dataset,
    upsampled: Upsampled,
    samples: Sequence[Sample],
    config: ProbeConfig,
    seed: int,
    progress: Bar | None = None,
) -> Probe:
    """Fits a task's linear probe to a training split.

    AdamW on batches of images. A step sees one cell of each image: the output is cut into a grid of crops of
    `config.crop` of its side, and an image shows the next of its cells each epoch, so that every pixel of
    the split is seen equally often. The seed decides on the initial weights and on the order; nothing else
    is random.

    The bias learns sqrt(C) times as fast as a weight. Conditioned features have zero mean, so that the
    bias alone carries the mean of an output, while C weights move together for everything else; at one
    rate for both, absolute depth would take most of the training.

    Args:
        task: Gives the loss and the number of outputs.
        dataset: What the samples are of.
        upsampled: The method's features of the split.
        samples: Ground truth of the same images in the same order, at `upsampled.output_size`.
        config: How to train.
        seed: Any integer.
        progress: Told after each of the `training_steps`, with the loss.

    Raises:
        UpbenchError: Images without the task's ground truth or of another size, features that are not
            finite, or a loss that is not.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = _Targets(task, samples, upsampled)
    conditioning = Conditioning.of(upsampled.features, config.shrinkage)
    channels = int(upsampled.features.shape[1])
    weight = torch.randn(task.probe_channels(dataset), channels, generator=generator) * _INITIAL_STD
    weight = weight.to(upsampled.device).requires_grad_()
    bias = torch.zeros(len(weight), device=upsampled.device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight], "weight_decay": config.weight_decay, "peak": config.lr},
            {"params": [bias], "weight_decay": 0.0, "peak": config.lr * math.sqrt(channels)},
        ],
        fused=True,
    )
    steps = training_steps(len(samples), config)
    losses: list[float] = []
    for step, batch in enumerate(_batches(len(samples), upsampled.output_size, config, generator)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, steps, config)
        folded = conditioning.fold(weight, bias)
        prediction = torch.stack([upsampled.logits(index, *folded, crop) for index, crop in batch])
        loss = task.loss(prediction, *targets.batch(batch))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UpbenchError(
                f"the loss of task '{task.name}' is {losses[-1]} at step {step}: training diverged"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress:
            progress.advance()
            progress.note(f"loss {losses[-1]:.3f}")
    with torch.no_grad():
        folded = conditioning.fold(weight, bias)
    tail = losses[-max(1, steps // 10) :]
    return Probe(folded[0].detach(), folded[1].detach(), sum(tail) / len(tail), steps)


@torch.no_grad()
def evaluate(
    task: Task,
    dataset: Dataset,
    probe: Probe,
    upsampled: Upsampled,
    samples: Sequence[Sample],
    progress: Bar | None = None,
) -> Evaluation:
    """Metrics of a probe on a split, at the full output resolution.

    Args:
        task: Gives the metrics.
        dataset: What the samples are of.
        probe: Trained for the same method, backbone and task.
        upsampled: The method's features of the split.
        samples: Ground truth of the same images in the same order, at `upsampled.output_size`.
        progress: Told after each image.

    Raises:
        UpbenchError: As `train_probe`.
    """
    evaluator = task.evaluator(dataset)
    per_image, names = [], []
    for index, sample in enumerate(samples):
        _require_target(task, sample, upsampled)
        prediction = upsampled.logits(index, probe.weight, probe.bias)
        per_image.append(evaluator.update(prediction.cpu(), sample))
        names.append(sample.name)
        if progress:
            progress.advance()
    return Evaluation(evaluator.compute(), per_image, names)


def training_steps(count: int, config: ProbeConfig) -> int:
    """How many steps `train_probe` takes on so many images."""
    return config.epochs * math.ceil(count / config.batch_size)


def learning_rate_factor(step: int, steps: int, config: ProbeConfig) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then `config.schedule`."""
    warm = round(config.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def grid(output_size: tuple[int, int], share: float) -> list[Crop]:
    """Crops of `share` of each side that cover the output; they part it exactly where 1 / share is an
    integer.

    Crops at random positions would show the borders of an image a hundred times less often than its middle.
    """
    axes = []
    for length in output_size:
        side = max(1, round(share * length))
        count = math.ceil(length / side)
        starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
        axes.append([slice(start, start + side) for start in starts])
    return [(rows, cols) for rows in axes[0] for cols in axes[1]]


def _batches(
    count: int, output_size: tuple[int, int], config: ProbeConfig, generator: torch.Generator
) -> Iterator[list[tuple[int, Crop]]]:
    """Every step's images and the cell of each that it sees."""
    cells = grid(output_size, config.crop)
    order = torch.randperm(len(cells), generator=generator).tolist()
    first = torch.randint(len(cells), (count,), generator=generator).tolist()
    for epoch in range(config.epochs):
        images = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, config.batch_size):
            chosen = images[start : start + config.batch_size]
            yield [(i, cells[order[(first[i] + epoch) % len(cells)]]) for i in chosen]


class _Targets:
    """Ground truth of a split as the loss takes it."""

    def __init__(self, task: Task, samples: Sequence[Sample], upsampled: Upsampled) -> None:
        if len(samples) != len(upsampled) or not len(samples):
            raise UpbenchError(f"{len(upsampled)} upsampled images do not go with {len(samples)} samples")
        self.task = task
        self.samples = samples
        self.upsampled = upsampled

    def batch(self, batch: list[tuple[int, Crop]]) -> tuple[Tensor, Tensor]:
        """Targets and valid masks of the cells of a step."""
        targets, valid = [], []
        for index, (rows, cols) in batch:
            sample = self.samples[index]
            targets.append(_require_target(self.task, sample, self.upsampled)[..., rows, cols])
            valid.append(sample.valid[rows, cols])
        device = self.upsampled.device
        return torch.stack(targets).to(device), torch.stack(valid).to(device)


def _require_target(task: Task, sample: Sample, upsampled: Upsampled) -> Tensor:
    target: Tensor | None = getattr(sample, task.target, None)
    if target is None:
        raise UpbenchError(
            f"task '{task.name}' needs {task.target}, which image '{sample.name}' does not have"
        )
    if tuple(target.shape[-2:]) != upsampled.output_size:
        raise UpbenchError(
            f"ground truth of image '{sample.name}' is {list(target.shape[-2:])}, the output "
            f"{list(upsampled.output_size)}"
        )
    return target
