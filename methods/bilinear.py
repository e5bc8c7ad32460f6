"""Bilinear interpolation: the baseline of every table."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from upbench.base import Upsampler


class Bilinear(Upsampler):
    """Bilinear interpolation, half-pixel centres; the image is not looked at.

    Output row i reads the features at y = (i + 0.5) h / H - 0.5, clamped to the grid, with weights 1 - |y - cell| on
    the two nearest rows; columns likewise. Along an axis where the output is smaller than the features, the triangle
    is widened by h / H and renormalised (antialiasing); along one where it is larger, the result is
    `F.interpolate(mode="bilinear", align_corners=False)` exactly.
    """

    name = "bilinear"
    title = "Bilinear"
    paper = "classical"
    guided: ClassVar[bool] = False
    linear: ClassVar[bool] = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        shrinks = any(out < size for out, size in zip(output_size, features.shape[-2:], strict=True))
        return F.interpolate(features, output_size, mode="bilinear", align_corners=False, antialias=shrinks)
