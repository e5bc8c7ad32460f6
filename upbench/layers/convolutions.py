"""Convolutional encoders of the guidance image: normalise - activate - convolve."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.layers.strips import can_stream, stream

GROUPS = 8


class Block(nn.Module):
    """GroupNorm - SiLU - convolution, twice; the input is added where `residual`."""

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d, residual: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, conv1.in_channels)
        self.conv1 = conv1
        self.norm2 = nn.GroupNorm(GROUPS, conv2.in_channels)
        self.conv2 = conv2
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` to the same shape."""
        inplace = not torch.is_grad_enabled()
        y: Tensor = self.conv1(F.silu(self.norm1(x), inplace))
        y = self.conv2(F.silu(self.norm2(y), inplace))
        if not self.residual:
            return y
        return y.add_(x) if y.dtype == x.dtype else x + y  # under autocast x may be the more precise


def convolution(
    inputs: int,
    outputs: int,
    kernel: tuple[int, int] = (1, 1),
    dilation: int = 1,
    padding: tuple[int, int] = (0, 0),
    bias: bool = True,
) -> nn.Conv2d:
    """A convolution, padded by reflection where it is padded."""
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        padding=padding,
        dilation=dilation,
        bias=bias,
        padding_mode="reflect" if any(padding) else "zeros",
    )


class Encoder(nn.Sequential):
    """A stem to `dim` channels, then `Block`s."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, Cin, H, W]` to `[B, dim, H, W]`."""
        stem, *blocks = self
        if isinstance(stem, nn.Conv2d) and can_stream(x):
            return stream(stem, blocks, x)
        for layer in self:
            x = layer(x)
        return x


class Branch(Encoder):
    """An encoder of the image whose convolutions are all of one kind, without residuals (NAF, RaysUp)."""

    def __init__(
        self,
        dim: int,
        kernel: tuple[int, int],
        blocks: int,
        dilation: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        """Args: dim: Channels; kernel: (rows, columns); blocks: How many; dilation, padding: Of all."""

        def conv(inputs: int) -> nn.Conv2d:
            return convolution(inputs, dim, kernel, dilation, padding)

        super().__init__(conv(3), *(Block(conv(dim), conv(dim)) for _ in range(blocks)))


def residual_encoder(stem: nn.Module, dim: int) -> Encoder:
    """A stem to `dim` channels and two residual blocks of 1x1 convolutions without biases (JAFAR, AnyUp)."""

    def conv() -> nn.Conv2d:
        return convolution(dim, dim, bias=False)

    return Encoder(stem, *(Block(conv(), conv(), residual=True) for _ in range(2)))


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling; nothing where the size is right."""
    return x if grid_of(x) == size else F.adaptive_avg_pool2d(x, size)


def grid_of(x: Tensor) -> tuple[int, int]:
    """(H, W) of `[..., H, W]`."""
    return int(x.shape[-2]), int(x.shape[-1])
