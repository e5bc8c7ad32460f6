"""Reads rendered scenes as numpy arrays, from the packed files or from a folder that the renderer wrote."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _told
from typing import Any

import numpy as np
from PIL import Image

from upbench.datasets._files import MOST_PIXELS, check_regular, fault, read_bytes, read_text
from upbench.errors import UpbenchError

from .classes import merge_table
from .files import DATA_DIR, SPLITS

_MERGE_TABLE = np.array(merge_table(), dtype=np.int64)


@dataclass(frozen=True)
class Scene:
    """One scene at the size it was rendered at.

    Attributes:
        image: `uint8 [H, W, 3]`, sRGB.
        label: `int64 [H, W]`, index into `CLASSES`; 255 where nothing was hit.
        depth: `float32 [H, W]`, metres along the optical axis (not along the ray); 0 where nothing was hit.
        normal: `float32 [H, W, 3]`, unit vectors in camera space (x right, y down, z forward) that face the
            viewer; 0 where nothing was hit. Stored with 8 bits a channel: good to about 0.3 degrees.
        intrinsics: fx, fy, cx, cy in pixels; the centre of the first pixel is at (0.5, 0.5).
        info: the line of the index: seed, kind, models, fractions of raw classes.
    """

    image: np.ndarray
    label: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    intrinsics: tuple[float, float, float, float]
    info: dict[str, Any]


class SceneFolder:
    """The scenes of one split.

    Args:
        split: `train`, `val` or `val_heldout`.
        root: folder with `<split>.jsonl` and the scenes, packed or not; None means the packed data of the
            package.

    Raises:
        UpbenchError: unknown split, missing folder or index, or (when a scene is read) a missing or damaged
            file.
    """

    def __init__(self, split: str, root: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise UpbenchError(f"interiors has no split '{split}': it has {', '.join(SPLITS)}")
        self.split = split
        self.folder = Path(root or DATA_DIR)
        index = self.folder / f"{split}.jsonl"
        if not os.path.lexists(index):
            raise UpbenchError(f"interiors: {index} is missing; render it or reinstall the package")
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(read_text(index).splitlines(), start=1):
            if text.strip():
                lines.append(_line(text, f"interiors: {index} is damaged: line {number}"))
        if not lines:
            raise UpbenchError(f"interiors: {index} names no scenes; render them or reinstall the package")
        self.index = sorted(lines, key=lambda line: line["seed"])
        for one, other in itertools.pairwise(self.index):
            if one["seed"] == other["seed"]:
                raise UpbenchError(f"interiors: {index} is damaged: seed {one['seed']} is there twice")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Scene:
        info = self.index[i]
        try:
            raw = {kind: self._decode(info, kind) for kind in _FILES}
        except Exception as error:  # decoders of damaged files raise anything
            place = self.folder / info.get("shard", self.split)
            raise UpbenchError(
                f"interiors: cannot read scene {info['seed']} in {place}: {fault(error)}"
            ) from error
        depth = raw["depth"].astype(np.float32) / 1000
        hit = depth > 0
        normal = (raw["normal"].astype(np.float32) - 128) / 127
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        normal[~hit] = 0
        fx, fy, cx, cy = info["intrinsics"]
        return Scene(raw["image"], _MERGE_TABLE[raw["label"]], depth, normal, (fx, fy, cx, cy), info)

    def check(self) -> None:
        """Looks whether every file that the index names is there, without reading it.

        Raises:
            UpbenchError: A shard or a file is missing, or a shard is damaged where it lists its files.
        """
        listed: dict[str, set[str]] = {}
        for info in self.index:
            names = [f"{info['seed']}{suffix}" for suffix in _FILES.values()]
            if "shard" not in info:
                for name in names:
                    check_regular(self.folder / self.split / name)
                continue
            shard = self.folder / info["shard"]
            if info["shard"] not in listed:
                listed[info["shard"]] = _names(shard)
            if lacking := [name for name in names if name not in listed[info["shard"]]]:
                raise UpbenchError(f"interiors: {shard} lacks {lacking[0]}; copy it again")

    def read_bytes(self, i: int, suffix: str = ".jpg") -> bytes:
        """One file of scene `i` as it is stored."""
        return self._bytes(self.index[i], suffix)

    def _bytes(self, info: dict[str, Any], suffix: str) -> bytes:
        name = f"{info['seed']}{suffix}"
        if "shard" not in info:
            return read_bytes(self.folder / self.split / name)
        shard = self.folder / info["shard"]
        check_regular(shard)
        with zipfile.ZipFile(shard) as archive:
            if (size := archive.getinfo(name).file_size) > _MOST:
                raise ValueError(f"{name} has {size} bytes, the most is {_MOST}")
            return archive.read(name)  # checks its CRC

    def _decode(self, info: dict[str, Any], kind: str) -> np.ndarray:
        suffix, size = _FILES[kind], info["size"]
        data = self._bytes(info, suffix)
        if kind == "image" and info.get("image_sha256", "") not in ("", hashlib.sha256(data).hexdigest()):
            raise ValueError(f"{suffix} is not the image that the index was made with")
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            array = np.array(image)
        if array.shape[:2] != (size, size):
            raise ValueError(f"{suffix} is {array.shape[1]}x{array.shape[0]}, the index says {size}")
        dtypes, channels = _LAYOUTS[kind]
        if array.dtype not in dtypes or array.shape[2:] != channels:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{suffix} holds {found}, not {dtypes[0].__name__} {[size, size, *channels]}")
        return array


def _names(shard: Path) -> set[str]:
    """Of the files in a zip file."""
    check_regular(shard)
    try:
        with zipfile.ZipFile(shard) as archive:
            return set(archive.namelist())
    except Exception as error:  # a damaged zip raises anything
        what = f"{type(error).__name__}: {error}"
        raise UpbenchError(f"interiors: cannot read {shard}; copy it again ({what})") from error


def _line(text: str, where: str) -> dict[str, Any]:
    """A line of an index, checked: its seed and shard are names of files in the folder, and no paths.

    Raises:
        UpbenchError: It is damaged; begins with `where`.
    """
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpbenchError(f"{where} is not JSON ({type(error).__name__}: {error})") from error
    if not isinstance(info, dict):
        raise UpbenchError(f"{where} is not an object")
    seed, size, shard = info.get("seed"), info.get("size"), info.get("shard", "shard.zip")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UpbenchError(f"{where}: its seed must be a whole number from 0, got {_told(seed)}")
    most = math.isqrt(MOST_PIXELS)
    if type(size) is not int or not 0 < size <= most:
        raise UpbenchError(f"{where}: its size must be a side of 1 to {most} pixels, got {_told(size)}")
    if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.zip", shard):
        raise UpbenchError(f"{where}: its shard must be the name of a zip file beside it, got {_told(shard)}")
    numbers: Any = info.get("intrinsics")
    sound = isinstance(numbers, list) and len(numbers) == 4 and all(_is_number(each) for each in numbers)
    if not sound or min(numbers[:2]) <= 0:
        needs = "must be fx, fy, cx, cy, finite, with fx and fy over 0"
        raise UpbenchError(f"{where}: its intrinsics {needs}; got {_told(numbers)}")
    return info


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and -1e9 < value < 1e9


_FILES = {"image": ".jpg", "label": "_label.png", "depth": "_depth.png", "normal": "_normal.png"}
_LAYOUTS: dict[str, tuple[tuple[type, ...], tuple[int, ...]]] = {
    "image": ((np.uint8,), (3,)),
    "label": ((np.uint8,), ()),
    "depth": ((np.uint16, np.int32), ()),  # the second as older Pillows read 16 bits
    "normal": ((np.uint8,), (3,)),
}
"""What each kind of file holds: types of its values, and its channels."""
_MOST = 6 * MOST_PIXELS
"""Bytes of a file in a shard, unpacked."""
