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
from upbench.contracts.protocol import Protocol
from upbench.contracts.sample import IGNORE
from upbench.contracts.task import Truth
from upbench.dense.method import MethodCall, resized_guidance
from upbench.errors import UpbenchError
from upbench.evaluate.task import ProbeTask
from upbench.features.backbones import load_backbone
from upbench.features.images import SplitImages
from upbench.features.store import FeatureStore
from upbench.registry import find_protocol, find_task, open_dataset
from upbench.results.records import write_json
from upbench.run.context import with_statistics
from upbench.system.environment import describe
from upbench.system.progress import track
from upbench.weights.load import load_method

_SHRINKAGE = 1e-3  # of the mean variance, added to every axis: rank-deficient outputs stay solvable
_IMAGE_BYTES = 1_000_000_000  # frames of a split that are kept in memory


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

    def add(self, features: Tensor, truth: Truth) -> None:
        """One image's `[C, H, W]` features at its labelled pixels."""
        label = truth.target("label").masked_fill(~truth.valid, IGNORE).flatten()
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
    parser.add_argument("--preset", "--protocol", default="quick")
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
    protocol = find_protocol(arguments.preset)()
    if protocol.scoring.at != "output":
        raise UpbenchError(f"protocol '{protocol.name}' scores elsewhere than at the size of the output")
    backbone = with_statistics(load_backbone(arguments.backbone, "cpu"), protocol.backbone_statistics)
    train, *others = dataset.splits
    views: dict[str, tuple[SplitImages, FeatureStore]] = {}
    for split in (train, *others):
        images = SplitImages(
            dataset, split, protocol, stride=backbone.stride, limit=arguments.limit, budget=_IMAGE_BYTES
        )
        views[split] = images, FeatureStore(backbone, images, dtype=protocol.features_dtype)
        views[split][1].prepare()
    judge = Judge(dataset, protocol)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for spec in arguments.methods.split(","):
        name, _, weights = spec.partition(":")
        method = load_method(name, weights or "default", channels=backbone.channels)
        call = MethodCall(method, backbone=backbone, statistics=protocol.guidance_statistics)
        upsampled = {split: Upsampled(call, *view) for split, view in views.items()}
        classifier = fit(upsampled[train], backbone.channels, judge.classes, f"{spec} {train}")
        scores[spec] = {
            split: judge.score(classifier, upsampled[split], f"{spec} {split}") for split in others
        }
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    return {"arguments": settings, "environment": describe(), "splits": scores}


@dataclass(frozen=True)
class Upsampled:
    """A split's upsampled features, by the method's own forward pass, computed when they are asked for.

    Attributes: call: The method; images: The frames; features: Theirs, at low resolution.
    """

    call: MethodCall
    images: SplitImages
    features: FeatureStore

    def __len__(self) -> int:
        return len(self.images)

    def dense(self, index: int) -> Tensor:
        """`[C, H, W]` of a frame."""
        size = self.images.output_size(index)
        image = self.images.image(index)[None]
        if self.images.protocol.guidance_size == "output":
            image = resized_guidance(image, size)
        return self.call.forward(image, self.features.batch([index]), size)[0]


@torch.no_grad()
def fit(upsampled: Upsampled, channels: int, classes: int, description: str) -> Classifier:
    """The classifier of a training split."""
    statistics = Statistics(channels, classes)
    for index in track(range(len(upsampled)), description):
        statistics.add(upsampled.dense(index), upsampled.images.truth([index]))
    return statistics.classifier()


class Judge:
    """The segmentation task's own view of what a classifier says."""

    def __init__(self, dataset: Dataset, protocol: Protocol) -> None:
        """Args: dataset, protocol: Decide on the classes that count."""
        task = find_task("seg")()
        assert isinstance(task, ProbeTask)
        self.task, self.dataset, self.protocol = task, dataset, protocol

    @property
    def classes(self) -> int:
        """K."""
        return self.task.outputs(self.dataset, self.protocol)

    @torch.no_grad()
    def score(self, classifier: Classifier, upsampled: Upsampled, description: str) -> dict[str, float]:
        """The task's metrics of a split, in per cent."""
        evaluator = self.task.evaluator(self.dataset, self.protocol)
        for index in track(range(len(upsampled)), description):
            scores = classifier(upsampled.dense(index))
            evaluator.update(self.task.decode(scores[None]), upsampled.images.truth([index]))
        return evaluator.compute()


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
