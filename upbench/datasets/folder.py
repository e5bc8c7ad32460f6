"""Segmentation datasets in a folder of images and label maps.

    folder/classes.txt              one class a line; the line number, from 0, is its value in the label maps
    folder/train/NAME.jpg           or .jpeg, .png, .bmp, .webp
    folder/trainannot/NAME.png      one channel
    folder/val/..., folder/valannot/...

A line that says `void` or `ignore` names a value that is not evaluated; so is 255.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._geometry import Fit
from upbench.errors import UpbenchError
from upbench.system.cache import cache_dir, digest, replacing
from upbench.system.progress import track

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IGNORED_NAMES = frozenset({"void", "ignore", "ignored", "unlabeled", "unlabelled"})

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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
        self._table = torch.full((256,), IGNORE, dtype=torch.int64)
        kept = [value for value, name in enumerate(raw) if name.lower() not in IGNORED_NAMES]
        self._table[kept] = torch.arange(len(kept))
        self._pairs: dict[str, list[tuple[Path, Path]]] = {}
        self._fingerprints: dict[str, str] = {}
        self._check_splits()

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        return [image.stem for image, _ in self._files(split)]

    def load(self, split: str, index: int, size: int) -> Sample:
        """See `Dataset.load`.

        Raises:
            UpbenchError: A file that cannot be read, or labels that do not fit the image or the classes.
        """
        image_file, label_file = self._files(split)[index]
        picture = _open(image_file)
        fit = Fit((picture.height, picture.width), size)
        label = fit.nearest(self._label(label_file, _open(label_file), picture))
        return Sample(image_file.stem, fit.image(picture), torch.ones_like(label, dtype=torch.bool), label)

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`. Reads and checks every file of the split once, until one is touched.

        Raises:
            UpbenchError: As `load`, for any image of the split.
        """
        if split not in self._fingerprints:
            self._fingerprints[split] = self._checked(split)
        return self._fingerprints[split]

    def _check_splits(self) -> None:
        if type(self) is FolderDataset and self._has("test") and not self._has("val"):
            self.eval_splits = ("test",)
        for split in (self.train_split, *self.eval_splits):
            if not self._has(split):
                raise UpbenchError(f"dataset folder {self._root} needs folders '{split}' and '{split}annot'")

    def _has(self, split: str) -> bool:
        return (self._root / split).is_dir() and (self._root / f"{split}annot").is_dir()

    def _files(self, split: str) -> list[tuple[Path, Path]]:
        """(image, label map) of a split, by name."""
        if split not in self._pairs:
            self._pairs[split] = self._find(split)
        return self._pairs[split]

    def _find(self, split: str) -> list[tuple[Path, Path]]:
        if not self._has(split):
            splits = [p.name for p in self._root.iterdir() if self._has(p.name)]
            raise self.unknown_split(split, splits)
        folder, labels = self._root / split, self._root / f"{split}annot"
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
        if not images:
            raise UpbenchError(f"dataset folder {folder} has no images ({', '.join(SUFFIXES)})")
        for one, other in itertools.pairwise(images):
            if one.stem == other.stem:
                raise UpbenchError(
                    f"dataset folder {folder} has two images of one name: {one.name}, {other.name}"
                )
        pairs = [(image, labels / f"{image.stem}.png") for image in images]
        if lacking := [pair for pair in pairs if not pair[1].is_file()]:
            image, label = lacking[0]
            raise UpbenchError(
                f"{len(lacking)} of {len(pairs)} images in {folder} have no label map; "
                f"the first: {image.name} (expected {label})"
            )
        return pairs

    def _label(self, file: Path, label: Image.Image, picture: Image.Image) -> torch.Tensor:
        """`[h, w]` int64 classes, checked."""
        if label.mode not in ("L", "P", "1"):
            raise UpbenchError(f"label map {file} must have one channel of 8 bits, it is {label.mode}")
        if label.size != picture.size:
            (w, h), (lw, lh) = picture.size, label.size
            raise UpbenchError(f"label map {file} is {lw}x{lh}, its image {w}x{h}")
        values = np.asarray(label, dtype=np.uint8)
        out = values[(values >= self._values) & (values != IGNORE)]
        if out.size:
            raise UpbenchError(
                f"label map {file} has value {out.flat[0]}, but there are {self._values} classes "
                f"(0 to {self._values - 1}; {IGNORE} and classes called 'void' are ignored)"
            )
        return self._table[torch.from_numpy(values.astype(np.int64))]

    def _checked(self, split: str) -> str:
        """Hash over names, files and classes; kept in the cache until a file changes its size or date."""
        pairs = self._files(split)
        stats = [(file.name, (s := file.stat()).st_size, s.st_mtime_ns) for pair in pairs for file in pair]
        note = cache_dir("datasets") / digest(
            self.name, self._root.resolve(), split, self._table.tolist(), stats
        )
        if note.is_file() and (known := note.read_text().strip()):
            return known
        content = hashlib.sha256(repr((self.classes, self._table.tolist())).encode())
        for image_file, label_file in track(pairs, f"checking {self.name}/{split}"):
            image, label = _read(image_file), _read(label_file)
            for file, data in ((image_file, image), (label_file, label)):
                content.update(f"{file.name} {len(data)} ".encode() + data)
            self._label(label_file, _decode(label_file, label), _decode(image_file, image))
        found = content.hexdigest()[:16]
        with replacing(note) as temporary:
            temporary.write_text(found)
        return found


def _read_classes(file: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UpbenchError(f"{file} is missing or is not text: it names one class a line") from error
    if not any(name.lower() not in IGNORED_NAMES for name in names) or len(names) > IGNORE:
        raise UpbenchError(f"{file} must name 1 to {IGNORE} classes, one a line")
    return names


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UpbenchError(f"cannot read {file}: {error.strerror}") from error


def _decode(file: Path, data: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except _UNREADABLE as error:
        raise UpbenchError(f"cannot read image {file}: {' '.join(str(error).split())}") from error
    return picture


def _open(file: Path) -> Image.Image:
    return _decode(file, _read(file))
