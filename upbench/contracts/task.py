"""The contract of a task: what dense features are good for, and how well."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from upbench.contracts.registered import Registered

if TYPE_CHECKING:
    from upbench.contracts.dataset import Dataset
    from upbench.contracts.sample import Sample


@dataclass(frozen=True)
class Metric:
    """A column of a table.

    Attributes:
        name: Key in records, as in "miou".
        title: Header in tables, as in "mIoU".
        higher_is_better: Direction.
        unit: As in "%", "m", "deg"; "" for a plain number.
    """

    name: str
    title: str
    higher_is_better: bool
    unit: str = ""


class Evaluator:
    """Accumulates a task's metrics over a split, image by image."""

    @abstractmethod
    def update(self, prediction: Tensor, sample: Sample) -> float:
        """Adds one image.

        Args:
            prediction: `[K, H, W]`, the probe's raw output at the size of the sample.
            sample: The ground truth.

        Returns:
            The image's own value of the primary metric; nan where the image has no valid pixel for it.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Every metric of the task over all images so far, by name."""


class Task(Registered):
    """What dense features are good for: a linear probe, its loss and its metrics.

    Attributes:
        name: Name on the command line and in records.
        title: Name in tables.
        target: Field of `Sample` that holds the ground truth: "label", "depth" or "normal".
        metrics: What `evaluator` computes, the first the most important.
        primary: Name of the metric that tables show first and whose per-image values records keep.
        headline: Names of the metrics that tables show unless asked for all; the first two where empty.
        datasets: Names of the datasets that the task runs on by default.
        probe: Settings of `upbench.evaluate.protocol.ProbeConfig` that differ from the preset's for this
            task.
    """

    kind: ClassVar[str] = "task"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    title: ClassVar[str] = ""
    target: ClassVar[str]
    metrics: ClassVar[Sequence[Metric]]
    primary: ClassVar[str]
    headline: ClassVar[Sequence[str]] = ()
    datasets: ClassVar[Sequence[str]] = ("interiors",)
    probe: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def probe_channels(self, dataset: Dataset) -> int:
        """K, the outputs of the 1x1 probe."""

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
    def evaluator(self, dataset: Dataset) -> Evaluator:
        """A fresh accumulator of this task's metrics."""

    def skip_reason(self, dataset: Dataset) -> str | None:
        """Why the task cannot run on this dataset, or None where it can."""
        if self.target not in dataset.targets:
            return f"dataset '{dataset.name}' has no {self.target}"
        return None
