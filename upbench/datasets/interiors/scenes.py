"""Reads rendered scenes as numpy arrays, from the packed files or from a folder that the renderer wrote."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from upbench.datasets._files import check_regular, read_bytes
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
        if not index.is_file():
            raise UpbenchError(f"interiors: {index} is missing; render it or reinstall the package")
        try:
            lines = [json.loads(line) for line in index.read_text().splitlines() if line.strip()]
            self.index: list[dict[str, Any]] = sorted(lines, key=lambda line: line["seed"])
        except (ValueError, KeyError, TypeError) as error:
            raise UpbenchError(f"interiors: {index} is damaged ({error})") from error

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Scene:
        info = self.index[i]
        try:
            raw = {kind: self._decode(info, suffix) for kind, suffix in _FILES.items()}
        except Exception as error:  # decoders of damaged files raise anything
            place, text = self.folder / info.get("shard", self.split), " ".join(str(error).split())
            raise UpbenchError(f"interiors: cannot read scene {info['seed']} in {place} ({text})") from error
        depth = raw["depth"].astype(np.float32) / 1000
        hit = depth > 0
        normal = (raw["normal"].astype(np.float32) - 128) / 127
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        normal[~hit] = 0
        fx, fy, cx, cy = info["intrinsics"]
        return Scene(raw["image"], _MERGE_TABLE[raw["label"]], depth, normal, (fx, fy, cx, cy), info)

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
            return archive.read(name)

    def _decode(self, info: dict[str, Any], suffix: str) -> np.ndarray:
        with Image.open(io.BytesIO(self._bytes(info, suffix))) as image:
            array = np.array(image)
        if array.shape[0] != info["size"] or array.shape[1] != info["size"]:
            raise ValueError(f"{suffix} is {array.shape[1]}x{array.shape[0]}, the index says {info['size']}")
        return array


_FILES = {"image": ".jpg", "label": "_label.png", "depth": "_depth.png", "normal": "_normal.png"}
