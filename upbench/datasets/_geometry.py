"""The geometry that all datasets share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
