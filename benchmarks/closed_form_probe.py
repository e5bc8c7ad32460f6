"""Whether a ranking in segmentation is the probe's doing: the same methods under a classifier that is solved.

    python benchmarks/closed_form_probe.py [--methods bilinear,raysup,anyup:FILE] [--out FILE.json]

The classifier is linear discriminant analysis: Gaussians of one covariance, whose optimum is closed. It has
no step size, no seed and no conditioning, and its statistics are those of the method's own outputs, all
pixels of the training split. Where a method does badly under the trained probe and well here, the probe is to
blame. A method is NAME or NAME:WEIGHTS, as in `upbench run`. The table has every other split's
mean and boundary IoU; docs/protocol.md shows what it printed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.dense.view import Upsampled
from upbench.errors import UpbenchError
from upbench.evaluate.protocol import find_preset
from upbench.features.backbones import load_backbone
from upbench.features.store import cached_features
from upbench.registry import find_task, open_dataset
from upbench.results.records import write_json
from upbench.run.build import splits
from upbench.run.samples import Samples
from upbench.system.environment import describe
from upbench.system.progress import track
from upbench.weights.load import load_method

_SHRINKAGE = 1e-3  # of the mean variance, added to every axis: rank-deficient outputs stay solvable
_SAMPLE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Classifier:
    """Linear discriminants. Attributes: weight: `[K, C]`; bias: `[K]`; both float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """`[C, H, W]` to `[K, H, W]` scores."""
        scores = self.weight @ features.flatten(1) + self.bias[:, None]
        return scores.reshape(-1, *features.shape[1:])


class Statistics:
    """Counts, sums and second moments of features by class, from which the classifier follows.

    Sums are taken about the first image's mean: those of a vision transformer lie far from zero.
    """

    def __init__(self, channels: int, classes: int) -> None:
        """Args: channels: C; classes: K."""
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.sums = torch.zeros(classes, channels, dtype=torch.float64)
        self.moments = torch.zeros(channels, channels, dtype=torch.float64)
        self.origin: Tensor | None = None

    def add(self, features: Tensor, sample: Sample) -> None:
        """One image's `[C, H, W]` features at its labelled pixels."""
        label = labels(sample).flatten()
        kept = label != IGNORE
        x, y = features.flatten(1)[:, kept], label[kept]
        if self.origin is None:
            self.origin = x.mean(1, keepdim=True)
        x = x - self.origin
        self.moments += (x @ x.T).double()
        self.count += torch.bincount(y, minlength=len(self.count))
        self.sums.index_add_(0, y, x.T.double())

    def classifier(self) -> Classifier:
        """Discriminants w_k = S^-1 m_k, b_k = ln p_k - m_k . w_k / 2, with S the covariance
        within classes."""
        if self.origin is None:
            raise UpbenchError("there is no image to fit a classifier to")
        means = self.sums / self.count.clamp(min=1)[:, None]
        within = (self.moments - self.sums.T @ means) / self.count.sum()
        within.diagonal().add_(_SHRINKAGE * within.diagonal().mean())
        weight = torch.linalg.solve(within, means.T).T
        bias = (self.count / self.count.sum()).log() - 0.5 * (weight * means).sum(1)
        bias = bias - weight @ self.origin[:, 0].double()
        return Classifier(weight.float(), bias.float())


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--methods", default="bilinear,raysup,anyup")
    parser.add_argument("--backbone", default="dinov2_vits14_focus")
    parser.add_argument("--dataset", default="interiors", help="NAME or NAME:FOLDER")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--limit", type=int, help="images of each split")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result["splits"]))
    if arguments.out:
        write_json(arguments.out, result)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Metrics by method and split, and the machine."""
    dataset = open_dataset(arguments.dataset)
    if "label" not in dataset.targets:
        raise UpbenchError(f"dataset '{dataset.name}' has no classes to tell apart")
    backbone = load_backbone(arguments.backbone, "cpu")
    preset = find_preset(arguments.preset)
    train, *others = splits(dataset)
    views: dict[str, tuple[Samples, Tensor]] = {}
    for split in (train, *others):
        low = cached_features(backbone, dataset, split, preset.image_size, limit=arguments.limit)
        samples = Samples(dataset, split, preset.output_size, arguments.limit, _SAMPLE_BYTES)
        views[split] = samples, low.features
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for spec in arguments.methods.split(","):
        name, _, weights = spec.partition(":")
        method = load_method(name, weights or "default", channels=backbone.channels)
        size = (preset.output_size, preset.output_size)
        upsampled = {split: Upsampled(method, *view, size) for split, view in views.items()}
        classifier = fit(upsampled[train], dataset, f"{spec} {train}")
        scores[spec] = {
            split: score(classifier, upsampled[split], dataset, f"{spec} {split}") for split in others
        }
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    return {"arguments": settings, "environment": describe(), "splits": scores}


@torch.no_grad()
def fit(upsampled: Upsampled, dataset: Dataset, description: str) -> Classifier:
    """The classifier of a training split."""
    statistics = Statistics(int(upsampled.features.shape[1]), len(dataset.classes))
    for index in track(range(len(upsampled)), description):
        statistics.add(upsampled.dense(index), upsampled.samples[index])
    return statistics.classifier()


@torch.no_grad()
def score(
    classifier: Classifier, upsampled: Upsampled, dataset: Dataset, description: str
) -> dict[str, float]:
    """The segmentation task's metrics of a split, in per cent."""
    evaluator = find_task("seg")().evaluator(dataset)
    for index in track(range(len(upsampled)), description):
        evaluator.update(classifier(upsampled.dense(index)), upsampled.samples[index])
    return evaluator.compute()


def labels(sample: Sample) -> Tensor:
    """`[H, W]` int64 classes, ignored where the sample is not valid."""
    if sample.label is None:
        raise UpbenchError(f"image '{sample.name}' has no labels")
    return sample.label.masked_fill(~sample.valid, IGNORE)


def table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """mIoU and boundary IoU of each split, a row for each method."""
    names = list(next(iter(scores.values())))
    titles = " | ".join(f"{split} mIoU | {split} boundary IoU" for split in names)
    lines = [f"| method | {titles} |", f"|---|{'--:|--:|' * len(names)}"]
    for method, values in scores.items():
        cells = " | ".join(f"{values[s]['miou']:.2f} | {values[s]['boundary_iou']:.2f}" for s in names)
        lines.append(f"| `{method}` | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
