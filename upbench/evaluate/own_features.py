"""The backbone's own features, as a head sees them that all methods share: its outputs are enlarged."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.task import Context
from upbench.contracts.upsampler import Upsampler
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.features.images import SplitImages
from upbench.ops.resample import interpolation_operator, resize
from upbench.ops.separable import SeparableOperator


class Enlarged(Upsampler):
    """Bilinear enlargement, which a head's outputs on the grid of features go through.

    Enlarging the K outputs of a linear head is what enlarging the features before it comes to. Not
    registered: no row of a table, but what `Recipe.trained_on` "backbone" means.
    """

    guided = False
    linear = True

    def __init__(self) -> None:
        """Takes nothing."""
        super().__init__()
        self.name = "the backbone's own features"  # type: ignore[misc]

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return resize(features, output_size, "bilinear")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`."""
        return interpolation_operator(features, output_size, "bilinear")


def own_features(context: Context, split: str, mirrored: bool = False) -> UpsampledSplit:
    """The backbone's own features of a split, enlarged."""

    def make() -> UpsampledSplit:
        images = context.samples(split, mirrored=mirrored)
        assert isinstance(images, SplitImages)
        call = MethodCall(Enlarged(), device=context.device)
        return UpsampledSplit(call, images, context.features(split, mirrored=mirrored), title=images.title)

    return context.shared(("own features", split, mirrored), make)
