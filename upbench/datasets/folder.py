"""Segmentation datasets in a folder of images and label maps.

    folder/classes.txt              one class a line; the line number, from 0, is its value in the label maps
    folder/train/NAME.jpg           or .jpeg, .png, .bmp, .webp
    folder/trainannot/NAME.png      one channel
    folder/val/..., folder/valannot/...

A line that says `void` or `ignore` names a value that is not evaluated; so is 255. A label map fits the
upright image: where the image has an EXIF orientation, what is seen after it is applied.
"""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._content import content_fingerprint
from upbench.datasets._files import image_size, list_folder, read_image, read_labels, read_text
from upbench.errors import UpbenchError, system_errors

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IGNORED_NAMES = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})


class FolderDataset(Dataset):
    """Any labelled images in the layout above; `folder:/path` on the command line.

    The probe is trained on `train` and evaluated on `val`, or on `test` where there is no `val`.
    """

    name = "folder"
    title = "Folder"
    targets = frozenset({"label"})
    needs_root = True
    source = "the user's own"

    raw_names: ClassVar[tuple[str, ...]] = ()
    """Class of each value in the label maps, those to ignore included; read from classes.txt where empty."""

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        if root is None:
            raise UpbenchError(f"dataset '{self.name}' needs its folder: write {self.name}:/path")
        super().__init__(root)
        self._root = root
        raw = self.raw_names or _read_classes(root / "classes.txt")
        self.classes = tuple(name for name in raw if name.lower() not in IGNORED_NAMES)
        self._values = len(raw)
        self._table = torch.full((256,), IGNORE, dtype=torch.uint8)
        kept = [value for value, name in enumerate(raw) if name.lower() not in IGNORED_NAMES]
        self._table[kept] = torch.arange(len(kept), dtype=torch.uint8)
        self._pairs: dict[str, list[tuple[Path, Path]]] = {}
        self._fingerprints: dict[str, str] = {}
        self._check_splits()

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [image.stem for image, _ in self._files(split)]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        image_file, label_file = self._files(split)[index]
        image = read_image(image_file)
        return Sample(image_file.stem, image, label=self._label(label_file, read_labels(label_file), image))

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        return image_size(self._files(split)[index][0])

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`. Reads and checks every file of the split once, until one is touched.

        Raises:
            UpbenchError: As `read`, for any image of the split.
        """
        if split not in self._fingerprints:
            facts, title = (self.classes, self._table.tolist()), f"{self.name}/{split}"
            self._fingerprints[split] = content_fingerprint(title, self._files(split), facts, self._check)
        return self._fingerprints[split]

    def _check_splits(self) -> None:
        if type(self) is FolderDataset and self._has("test") and not self._has("val"):
            self.eval_splits = ("test",)
        for split in (self.train_split, *self.eval_splits):
            if not self._has(split):
                raise UpbenchError(f"dataset folder {self._root} needs folders '{split}' and '{split}annot'")

    def _has(self, split: str) -> bool:
        with system_errors(f"read the dataset folder {self._root}"):
            return (self._root / split).is_dir() and (self._root / f"{split}annot").is_dir()

    def _files(self, split: str) -> list[tuple[Path, Path]]:
        """(image, label map) of a split, by name."""
        if split not in self._pairs:
            self._pairs[split] = self._find(split)
        return self._pairs[split]

    def _find(self, split: str) -> list[tuple[Path, Path]]:
        if not self._has(split):
            splits = [p.name for p in list_folder(self._root) if self._has(p.name)]
            raise self.unknown_split(split, splits)
        folder, labels = self._root / split, self._root / f"{split}annot"
        images = [p for p in list_folder(folder) if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
        if not images:
            raise UpbenchError(f"dataset folder {folder} has no images ({', '.join(SUFFIXES)})")
        for image in images:
            _check_name(image)
        for one, other in itertools.pairwise(images):
            if one.stem == other.stem:
                raise UpbenchError(
                    f"dataset folder {folder} has two images of one name: {one.name}, {other.name}"
                )
        pairs = [(image, labels / f"{image.stem}.png") for image in images]
        there = {file.name for file in list_folder(labels)}
        if lacking := [pair for pair in pairs if pair[1].name not in there]:
            image, label = lacking[0]
            raise UpbenchError(
                f"{len(lacking)} of {len(pairs)} images in {folder} have no label map; "
                f"the first: {image.name} (expected {label})"
            )
        return pairs

    def _label(self, file: Path, label: Tensor, image: Tensor) -> Tensor:
        """`[h, w]` uint8 classes, checked."""
        if label.shape != image.shape[1:]:
            (h, w), (lh, lw) = image.shape[1:], label.shape
            hint = " (images are rotated as their EXIF orientation says: rotate the label map, too)"
            hint = hint if (lh, lw) == (w, h) else ""
            raise UpbenchError(f"label map {file} is {lw}x{lh}, its image {w}x{h}{hint}")
        out = label[(label >= self._values) & (label != IGNORE)]
        if len(out):
            raise UpbenchError(
                f"label map {file} has value {int(out[0])}, but there are {self._values} classes "
                f"(0 to {self._values - 1}; {IGNORE} and classes called 'void' are ignored)"
            )
        return self._table[label.long()]

    def _check(self, files: Sequence[Path], contents: Sequence[bytes]) -> None:
        """Raises UpbenchError for an image and a label map that are no good."""
        (image_file, label_file), (image, label) = files, contents
        self._label(label_file, read_labels(label_file, label), read_image(image_file, image))


def _check_name(file: Path) -> None:
    """Raises UpbenchError for a name that cannot stand in a record or a message."""
    if _unprintable(file.name):
        shown = repr(os.fsencode(file.name))[2:-1]
        raise UpbenchError(
            f"dataset folder {file.parent}: file name '{shown}' is not UTF-8, or has control characters; "
            "rename it"
        )


def _unprintable(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        lines = read_text(file).splitlines()
    except UpbenchError as error:
        needs = "needs classes.txt, a text that names one class a line"
        raise UpbenchError(f"dataset folder {file.parent} {needs} ({error})") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not any(name.lower() not in IGNORED_NAMES for name in names) or len(names) > IGNORE:
        raise UpbenchError(
            f"{file} must name 1 to {IGNORE} classes, one a line, and not only void; it names {len(names)}"
        )
    if odd := [name for name in names if _unprintable(name)]:
        raise UpbenchError(f"{file} names a class {odd[0]!r}, which has control characters")
    return names
