"""Large image: the backbone itself on an enlarged image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from upbench.contracts.operator import SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.layers.convolutions import grid_of
from upbench.ops.resample import interpolation_operator, resize

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone


class LargeImage(Upsampler):
    """Runs the backbone on the image enlarged `scale` times, then interpolates bilinearly.

    With features `[B, C, h, w]` and a backbone of stride s, the image is resized (bicubic) to h scale s by
    w scale s pixels, or less where that would be a finer grid than the output's. A ViT interpolates its
    positions to the larger grid. At `scale=1` these are the backbone's features, interpolated.

    The number of tokens grows with the square of `scale`, and attention among them with its fourth power:
    `scale=2` is four tokens for each, as many as the defaults of `strided` and `shift_average` compute. A
    backbone need not know objects that are larger than those it was trained on (Ranzinger et al., FeatSharp,
    2025, figure 1).
    """

    name = "large_image"
    title = "Large image"
    paper = "Baseline in Fu et al., FeatUp, ICLR 2024, arXiv 2403.10516"
    year = 2024
    uses_backbone = True
    precise_image = True

    def __init__(self, channels: int = 384, *, scale: int = 2) -> None:
        """Args: channels: C; scale: How many times as many features along each axis.

        Raises:
            UpbenchError: A scale below 1.
        """
        super().__init__(channels)
        if scale < 1:
            raise UpbenchError(f"large_image: scale {scale} is below 1")
        self.scale = scale

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        backbone: Backbone | None = None,
    ) -> Tensor:
        """See `Upsampler.forward`; of `features` only the grid counts."""
        sources = self.operator(image, features, output_size, backbone=backbone).takes(features)
        return resize(sources, output_size, "bilinear")

    def operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
    ) -> SourcedOperator:
        """See `Upsampler.operator`: the finer features and their bilinear interpolation."""
        backbone = self.given(backbone)
        grid = (
            min(n * self.scale, max(n, out)) for n, out in zip(grid_of(features), output_size, strict=True)
        )
        rows, cols = (n * backbone.stride for n in grid)
        sources = backbone(backbone.resized(self.denormalize(image), (rows, cols)))
        return SourcedOperator(sources, interpolation_operator(sources, output_size, "bilinear"))
