"""What a dataset is, and the geometry that all of them share."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upbench.base import Camera
from upbench.errors import UpbenchError, unknown
from upbench.plugin import Registered

IGNORE = 255


@dataclass(frozen=True)
class Sample:
    """One image with its ground truth; what a dataset does not have is None.

    Attributes:
        name: Identifies the image within its split.
        image: `[3, H, W]` float32 RGB in 0..1.
        valid: `[H, W]` bool; pixels outside it count nowhere.
        label: `[H, W]` int64 class index, 255 ignored.
        depth: `[H, W]` float32, metres along the optical axis; 0 where unknown.
        normal: `[3, H, W]` float32 unit vectors in camera space (x right, y down, z forward), facing the
            viewer.
        camera: Intrinsics in pixels of `image`, batch of one.
    """

    name: str
    image: Tensor
    valid: Tensor
    label: Tensor | None = None
    depth: Tensor | None = None
    normal: Tensor | None = None
    camera: Camera | None = None


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


@dataclass(frozen=True)
class Fit:
    """Resize of the shorter side to `size`, then centre crop to a square, as JAFAR and its successors do.

    Attributes:
        source: (height, width) of the original.
        size: Side of the result in pixels.
    """

    source: tuple[int, int]
    size: int

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) after the resize, before the crop."""
        h, w = self.source
        short = min(h, w)
        return max(self.size, round(h * self.size / short)), max(self.size, round(w * self.size / short))

    @property
    def offset(self) -> tuple[int, int]:
        """(top, left) of the crop."""
        h, w = self.resized
        return (h - self.size) // 2, (w - self.size) // 2

    def image(self, picture: Image.Image) -> Tensor:
        """`[3, size, size]` float32 in 0..1; bicubic with antialiasing."""
        h, w = self.resized
        rgb = picture.convert("RGB")
        if rgb.size != (w, h):
            rgb = rgb.resize((w, h), Image.Resampling.BICUBIC)
        top, left = self.offset
        pixels = np.asarray(rgb)[top : top + self.size, left : left + self.size]
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()

    def nearest(self, array: Tensor) -> Tensor:
        """`[..., h, w]` of any dtype, sampled at the centres of the result's pixels (nearest-exact)."""
        (h, w), (rh, rw), (top, left) = self.source, self.resized, self.offset
        index = torch.arange(self.size, dtype=torch.float64)
        rows = ((index + top + 0.5) * (h / rh)).floor().long().clamp_(0, h - 1)
        cols = ((index + left + 0.5) * (w / rw)).floor().long().clamp_(0, w - 1)
        return array[..., rows[:, None], cols[None, :]]

    def intrinsics(self, fxfycxcy: Sequence[float]) -> Tensor:
        """`[1, 4]` intrinsics of the result from those of the original, in pixels."""
        fx, fy, cx, cy = fxfycxcy
        (h, w), (rh, rw), (top, left) = self.source, self.resized, self.offset
        sy, sx = rh / h, rw / w
        return torch.tensor([[fx * sx, fy * sy, cx * sx - left, cy * sy - top]], dtype=torch.float32)


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the parts' text."""
    return hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).hexdigest()[:16]
