"""Nearest neighbour: every output pixel copies the cell that holds its centre."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import interpolation_operator, resize
from upbench.ops.separable import SeparableOperator


class Nearest(Upsampler):
    """Nearest-neighbour interpolation; the image is not looked at.

    Output row i copies the features' row floor((i + 0.5) h / H); columns likewise (`F.interpolate` with
    `mode="nearest-exact"`). Smaller outputs are sampled in the same way, without antialiasing.
    """

    name = "nearest"
    title = "Nearest"
    paper = "Textbook interpolation, no paper"
    guided = False
    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return resize(features, output_size, "nearest")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`: a matrix for rows and one for columns."""
        return interpolation_operator(features, output_size, "nearest")
