"""What a task's author reads: `Task`, its `Scores`, and the `Context` that a cell is evaluated in.

A task has one job: `evaluate(context)` turns dense features into scores. Tasks that train a linear probe are
`upbench.ProbeTask`s and say only what a probe puts out, its loss and its metrics. Any other task is free:

    class Sharpness(Task):
        name = "sharpness"
        metrics = (Metric("gradient", "Gradient", higher_is_better=True),)
        primary = "gradient"

        def evaluate(self, context):
            scores = Scores()
            for split in context.dataset.eval_splits:
                dense = context.dense(split)
                own = [dense.batch([i]).dense().diff(dim=-1).abs().mean() for i in range(len(dense))]
                scores.add(split, {"gradient": sum(own) / len(own)}, context.samples(split).names, own)
            return scores
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar
from typing import Protocol as Interface

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.geometry import Frame, Size
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.registered import Registered
from upbench.contracts.sample import IGNORE, Framed, Sample
from upbench.errors import UpbenchError

T = TypeVar("T")
Crop = tuple[slice, slice]
"""Rows and columns of an output, with step 1."""


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


class Labelled(Interface):
    """An image's ground truth, with labels of any integer type."""

    @property
    def name(self) -> str: ...
    @property
    def valid(self) -> Tensor: ...
    @property
    def label(self) -> Tensor | None: ...
    @property
    def depth(self) -> Tensor | None: ...
    @property
    def normal(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Truth:
    """Ground truth of a batch, all of one size; what a dataset does not have is None.

    Attributes:
        names: The images.
        valid: `[B, H, W]` bool.
        label: `[B, H, W]` int64, 255 ignored.
        depth: `[B, H, W]` float32 metres, 0 where unknown.
        normal: `[B, 3, H, W]` float32.
    """

    names: tuple[str, ...]
    valid: Tensor
    label: Tensor | None = None
    depth: Tensor | None = None
    normal: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def stack(cls, framed: Sequence[Labelled], device: torch.device | str = "cpu") -> Truth:
        """The ground truth of some images (`Framed`, or what has its fields); those that are smaller than
        others are padded with what is not valid."""
        height = max(int(one.valid.shape[-2]) for one in framed)
        width = max(int(one.valid.shape[-1]) for one in framed)

        def stacked(name: str, fill: int) -> Tensor | None:
            values = [getattr(one, name) for one in framed]
            if any(value is None for value in values):
                return None
            together = torch.stack([_padded(value, height, width, fill) for value in values])
            if name == "label":
                together = together.long()
            if torch.device(device).type == "cuda":  # so that the copy need not be waited for
                return together.pin_memory().to(device, non_blocking=True)
            return together.to(device)

        valid = stacked("valid", 0)
        assert valid is not None
        names = tuple(one.name for one in framed)
        return cls(names, valid, stacked("label", IGNORE), stacked("depth", 0), stacked("normal", 0))

    def target(self, name: str) -> Tensor:
        """The field of that name.

        Raises:
            UpbenchError: The images do not have it.
        """
        value: Tensor | None = getattr(self, name, None)
        if value is None:
            raise UpbenchError(f"image '{self.names[0]}' does not have {name}")
        return value

    def rows(self, start: int, stop: int) -> Truth:
        """Some images of the batch."""
        parts = (self.valid, self.label, self.depth, self.normal)
        valid, *rest = (None if part is None else part[start:stop] for part in parts)
        assert valid is not None
        return Truth(self.names[start:stop], valid, *rest)


def _padded(values: Tensor, height: int, width: int, fill: int) -> Tensor:
    missing = (0, width - int(values.shape[-1]), 0, height - int(values.shape[-2]))
    return F.pad(values, missing, value=fill) if any(missing) else values


class Evaluator(ABC):
    """Accumulates a task's metrics over a split, batch by batch, on whichever device the batches are."""

    @abstractmethod
    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        """Adds some images.

        Args:
            prediction: `[B, ..., H, W]`, what the task decoded (`ProbeTask.decode`: classes, metres, vectors)
                at the size of the ground truth.
            truth: The same B images.

        Returns:
            `[B]` each image's own value of the primary metric, on any device; nan where the image has no
            valid pixel for it. Nothing here should wait for the device.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Every metric of the task over all images so far, by name."""


@dataclass
class Scores:
    """What an evaluation found.

    Attributes:
        metrics: Split -> metric -> values, one per seed (one in all for a task that draws nothing).
        per_image: Split -> {"names": images, "values": one list per seed} of the primary metric; nan where an
            image has no value.
        notes: What a reader of the numbers must know.
    """

    metrics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    per_image: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(
        self, split: str, metrics: Mapping[str, Any], names: Sequence[str] = (), values: Sequence[Any] = ()
    ) -> None:
        """Adds one seed's results on a split.

        Args:
            split: Name of the split.
            metrics: Metric -> number (or a tensor of one).
            names: The images, for the paired comparison between methods.
            values: Each image's own value of the primary metric.

        Raises:
            UpbenchError: Something that is no number; as many values as names are needed, of the same images
                for every seed.
        """
        if not isinstance(metrics, Mapping):
            raise UpbenchError(f"metrics of split '{split}' are a {type(metrics).__name__}, not a mapping")
        of_split = self.metrics.setdefault(split, {})
        for name, value in metrics.items():
            of_split.setdefault(name, []).append(number(value, f"metric '{name}' on split '{split}'"))
        if not len(names):
            return
        held = self.per_image.setdefault(split, {"names": list(names), "values": []})
        if len(values) != len(names) or held["names"] != list(names):
            raise UpbenchError(f"scores of split '{split}': values and names of images do not agree")
        held["values"].append([number(value, f"images of split '{split}'") for value in values])


def number(value: Any, what: str) -> float:
    """A value as a plain number.

    Args:
        value: A real number, or a tensor or an array of one.
        what: It is, for messages.

    Raises:
        UpbenchError: It is something else, such as None, a text, or a complex number.
    """
    kind = str(getattr(value, "dtype", ""))
    if hasattr(value, "__float__") and not isinstance(value, (str, bytes)) and "complex" not in kind:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of a tensor of several
            pass
    shape = getattr(value, "shape", None)
    found = f"{kind or type(value).__name__}{'' if shape is None else f' {list(shape)}'}"
    raise UpbenchError(f"{what}: expected a number, got {found}")


class Images(ABC):
    """The frames of a split under a protocol, in the dataset's order."""

    names: Sequence[str]
    """Of every frame; of every image, where each has one frame."""

    reads: bool = False
    """Whether frames are read from disk each time, as they do not fit into memory."""

    def prefetch(self, indices: Sequence[int]) -> object:
        """Reads frames that will be asked for soon. Called from threads.

        Returns:
            What holds them: once it is let go of, they may be read anew.
        """
        return None

    @abstractmethod
    def __len__(self) -> int:
        """How many frames there are."""

    @abstractmethod
    def output_size(self, index: int) -> Size:
        """(H, W) of the upsampled features of a frame."""

    @abstractmethod
    def stored(self, index: int) -> Sample:
        """The image of a frame, as the dataset gives it."""

    @abstractmethod
    def frame(self, index: int) -> Frame:
        """Where a frame lies in its image."""

    @abstractmethod
    def framed(self, index: int, size: Size | None = None) -> Framed:
        """A frame, with ground truth of some size (that of the protocol's output by default)."""

    @abstractmethod
    def truth(
        self,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        crops: Sequence[Crop] | None = None,
    ) -> Truth:
        """Ground truth of some frames at the size of the output, or of a rectangle of each.

        Raises:
            UpbenchError: A rectangle that lies outside of a frame's ground truth.
        """


class DenseBatch(ABC):
    """Upsampled features of a few frames, as an operator: nothing of C channels is made unless asked for."""

    @abstractmethod
    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear map of every pixel's features; differentiable with respect to weight and bias.

        Args:
            weight: `[K, C]`, or `[B, K, C]` for one of its own for each frame.
            bias: `[K]`, or `[B, K]`.

        Returns:
            `[B, K, H, W]`; frames that are smaller than others are padded with zeros.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """`[B, C, H, W]` the features themselves."""

    @abstractmethod
    def at(self, points: Tensor) -> Tensor:
        """Features of single pixels only.

        Args:
            points: `[B, P, 2]` int64 (row, column) of the output.

        Returns:
            `[B, C, P]`.
        """


class DenseFeatures(ABC):
    """A method's features of a split."""

    @abstractmethod
    def __len__(self) -> int:
        """How many frames there are."""

    @abstractmethod
    def output_size(self, index: int) -> Size:
        """(H, W) of a frame's features."""

    @abstractmethod
    def batch(self, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> DenseBatch:
        """Some frames, all of each or one rectangle of each."""


class Context(ABC):
    """What a task evaluates a method in.

    Attributes:
        protocol: The rules.
        dataset: The images.
        seeds: Of whatever is drawn at random.
        device: Where to compute.
        channels: C of the backbone's features.
        tasks: Those that the method is evaluated on in this run, on these data; for tasks that share work.
    """

    protocol: Protocol
    dataset: Dataset
    seeds: tuple[int, ...]
    device: torch.device
    channels: int
    tasks: Sequence[Task] = ()

    @abstractmethod
    def samples(self, split: str, mirrored: bool = False) -> Images:
        """The frames of a split, with their ground truth."""

    @abstractmethod
    def features(self, split: str, mirrored: bool = False, token: bool = False) -> Any:
        """Low-resolution features of a split's frames (`upbench.features.store.FeatureStore`), with their
        class tokens where asked for."""

    @abstractmethod
    def dense(self, split: str, mirrored: bool = False) -> DenseFeatures:
        """The method's features of a split's frames, or of the frames with left and right exchanged."""

    @abstractmethod
    def upsample(self, image: Tensor, features: Tensor, output_size: Size) -> Tensor:
        """The method on anything: `[B, 3, h, w]` in 0..1 and `[B, C, h', w']` to `[B, C, H, W]`."""

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """The backbone on anything: `[B, 3, h, w]` in 0..1 to `[B, C, h', w']`."""

    @abstractmethod
    def recipe(self, settings: Mapping[str, Any] | None = None) -> Recipe:
        """How a probe is trained here: the protocol's recipe, then a task's settings, then the user's."""

    @abstractmethod
    def shared(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all methods on this backbone, dataset and protocol.

        Args:
            key: Names it among all that tasks share; hashable.
            make: Must not depend on the method.
        """

    @abstractmethod
    def of_method(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all tasks of this method; otherwise as `shared`."""

    @abstractmethod
    def progress(self, title: str, total: int) -> AbstractContextManager[Any]:
        """A bar: `with context.progress("matching", 100) as bar: bar.advance()`."""


class Task(Registered, ABC):
    """What dense features are good for. A subclass with a `name` is registered.

    Attributes:
        name: Name on the command line and in records.
        title: Name in tables.
        metrics: What `evaluate` reports.
        primary: Name of the metric that tables show first and whose per-image values records keep.
        headline: Names of the metrics that tables show unless asked for all; the first two where empty.
        needs: Fields of `Sample` that a dataset must fill ("label", "depth", "normal").
        content: What it runs on: datasets of "images", "video" or "pairs".
        datasets: Names of the datasets that the task runs on by default.
    """

    kind: ClassVar[str] = "task"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    title: ClassVar[str] = ""
    metrics: ClassVar[Sequence[Metric]]
    primary: ClassVar[str]
    headline: ClassVar[Sequence[str]] = ()
    needs: ClassVar[Sequence[str]] = ()
    content: ClassVar[str] = "images"
    datasets: ClassVar[Sequence[str]] = ("interiors",)

    @abstractmethod
    def evaluate(self, context: Context) -> Scores:
        """Scores of the method that `context` holds."""

    def skip_reason(self, dataset: Dataset, protocol: Protocol | None = None) -> str | None:
        """Why the task cannot run on this dataset under this protocol, or None where it can."""
        if dataset.content != self.content:
            return (
                f"task '{self.name}' runs on {self.content}, dataset '{dataset.name}' has {dataset.content}"
            )
        for need in self.needs:
            if need not in dataset.targets:
                return f"dataset '{dataset.name}' has no {need}"
        if protocol is not None and protocol.tasks and self.name not in protocol.tasks:
            return f"protocol '{protocol.name}' is for {', '.join(protocol.tasks)}"
        return None

    def under(self, protocol: Protocol) -> Task:
        """The task as it is measured under a protocol: this one, unless it knows several objectives
        (`Protocol.objective`)."""
        return self

    def settings(self) -> dict[str, Any]:
        """What of the task itself decides on its numbers beside its code, for records."""
        return {}
