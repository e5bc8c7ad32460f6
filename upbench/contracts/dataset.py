"""The contract of a dataset: images with labels, in splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from upbench.contracts.registered import Registered
from upbench.contracts.sample import Sample
from upbench.errors import UpbenchError, unknown


class Dataset(Registered):
    """Images with labels, in splits. A subclass with a `name` is registered.

    Attributes:
        name: Name on the command line and in records.
        title: Name in tables.
        targets: Which fields of `Sample` it fills: "label", "depth", "normal".
        classes: Names of the semantic classes, in label order.
        train_split: Split that probes are trained on.
        eval_splits: Splits that metrics are computed on, one after the other.
        needs_root: Whether a folder must be given (`name:/path`, or `$UPBENCH_DATA/name`).
        licence, source: What a table's reader wants to know.
    """

    kind: ClassVar[str] = "dataset"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    title: ClassVar[str] = ""
    targets: frozenset[str] = frozenset()
    classes: tuple[str, ...] = ()
    train_split: str = "train"
    eval_splits: Sequence[str] = ("val",)
    needs_root: ClassVar[bool] = False
    licence: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __init__(self, root: Path | None = None) -> None:
        """Args: root: Folder of the data; None for data that comes with the package.

        Raises:
            UpbenchError: The folder is missing or is not such a dataset.
        """
        self.root = root

    @abstractmethod
    def names(self, split: str) -> list[str]:
        """Sample names of a split, in a fixed order.

        Raises:
            UpbenchError: A split that the dataset does not have, or images without labels.
        """

    @abstractmethod
    def load(self, split: str, index: int, size: int) -> Sample:
        """Sample `index` of a split as a square of `size` pixels (shorter side resized, then centre crop)."""

    @abstractmethod
    def fingerprint(self, split: str) -> str:
        """A short hash that changes when any image or label of the split does (caches are keyed by it)."""

    def unknown_split(self, split: str, choices: Sequence[str]) -> UpbenchError:
        """The error for a split that is not there."""
        return unknown(f"split of dataset '{self.name}'", split, choices)
