"""Bilinear interpolation: the baseline of every table."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import interpolation_operator, resize
from upbench.ops.separable import SeparableOperator


class Bilinear(Upsampler):
    """Bilinear interpolation; the image is not looked at.

    Output row i is the sum of (1 - |y - j|) f_j over the two rows j around y = (i + 0.5) h / H - 0.5, y
    clamped to the grid; columns likewise: `F.interpolate(mode="bilinear", align_corners=False)`. Along an
    axis where the output is smaller than the features, the triangle is widened by h / H and renormalised
    (`antialias=True`, as Pillow does).
    """

    name = "bilinear"
    title = "Bilinear"
    paper = "Textbook interpolation, no paper"
    guided = False
    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return resize(features, output_size, "bilinear")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`: a matrix for rows and one for columns."""
        return interpolation_operator(features, output_size, "bilinear")
