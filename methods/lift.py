"""LiFT: one step of a U-Net that doubles features with the help of the image, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.layers.convolutions import grid_of
from upbench.ops.resample import doublings, to_size

WIDTH = 32  # channels of the image branch
_FOLDER = "https://drive.google.com/drive/folders/12Q8n_vur3njOgAO1iu0P6tDIcszrnadd"
_RELEASED = {  # file -> backbone, channels
    "lift_dino_vits16": ("vit_small_patch16_224.dino", 384),
    "lift_dino_vits8": ("vit_small_patch8_224.dino", 384),
    "lift_dino_vitb16": ("vit_base_patch16_224.dino", 768),
    "lift_dino_vitb8": ("vit_base_patch8_224.dino", 768),
    "lift_vit_small_patch16": ("vit_small_patch16_224.augreg_in21k_ft_in1k", 384),
}


class LiFT(Upsampler):
    """LiFT (see `paper`, Section 3), native: doubles the features, as often as the asked size needs.

    A step convolves the image to a quarter of its size, pools it (maximum) to twice the grid of the features
    and brings it to that grid by a strided convolution; features and image go through a transposed
    convolution and two more, as in a U-Net. The official code pools by 1 for patches of 8 pixels and by 2 for
    16. Adaptive pooling, as in LoftUp's variant of it, is equal to both where the image is patch x grid, and
    works for every other size, too.

    Repeated as the official `extract_descriptors_iterative_lift` does it: each step is given the output of
    the one before and an image of twice the size, so that the image per feature stays the same. Steps are
    repeated until neither axis is smaller than the asked size, at least once; other sizes are resized
    bilinearly from that (`upbench.ops.resample.to_size`). Weights fit one step: the paper trains on a single
    doubling.
    """

    name = "lift"
    title = "LiFT"
    paper = (
        "Suri et al., LiFT: A Surprisingly Simple Lightweight Feature Transform for Dense ViT Descriptors, "
        "ECCV 2024, arXiv 2403.14625"
    )
    year = 2024
    license = "MIT"
    trainable = True
    native_ratio = 2
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "lift", "92ce268428564e74ff4c765c45d87137a65f2446b9626229759b1efda875aab8", channels=384
        ),
    } | {
        name: Weights(
            _FOLDER,
            filename=f"{name}.pth",
            license="MIT",
            backbone=backbone,
            channels=channels,
            by_hand=True,
            notes="official release, for keys of the last layer",
        )
        for name, (backbone, channels) in _RELEASED.items()
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(self, channels: int = 384) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features.
        """
        super().__init__(channels)
        self.image_convs_1 = nn.Sequential(*_strided(3), *_strided(WIDTH))
        self.image_convs_2 = nn.Sequential(*_strided(WIDTH))
        self.up1 = Up(channels)
        self.outc = nn.Conv2d(max(1, channels // 2), channels, 1)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        x = self.step(image, features)
        for _ in range(doublings(grid_of(features), output_size) - 1):
            image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
            x = self.step(image, x)
        return to_size(x, output_size).to(features.dtype)  # autocast leaves what a convolution gives

    def step(self, image: Tensor, features: Tensor) -> Tensor:
        """One doubling: `[B, 3, H, W]` and `[B, C, h, w]` to `[B, C, 2 h, 2 w]`."""
        height, width = grid_of(features)
        fine: Tensor = self.image_convs_1(image)
        if grid_of(fine) != (2 * height, 2 * width):
            fine = F.adaptive_max_pool2d(fine, (2 * height, 2 * width))
        coarse = self.image_convs_2(fine)
        doubled: Tensor = self.outc(self.up1(torch.cat([features, coarse], 1), fine))
        return doubled

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`channels`, from the last convolution."""
        last = state.get("outc.weight")
        return {} if last is None or last.ndim == 0 else {"channels": int(last.shape[0])}


class Up(nn.Module):
    """A transposed convolution of features and image, then two convolutions with the finer image.

    State keys are the official ones.
    """

    def __init__(self, channels: int) -> None:
        """Args: channels: C of the features."""
        super().__init__()
        between, narrow = (channels + WIDTH) // 2, max(1, channels // 2)
        self.up = nn.ConvTranspose2d(channels + WIDTH, between, 2, stride=2)
        self.conv_1 = nn.Module()
        self.conv_1.double_conv = nn.Sequential(
            *_plain(between + WIDTH, narrow),
            *_plain(narrow, narrow),
        )

    def forward(self, x: Tensor, fine: Tensor) -> Tensor:
        """`[B, C + 32, h, w]` and `[B, 32, 2 h, 2 w]` to `[B, C / 2, 2 h, 2 w]`."""
        double_conv: nn.Module = self.conv_1.double_conv  # type: ignore[assignment]
        out: Tensor = double_conv(torch.cat([self.up(x), fine], 1))
        return out


def _strided(inputs: int) -> tuple[nn.Module, ...]:
    """A convolution of the image that halves it."""
    return nn.Conv2d(inputs, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)


def _plain(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """A convolution that keeps the size."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
