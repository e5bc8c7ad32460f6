"""What a dataset's author reads: `Dataset`, and its relatives for sequences and pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from upbench.contracts.registered import Registered
from upbench.contracts.sample import Sample
from upbench.errors import UpbenchError, unknown


@dataclass(frozen=True)
class Archive:
    """A file that a dataset is downloaded as (`upbench download NAME`).

    Attributes:
        url: Where it is.
        checksum: "md5:...", "sha1:..." or "sha256:...", as its owners or a well-kept library publish it; ""
            where nobody does.
        folder: Where it is unpacked, below the dataset's folder; a file that is no archive is put there.
        size: In bytes, where it is known.
    """

    url: str
    checksum: str = ""
    folder: str = ""
    size: int | None = None


class Dataset(Registered, ABC):
    """Images with labels, in splits. A subclass with a `name` is registered.

    It knows files and label values; what is resized, cropped or ignored is a protocol's business. A subclass
    defines `names`, `read` and `fingerprint`. It may be asked from several threads at once.

    Attributes:
        name: Name on the command line and in records.
        title: Name in tables.
        content: "images", "video" or "pairs".
        targets: Which fields of `Sample` it fills: "label", "depth", "normal".
        classes: Names of the semantic classes, in label order.
        other_class: Index of the class "other" or "unlabelled", where the labels have one that some protocols
            count and others ignore; None where they have not.
        train_split: Split that probes are trained on.
        eval_splits: Splits that metrics are computed on, one after the other.
        counts: Split -> how many images the official dataset has, where that is known: fewer are a partial
            copy, and records say so.
        needs_root: Whether a folder must be given (`name:/path`, or `$UPBENCH_DATA/name`).
        place: What stands behind the colon: "folder", "file", or "name" (the dataset itself finds what it
            stands for).
        folder: Its folder in `$UPBENCH_DATA`, where that is not called as the dataset: those that read the
            same files share one.
        license: Of the data, as its owners put it.
        source: Where it is to be had.
        citation: Of the paper.
        archives: What `upbench download` gets; none where that is not possible.
        by_hand: What a person has to do besides, step by step, such as to register.
    """

    kind: ClassVar[str] = "dataset"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    title: ClassVar[str] = ""
    content: ClassVar[str] = "images"
    targets: frozenset[str] = frozenset()
    classes: tuple[str, ...] = ()
    other_class: int | None = None
    train_split: str = "train"
    eval_splits: Sequence[str] = ("val",)
    counts: Mapping[str, int] = {}
    needs_root: ClassVar[bool] = False
    place: ClassVar[str] = "folder"
    folder: ClassVar[str] = ""
    license: ClassVar[str] = ""
    source: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    archives: ClassVar[Sequence[Archive]] = ()
    by_hand: ClassVar[Sequence[str]] = ()

    def __init__(self, root: Path | None = None) -> None:
        """Args: root: Folder of the data; None for data that comes with the package.

        Raises:
            UpbenchError: The folder is missing or is not such a dataset.
        """
        self.root = root

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it anew: lists of files do not travel."""
        return type(self), (self.root,)

    @property
    def splits(self) -> list[str]:
        """The splits that a cell touches: that of the training, then those of the evaluation."""
        return list(dict.fromkeys((self.train_split, *self.eval_splits)))

    @abstractmethod
    def names(self, split: str) -> list[str]:
        """Names of a split's images (sequences, pairs), in a fixed order.

        Raises:
            UpbenchError: A split that the dataset does not have, or images without labels.
        """

    @abstractmethod
    def read(self, split: str, index: int) -> Sample:
        """Image `index` of a split as it is stored, upright.

        Raises:
            UpbenchError: A file that cannot be read, or ground truth that does not fit it.
        """

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """A short hash that changes when any image or label of the split does, and only then: the same data
        in another place has the same one.

        Raises:
            UpbenchError: As `read`, for datasets that check every file once.
        """

    def size(self, split: str, index: int) -> tuple[int, int]:
        """(H, W) of an image; override it where that can be had without reading the image."""
        return self.read(split, index).size

    def unknown_split(self, split: str, choices: Sequence[str]) -> UpbenchError:
        """The error for a split that is not there."""
        return unknown(f"split of dataset '{self.name}'", split, choices)


class VideoDataset(Dataset):
    """Sequences of frames with label maps; `names` are those of the sequences.

    `read` gives the first frame of a sequence, as its sample; `frame` gives any.
    """

    content = "video"
    train_split = "val"

    @abstractmethod
    def length(self, split: str, index: int) -> int:
        """How many frames a sequence has."""

    @abstractmethod
    def frame(self, split: str, index: int, time: int) -> Sample:
        """Frame `time` of a sequence; its label map holds objects' ids, 0 for the background, where the frame
        is annotated."""

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        return self.frame(split, index, 0)


@dataclass(frozen=True)
class Pair:
    """Two images with points that belong together.

    Attributes:
        name: Identifies the pair within its split.
        source: Where points are given.
        target: Where they are looked for.
        source_points: `[P, 2]` float32 (x, y) in pixels of the source; pixel (i, j) has its centre at
            (j + 0.5, i + 0.5).
        target_points: `[P, 2]` the same points in the target.
        category: What the pair shows, for means over categories.
        extent: Length in pixels of the target that thresholds are fractions of (the longer side of the
            object's box, as a rule).
        attributes: What else results may be told apart by, such as a difference of viewpoints.
    """

    name: str
    source: Sample
    target: Sample
    source_points: Tensor
    target_points: Tensor
    category: str = ""
    extent: float = 0.0
    attributes: Mapping[str, float] | None = None


class PairDataset(Dataset):
    """Pairs of images with key points; `names` are those of the pairs."""

    content = "pairs"
    train_split = "test"
    eval_splits = ("test",)

    @abstractmethod
    def pair(self, split: str, index: int) -> Pair:
        """A pair."""

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`: the source of the pair."""
        return self.pair(split, index).source
