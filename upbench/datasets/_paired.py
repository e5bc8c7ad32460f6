"""Datasets of images with label maps in files of their own: what those of the papers have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._content import content_fingerprint
from upbench.datasets._files import image_size, read_image, read_labels
from upbench.datasets._layout import locate
from upbench.errors import UpbenchError

_INVALID = -1


class ImageFiles(NamedTuple):
    """An image and its label map, not yet looked at.

    Attributes:
        name: As in `Dataset.names`.
        image: File of the image.
        label: File of the label map.
    """

    name: str
    image: Path
    label: Path


class PairedDataset(Dataset):
    """A subclass says where the files of a split are (`find`) and what the values in label maps mean.

    Of an image that a split names neither the picture nor the label map may be there: what is left is a
    partial copy, and said to be one by the official `counts`. One without the other is an error.

    Attributes:
        folders: Split -> what the official data calls it; these are the splits that there are.
        places: Where, below the user's folder, the layout may begin.
        needed: Files and folders that it has there.
        layout: The same in words, for errors.
        values: Value in a label map -> class, or 255. Any other value is an error, but for 255.
    """

    targets = frozenset({"label"})
    needs_root = True
    folders: Mapping[str, str] = {"train": "train", "val": "val"}
    places: ClassVar[Sequence[str]] = ("",)
    needed: ClassVar[Sequence[str]]
    layout: ClassVar[str]
    values: Mapping[int, int]

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        super().__init__(root)
        self.base = self.locate()
        self._pairs: dict[str, list[ImageFiles]] = {}
        self._fingerprints: dict[str, str] = {}

    def locate(self) -> Path:
        """The folder that the layout begins in.

        Raises:
            UpbenchError: It is not there.
        """
        return locate(self.name, self.root, self.places, self.needed, self.layout)

    @abstractmethod
    def find(self, split: str) -> Iterable[ImageFiles]:
        """The images of a split of `folders`, in order, whether their files are there or not.

        Raises:
            UpbenchError: A list that cannot be read.
        """

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [pair.name for pair in self.pairs(split)]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        pair = self.pairs(split)[index]
        image = read_image(pair.image)
        return Sample(pair.name, image, label=self.labels(pair.label, self.read_label(pair.label), image))

    def read_label(self, file: Path, data: bytes | None = None) -> Tensor:
        """`[H, W]`, as stored; for label maps that are no images, to be overridden."""
        return read_labels(file, data)

    def values_in(self, file: Path) -> Mapping[int, int]:
        """What values mean in a label map; for data with maps of two kinds, to be overridden."""
        return self.values

    def facts(self, split: str) -> object:
        """What decides on labels besides the files, for the fingerprint."""
        return self.classes, sorted(self.values.items())

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        return image_size(self.pairs(split)[index].image)

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`. Reads and checks every file of the split once, until one is touched."""
        if split not in self._fingerprints:
            files = [(pair.image, pair.label) for pair in self.pairs(split)]
            title = f"{self.name}/{split}"
            self._fingerprints[split] = content_fingerprint(title, files, self.facts(split), self.check)
        return self._fingerprints[split]

    def pairs(self, split: str) -> list[ImageFiles]:
        """The images of a split that are there.

        Raises:
            UpbenchError: An unknown split, an image without label map or the reverse, or too many of them.
        """
        if split not in self.folders:
            raise self.unknown_split(split, list(self.folders))
        if split not in self._pairs:
            self._pairs[split] = self._complete(split, list(self.find(split)))
        return self._pairs[split]

    def _complete(self, split: str, named: Sequence[ImageFiles]) -> list[ImageFiles]:
        listed: dict[Path, frozenset[str]] = {}

        def there(file: Path) -> bool:
            if file.parent not in listed:
                listed[file.parent] = entries(file.parent)
            return file.name in listed[file.parent]

        found = [(pair, there(pair.image), there(pair.label)) for pair in named]
        alone = [(pair, image) for pair, image, label in found if image != label]
        if alone:
            pair, image = alone[0]
            have, lack = ("image", "label map") if image else ("label map", "image")
            file, other = (pair.image, pair.label) if image else (pair.label, pair.image)
            count = sum(has_image == image for _, has_image in alone)
            raise UpbenchError(
                f"dataset '{self.name}': {count} of {len(named)} {have}s of split '{split}' have no {lack}; "
                f"the first: {file.name} (expected {other})"
            )
        pairs = [pair for pair, image, _ in found if image]
        if not pairs:
            first = f" (the first would be {named[0].image})" if named else ""
            raise UpbenchError(f"dataset '{self.name}': split '{split}' in {self.base} has no images{first}")
        if odd_names := [pair.name for pair in pairs if not pair.name.isprintable()]:
            raise UpbenchError(
                f"dataset '{self.name}': image '{odd_names[0]}' of split '{split}' has a name that is "
                "not UTF-8, or has control characters; rename it"
            )
        official = self.counts.get(split)
        if official is not None and len(pairs) > official:
            raise UpbenchError(
                f"dataset '{self.name}': split '{split}' in {self.base} has {len(pairs)} images, the "
                f"official one {official}: this is another dataset, or files were added"
            )
        return pairs

    def labels(self, file: Path, stored: Tensor, image: Tensor) -> Tensor:
        """`[h, w]` uint8 classes of a label map, checked."""
        if stored.shape != image.shape[1:]:
            (h, w), (lh, lw) = image.shape[1:], stored.shape
            raise UpbenchError(f"label map {file} is {lw}x{lh}, its image {w}x{h}")
        values = self.values_in(file)
        table = torch.tensor([values.get(value, _INVALID) for value in range(257)], dtype=torch.int16)
        table[IGNORE] = IGNORE
        classes = table[stored.long().clamp(0, 256)]
        if (classes == _INVALID).any():
            value = int(stored[classes == _INVALID][0])
            raise UpbenchError(
                f"label map {file} has value {value}, which dataset '{self.name}' has no meaning for "
                f"(known: {_runs([*values, IGNORE])})"
            )
        return classes.to(torch.uint8)

    def check(self, files: Sequence[Path], contents: Sequence[bytes]) -> None:
        """Raises UpbenchError for an image and a label map that are no good."""
        (image, label), (image_data, label_data) = files, contents
        self.labels(label, self.read_label(label, label_data), read_image(image, image_data))


def _runs(values: Iterable[int]) -> str:
    """Numbers as "0 to 20, 255"."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def entries(folder: Path) -> frozenset[str]:
    """Names of the files in a folder; none where there is no such folder."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def stems(folder: Path, suffix: str) -> set[str]:
    """Names, without the suffix, of the files in a folder that end in it; hidden ones are left out."""
    return {each.removesuffix(suffix) for each in entries(folder) if each.endswith(suffix) and each[0] != "."}
