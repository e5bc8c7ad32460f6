"""Bicubic interpolation (cubic convolution)."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import interpolation_operator, resize
from upbench.ops.separable import SeparableOperator


class Bicubic(Upsampler):
    """Bicubic interpolation by cubic convolution (Keys 1981); the image is not looked at.

    Output row i is the sum of K(y - j) f_j over the four rows j around y = (i + 0.5) h / H - 0.5, rows beyond
    the border repeating the last one; columns likewise. With a = -0.75,

        K(t) = (a + 2)|t|^3 - (a + 3)|t|^2 + 1      for |t| <= 1,
        K(t) = a|t|^3 - 5a|t|^2 + 8a|t| - 4a        for 1 < |t| < 2:

    `F.interpolate(mode="bicubic", align_corners=False)`. Along an axis where the output is smaller than the
    features, the kernel is widened by h / H with a = -0.5 and renormalised (`antialias=True`, as Pillow
    does).
    """

    name = "bicubic"
    title = "Bicubic"
    paper = "Keys, Cubic convolution interpolation for digital image processing, IEEE TASSP 29(6), 1981"
    year = 1981
    guided = False
    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return resize(features, output_size, "bicubic")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`: a matrix for rows and one for columns."""
        return interpolation_operator(features, output_size, "bicubic")
