"""Strided: the backbone itself with patches that overlap."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from upbench.contracts.operator import SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Setting, Upsampler
from upbench.errors import UpbenchError
from upbench.layers.convolutions import grid_of
from upbench.ops.placement import placement_matrix
from upbench.ops.separable import SeparableOperator

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone


class Strided(Upsampler):
    """Runs a ViT whose patches of p pixels are p / `factor` pixels apart, then interpolates bilinearly.

    Of n patches along an axis come factor (n - 1) + 1: the same convolution, so that every factor-th patch is
    one of the plain backbone's. Positions are interpolated to the denser grid as the model does for any other
    size (learned ones bicubically, over the whole image; rotary ones as they are defined), as in Amir et al.,
    section 3. Each feature is then put at the centre of its patch, where resizing the grid as if it covered
    the image would shift the border by half a patch. At `factor=1` these are the backbone's features,
    interpolated.

    A factor that does not divide the patch goes to the nearest stride in pixels: p = 14 and factor 4 is 3.5,
    so 4 pixels.
    """

    name = "strided"
    title = "Strided"
    paper = "Amir et al., Deep ViT Features as Dense Visual Descriptors, ECCVW 2022, arXiv 2112.05814"
    year = 2022
    license = "MIT"
    uses_backbone = True
    precise_image = True

    def __init__(self, channels: int = 384, *, factor: int = 2) -> None:
        """Args: channels: C; factor: How many patches for one along each axis.

        Raises:
            UpbenchError: A factor below 1.
        """
        super().__init__(channels)
        if factor < 1:
            raise UpbenchError(f"strided: factor {factor} is below 1")
        self.factor = factor

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        backbone: Backbone | None = None,
    ) -> Tensor:
        """See `Upsampler.forward`; of `features` only the grid counts."""
        operator = self.operator(image, features, output_size, backbone=backbone)
        return operator(operator.takes(features).unsqueeze(1))

    def operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
    ) -> SourcedOperator:
        """See `Upsampler.operator`: the features of all patches, and their interpolation."""
        backbone = self.given(backbone)
        patch = backbone.patch_size
        if patch is None:
            raise UpbenchError(_reason(backbone.name))
        stride = max(1, round(patch / self.factor))
        h, w = grid_of(features)
        size = (h * patch, w * patch)
        sources = overlapping(backbone, backbone.resized(self.denormalize(image), size), stride)
        rows, cols = (
            placement_matrix([patch / 2 + i * stride for i in range(count)], length, out, image.device)
            for count, length, out in zip(grid_of(sources), size, output_size, strict=True)
        )
        return SourcedOperator(sources, SeparableOperator(rows, cols))

    @classmethod
    def skip_reason(cls, setting: Setting) -> str | None:
        """Backbones that are no plain ViT."""
        return _reason(setting.backbone) if setting.patch_size is None else None


def overlapping(backbone: Backbone, image01: Tensor, stride: int) -> Tensor:
    """Features of a ViT whose patches overlap; the backbone itself is left as it is.

    Args:
        backbone: One with a `patch_size` p.
        image01: `[B, 3, H, W]` RGB in 0..1, H and W multiples of p.
        stride: Pixels between patches, at most p.

    Returns:
        `[B, C, (H - p) // stride + 1, (W - p) // stride + 1]`, of patches that begin at multiples of stride.
    """
    patch = backbone.stride
    rows, cols = ((n - patch) // stride + 1 for n in grid_of(image01))
    tokens: Tensor = _with_stride(backbone.model, stride).forward_intermediates(
        backbone.normalize(image01), indices=1, norm=True, output_fmt="NLC", intermediates_only=True
    )[-1]
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, cols)


def _with_stride(model: Any, stride: int) -> Any:
    """A model that shares everything with `model` but the stride of its patch embedding."""
    projection = copy.copy(model.patch_embed.proj)
    projection.stride = (stride, stride)
    return _with_module(model, "patch_embed", _with_module(model.patch_embed, "proj", projection))


def _with_module(parent: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A shallow copy of a module with another child in place of one of its own."""
    twin = copy.copy(parent)
    twin._modules = {**parent._modules, name: child}
    return twin


def _reason(backbone: str) -> str:
    return f"strided needs a plain ViT, whose patches can overlap; backbone '{backbone}' is none"
