"""Copies of NYU Depth v2, each a way in which its 1449 labelled images are stored.

Silberman, Hoiem, Kohli, Fergus, "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.dataset import Archive
from upbench.contracts.sample import Camera
from upbench.datasets._content import content_fingerprint
from upbench.datasets._files import image_size, read_image, read_labels, read_values
from upbench.datasets._matlab import file_digest, load_mat, open_hdf5
from upbench.datasets.nyu._normals import axis_signs, load_normals
from upbench.errors import UpbenchError
from upbench.system.cache import digest

LABELLED, SPLITS, CLASSES, NORMALS = (
    "nyu_depth_v2_labeled.mat",
    "splits.mat",
    "classMapping40.mat",
    "all_normals.pklz",
)
COUNTS = {"train": 795, "test": 654}
ARCHIVES = (
    Archive(
        f"http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/{LABELLED}",
        "md5:520609c519fba3ba5ac58c8fefcc3530",
        size=2_972_037_809,
    ),
    Archive(
        f"http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/{SPLITS}",
        "md5:08e3c3aea27130ac7c01ffd739a4535f",
    ),
    Archive(
        "https://dl.fbaipublicfiles.com/fair_self_supervision_benchmark/nyuv2_surfacenormal_metadata.zip"
    ),
)
_NDXS = {"train": "trainNdxs", "test": "testNdxs"}


def camera() -> Camera:
    """Intrinsics of the colour camera at 640x480, as the toolbox states them: its first pixel has its centre
    at (1, 1), ours at (0.5, 0.5)."""
    return Camera(torch.tensor([[518.8579, 519.4696, 325.5824 - 0.5, 253.7362 - 0.5]]))


class Copy(Protocol):
    """What is read of any copy.

    Attributes:
        fields: What it has besides images: "depth", "label", "normal".
    """

    fields: frozenset[str]

    def names(self, split: str) -> list[str]:
        """Indices, from 0, in the labelled .mat file, as five digits."""

    def load(self, split: str, index: int, field: str) -> Tensor:
        """A field of an image: "image" `[3, H, W]` bytes, "depth" `[H, W]` metres, "label" `[H, W]` 0..40,
        "normal" `[3, H, W]`."""

    def size(self, split: str, index: int) -> tuple[int, int]:
        """(H, W), without reading the image."""

    def fingerprint(self, title: str, split: str, facts: object) -> str:
        """As of `content_fingerprint`."""


class LabelledFile:
    """`nyu_depth_v2_labeled.mat` and `splits.mat`; for labels also `classMapping40.mat` or
    `labels40/00000.png`, for normals `all_normals.pklz` (Ladicky et al., as FAIR hands them on).

    Args:
        base: Folder that has the files.
        depth: "rawDepths", with holes, or "depths", in-filled.
    """

    def __init__(self, base: Path, depth: str) -> None:
        self._base, self._depth = base, depth
        self._file = open_hdf5(base / LABELLED)
        self._lock = Lock()
        count = self._checked()
        self._places = _split_places(base, count)
        self._mapping = self._label_mapping()
        places = (base, base / "surfacenormal_metadata")
        self._packed = next((place / NORMALS for place in places if (place / NORMALS).is_file()), None)
        fields = {"depth"}
        if self._mapping is not None or (base / "labels40").is_dir():
            fields.add("label")
        if self._packed is not None:
            fields.add("normal")
        self.fields = frozenset(fields)

    def names(self, split: str) -> list[str]:
        """See `Copy`."""
        return [f"{place:05d}" for place in self._places[split]]

    def load(self, split: str, index: int, field: str) -> Tensor:
        """See `Copy`."""
        place = self._places[split][index]
        if field == "label":
            return self._label(place)
        if field == "normal":
            normal = torch.from_numpy(np.array(self._normals[place], dtype=np.float32)).permute(2, 0, 1)
            return normal * self._signs.view(3, 1, 1)
        value = torch.from_numpy(self._stored("images" if field == "image" else self._depth, place))
        return value.float().nan_to_num(0, 0, 0).clamp(min=0) if field == "depth" else value

    def fingerprint(self, title: str, split: str, facts: object) -> str:
        """See `Copy`."""
        small = [self._base / SPLITS, self._base / CLASSES, *([self._packed] if self._packed else [])]
        found = [file_digest(file) for file in (self._base / LABELLED, *small) if file.is_file()]
        if self._mapping is None and "label" in self.fields:
            files = [(self._labels40(place),) for place in self._places[split]]
            found.append(content_fingerprint(title, files, facts, _check_labels))
        return digest(title, self._depth, self.names(split), facts, *found)

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Copy`."""
        _, _, width, height = self._file["images"].shape
        return int(height), int(width)

    def _checked(self) -> int:
        """How many images there are, all arrays being of as many and as large."""
        shapes = {key: self._file[key].shape for key in ("images", self._depth) if key in self._file}
        for key in ("images", self._depth):
            if key not in shapes:
                raise UpbenchError(
                    f"{self._base / LABELLED} has no array '{key}': it is not the labelled dataset"
                )
        count, three, width, height = shapes["images"] if len(shapes["images"]) == 4 else (0, 0, 0, 0)
        if three != 3 or shapes[self._depth] != (count, width, height):
            raise UpbenchError(
                f"{self._base / LABELLED}: images {shapes['images']} and {self._depth} "
                f"{shapes[self._depth]} do not fit"
            )
        return int(count)

    def _stored(self, key: str, place: int) -> Any:
        """One image's part of an array; MATLAB stores columns first."""
        with self._lock:
            try:
                part = self._file[key][place]
            except OSError as error:
                raise UpbenchError(
                    f"cannot read {self._base / LABELLED}, '{key}' {place}: it is damaged"
                ) from error
        return np.ascontiguousarray(part.swapaxes(-1, -2))

    def _label_mapping(self) -> Any:
        """`[895]` value in "labels" -> 0..40, or None."""
        file = self._base / CLASSES
        if not file.is_file():
            return None
        if "labels" not in self._file:
            raise UpbenchError(f"{self._base / LABELLED} has no array 'labels', which {CLASSES} is for")
        mapped = np.asarray(load_mat(file, "mapClass")["mapClass"], dtype=np.int64).ravel()
        if len(mapped) == 0 or mapped.min() < 1 or mapped.max() > 40:
            raise UpbenchError(f"{file}: mapClass must hold classes 1 to 40")
        return np.concatenate(([0], mapped))

    def _label(self, place: int) -> Tensor:
        if self._mapping is None:
            return read_nyu40(self._labels40(place))
        stored = self._stored("labels", place)
        if (largest := int(stored.max())) >= len(self._mapping):
            raise UpbenchError(
                f"{self._base / LABELLED}: image {place} has label {largest}, "
                f"{CLASSES} maps 1 to {len(self._mapping) - 1}"
            )
        return torch.from_numpy(self._mapping[stored].astype(np.uint8))

    def _labels40(self, place: int) -> Path:
        return self._base / "labels40" / f"{place:05d}.png"

    @cached_property
    def _normals(self) -> Any:
        assert self._packed is not None
        shape = (len(self._file["images"]), *reversed(self._file["images"].shape[2:]), 3)
        return load_normals(self._packed, shape)

    @cached_property
    def _signs(self) -> Tensor:
        some = range(0, len(self._normals), max(1, len(self._normals) // 8))
        pairs = [(np.array(self._normals[i], dtype=np.float32), self._stored(self._depth, i)) for i in some]
        return axis_signs(pairs, camera().intrinsics[0].tolist(), str(self._packed))


class OfficialSplits:
    """`official_splits/{train,test}/SCENE/{rgb_00000.jpg,sync_depth_00000.png}`, as BTS and AdaBins have it:
    depth in millimetres; for labels also `labels40/00000.png`."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._images: dict[str, list[Path]] = {}
        self._names: dict[str, list[str]] = {}
        for split in COUNTS:
            files = (base / "official_splits" / split).glob("*/rgb_*.jpg")
            self._images[split] = sorted(files, key=lambda file: file.stem)
        self.fields = frozenset({"depth", "label"} if (base / "labels40").is_dir() else {"depth"})

    def names(self, split: str) -> list[str]:
        """See `Copy`."""
        if split not in self._names:
            self._names[split] = self._checked(split)
        return self._names[split]

    def _checked(self, split: str) -> list[str]:
        for image in self._images[split]:
            if not re.fullmatch(r"rgb_\d{5}", image.stem):
                raise UpbenchError(f"dataset 'nyuv2': {image} should be called rgb_00000.jpg, with its index")
            for file in self._files(image)[1:]:
                if not file.is_file():
                    raise UpbenchError(f"dataset 'nyuv2': {image} has no {file.parent.name}/{file.name}")
        return [image.stem.removeprefix("rgb_") for image in self._images[split]]

    def load(self, split: str, index: int, field: str) -> Tensor:
        """See `Copy`."""
        image, depth, *label = self._files(self._images[split][index])
        if field == "image":
            return read_image(image)
        return read_millimetres(depth) if field == "depth" else read_nyu40(label[0])

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Copy`."""
        return image_size(self._images[split][index])

    def fingerprint(self, title: str, split: str, facts: object) -> str:
        """See `Copy`."""
        return content_fingerprint(title, [self._files(f) for f in self._images[split]], facts, _check_files)

    def _files(self, image: Path) -> list[Path]:
        number = image.stem.removeprefix("rgb_")
        files = [image, image.with_name(f"sync_depth_{number}.png")]
        return [*files, self._base / "labels40" / f"{number}.png"] if "label" in self.fields else files


def read_nyu40(file: Path, data: bytes | None = None) -> Tensor:
    """`[H, W]` uint8, 0..40.

    Raises:
        UpbenchError: It cannot be read, or has other values.
    """
    label = read_labels(file, data)
    if (largest := int(label.max())) > 40:
        raise UpbenchError(f"label map {file} has value {largest}, there are classes 1 to 40, and 0 for none")
    return label


def read_millimetres(file: Path, data: bytes | None = None) -> Tensor:
    """`[H, W]` float32 metres from a PNG of 16 bits, in millimetres.

    Raises:
        UpbenchError: It cannot be read, or does not have 16 bits.
    """
    values = read_values(file, data)
    if values.dtype != torch.int32 or 0 < int(values.max()) < 256:
        raise UpbenchError(
            f"depth map {file} must have 16 bits, in millimetres; its largest is {float(values.max()):g}"
        )
    return values.float() / 1000


def _split_places(base: Path, count: int) -> dict[str, list[int]]:
    """Split -> indices from 0."""
    file = base / SPLITS
    if not file.is_file():
        raise UpbenchError(
            f"dataset 'nyuv2': {base} has {LABELLED} but no {SPLITS} (`upbench download nyuv2` gets it)"
        )
    content = load_mat(file, *_NDXS.values())
    places = {split: [int(n) - 1 for n in np.ravel(content[key])] for split, key in _NDXS.items()}
    both = places["train"] + places["test"]
    if len(set(both)) != len(both) or not both or min(both) < 0:
        raise UpbenchError(f"{file}: the indices of its splits are not distinct numbers from 1 on")
    kept = {split: [n for n in numbers if n < count] for split, numbers in places.items()}
    for split, numbers in kept.items():
        if not numbers:
            raise UpbenchError(f"dataset 'nyuv2': {base / LABELLED} has no image of split '{split}'")
    return kept


def _check_labels(files: Sequence[Path], contents: Sequence[bytes]) -> None:
    read_nyu40(files[0], contents[0])


def _check_files(files: Sequence[Path], contents: Sequence[bytes]) -> None:
    """Raises UpbenchError for an image, a depth map and a label map that are no good."""
    size = read_image(files[0], contents[0]).shape[1:]
    maps = [
        read(f, c)
        for read, f, c in zip((read_millimetres, read_nyu40), files[1:], contents[1:], strict=False)
    ]
    for file, found in zip(files[1:], maps, strict=True):
        if found.shape != size:
            raise UpbenchError(f"{file} is {found.shape[1]}x{found.shape[0]}, its image {size[1]}x{size[0]}")
