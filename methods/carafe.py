"""CARAFE: each pixel's reassembly kernel is predicted from the features."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError, unknown
from upbench.layers.stack import RATIO, Stack, gaussian_prior, shares_stages
from upbench.ops.chain import ChainOperator, KernelMap
from upbench.ops.reassemble import Padding


class CARAFE(Upsampler):
    """CARAFE (see `paper`), doubling by doubling up to x16, then resized.

    A stage compresses the features to `compressed` channels, predicts the `up_kernel` x `up_kernel` logits of
    each of a cell's four pixels by a convolution, and gives each pixel the average of the features around
    its cell with the softmax of its logits. The image is not looked at.

    As in the official code, features outside the map count as zero and keep their share of the softmax, which
    darkens the border; `padding="replicate"` does not. What is ours: the operator is a layer of a network
    in the paper, and learns with it; here four stand alone, share their weights (see
    `upbench.layers.stack.Stack`; `share_stages=False` for weights of their own) and learn to restore features
    (`upbench train`); and their logits begin at a kernel close to bilinear interpolation, not at a box.
    """

    name = "carafe"
    title = "CARAFE"
    paper = "Wang et al., CARAFE: Content-Aware ReAssembly of FEatures, ICCV 2019, arXiv 1905.02188"
    year = 2019
    license = "Apache-2.0"
    guided = False
    trainable = True
    native_ratio = RATIO
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "carafe", "065739b5a6abdd295d0f853f2f938af8fbbe5a2a48b02dec21f37e7713786320", channels=384
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(
        self,
        channels: int = 384,
        *,
        compressed: int = 64,
        encoder_kernel: int = 3,
        up_kernel: int = 5,
        padding: Padding = "zeros",
        share_stages: bool = True,
    ) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features.
            compressed: Channels that logits are predicted from.
            encoder_kernel: Side of the convolution that predicts them; odd.
            up_kernel: Side of the reassembly kernels; odd.
            padding: What lies outside the features: "zeros", "replicate" or "reflect".
            share_stages: Whether the four stages have the same weights.
        """
        super().__init__(channels)
        for name, side in (("encoder_kernel", encoder_kernel), ("up_kernel", up_kernel)):
            if side < 1 or side % 2 == 0:
                raise UpbenchError(f"carafe: {name} {side} is not odd")
        if compressed < 1:
            raise UpbenchError(f"carafe: compressed {compressed} is under 1")
        if padding not in get_args(Padding):
            raise unknown("carafe: padding", padding, get_args(Padding))
        self.stack = Stack(
            lambda: Stage(channels, compressed, encoder_kernel, up_kernel, padding), share_stages
        )

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        dense: Tensor = self.stack(features, output_size)
        return dense

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> ChainOperator:
        """See `Upsampler.operator`: the kernels of every stage, which all channels share."""
        return self.stack.operator(features, output_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Upsampler.options_from`; the padding cannot be told."""
        compress, encode = (state.get(f"stack.stages.0.{name}.weight") for name in ("compress", "encode"))
        if compress is None or encode is None or compress.ndim != 4 or encode.ndim != 4:
            return {}
        return {
            "channels": int(compress.shape[1]),
            "compressed": int(compress.shape[0]),
            "encoder_kernel": int(encode.shape[-1]),
            "up_kernel": isqrt(int(encode.shape[0]) // 4),
            "share_stages": shares_stages(state),
        }


class Stage(nn.Module):
    """Kernels for twice the size: channel compressor, content encoder, kernel normaliser."""

    def __init__(
        self, channels: int, compressed: int, encoder_kernel: int, up_kernel: int, padding: Padding
    ) -> None:
        super().__init__()
        self.padding: Padding = padding
        self.compress = nn.Conv2d(channels, compressed, 1)
        self.encode = nn.Conv2d(compressed, 4 * up_kernel**2, encoder_kernel, padding=encoder_kernel // 2)
        nn.init.xavier_uniform_(self.compress.weight)
        nn.init.zeros_(self.compress.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.encode.weight, std=0.001)
        with torch.no_grad():
            self.encode.bias.copy_(gaussian_prior(up_kernel).flatten())  # type: ignore[union-attr]

    def forward(self, features: Tensor, guide: None = None) -> KernelMap:
        """Of `[B, C, h, w]`."""
        logits = F.pixel_shuffle(self.encode(self.compress(features)), 2)
        precise = torch.promote_types(logits.dtype, torch.float32)
        return KernelMap(torch.softmax(logits, 1, dtype=precise).unsqueeze(1), 2, self.padding)
