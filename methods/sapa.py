"""SAPA: each pixel takes the features that its place in the image is similar to."""

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
from upbench.layers.convolutions import GROUPS, convolution, pool, residual_encoder
from upbench.layers.stack import RATIO, Guide, Stack, gaussian_prior, shares_stages
from upbench.ops.chain import ChainOperator, KernelMap
from upbench.ops.reassemble import Padding, affinity

SIMILARITIES = ("bilinear", "gated")


class SAPA(Upsampler):
    """SAPA (see `paper`), doubling by doubling up to x16, then resized.

    A stage compares a guide y of twice the size with the `kernel` x `kernel` features x around each pixel's
    cell, and gives the pixel their average with the softmax of the similarities. With layer norms first, the
    low-rank bilinear similarity (SAPA-B) is (P y) . (Q x), where P and Q lead to `embedding` numbers; the
    gated one (SAPA-G) has g P y + (1 - g) R x' for P y, x' the pixel's own cell and g a sigmoid of it.

    As in the official code, keys and features outside the map are zero and keep their share of the softmax,
    which darkens the border; `padding="replicate"` does not. What is ours: in the paper y is the map of a
    network's encoder, and SAPA learns with the network. Here y is an encoding of the image, averaged to the
    size of the stage; stages share their weights (see `upbench.layers.stack.Stack`; `share_stages=False` for
    weights of their own) and learn to restore features (`upbench train`). Similarities of random weights
    would average all cells alike, so a logit for each tap and each of a cell's four pixels is added, which
    begins close to bilinear interpolation (`positions=False` leaves it out). SAPA-G projects normalised
    features where the official experiments project raw ones, as backbones differ in scale.
    """

    name = "sapa"
    title = "SAPA"
    paper = (
        "Lu et al., SAPA: Similarity-Aware Point Affiliation for Feature Upsampling, NeurIPS 2022, "
        "arXiv 2209.12866"
    )
    year = 2022
    license = "MIT"
    trainable = True
    native_ratio = RATIO
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "sapa", "59090e8817668ac82204987a8d1619de352919e5b87a6bddad95720d4511f602", channels=384
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(
        self,
        channels: int = 384,
        *,
        embedding: int = 64,
        kernel: int = 5,
        similarity: str = "bilinear",
        guide_dim: int = 32,
        positions: bool = True,
        padding: Padding = "zeros",
        share_stages: bool = True,
    ) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features.
            embedding: Length of the vectors that are compared.
            kernel: Side of the kernels; odd.
            similarity: "bilinear" (SAPA-B) or "gated" (SAPA-G).
            guide_dim: Channels of the encoding of the image.
            positions: Whether a logit is learned for each tap and position in the cell.
            padding: What lies outside the features: "zeros", "replicate" or "reflect".
            share_stages: Whether the four stages have the same weights.
        """
        super().__init__(channels)
        if kernel < 1 or kernel % 2 == 0:
            raise UpbenchError(f"sapa: kernel {kernel} is not odd")
        if embedding < 1:
            raise UpbenchError(f"sapa: embedding {embedding} is under 1")
        if guide_dim < GROUPS or guide_dim % GROUPS:
            raise UpbenchError(f"sapa: guide_dim {guide_dim} is not a multiple of {GROUPS}")
        if similarity not in SIMILARITIES:
            raise unknown("sapa: similarity", similarity, SIMILARITIES)
        if padding not in get_args(Padding):
            raise unknown("sapa: padding", padding, get_args(Padding))
        self.encoder = residual_encoder(convolution(3, guide_dim, (3, 3), padding=(1, 1)), guide_dim)
        self.stack = Stack(
            lambda: Stage(channels, guide_dim, embedding, kernel, similarity, positions, padding),
            share_stages,
        )

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        dense: Tensor = self.stack(features, output_size, self._guide(image))
        return dense

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> ChainOperator:
        """See `Upsampler.operator`: the kernels of every stage, which all channels share."""
        with torch.no_grad():
            return self.stack.operator(features, output_size, self._guide(image))

    def _guide(self, image: Tensor) -> Guide:
        if image.device.type == "cpu":  # faster there for convolutions
            image = image.contiguous(memory_format=torch.channels_last)
        encoding = self.encoder(image)
        return lambda size: pool(encoding, size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Upsampler.options_from`; the padding and, without positions, the kernel cannot be told."""
        query, key, positions = (
            state.get(f"stack.stages.0.{name}") for name in ("query.weight", "key.weight", "positions")
        )
        if query is None or key is None or query.ndim != 2 or key.ndim != 2:
            return {}
        options = {
            "channels": int(key.shape[1]),
            "embedding": int(query.shape[0]),
            "guide_dim": int(query.shape[1]),
            "similarity": "gated" if "stack.stages.0.gate.weight" in state else "bilinear",
            "positions": positions is not None,
            "share_stages": shares_stages(state),
        }
        return options if positions is None else {**options, "kernel": isqrt(len(positions))}


class Stage(nn.Module):
    """Kernels for twice the size, from a guide of that size."""

    def __init__(
        self,
        channels: int,
        guide_dim: int,
        embedding: int,
        kernel: int,
        similarity: str,
        positions: bool,
        padding: Padding,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.padding: Padding = padding
        self.norm_guide = nn.LayerNorm(guide_dim)
        self.norm_features = nn.LayerNorm(channels)
        self.query = nn.Linear(guide_dim, embedding)
        self.key = nn.Linear(channels, embedding)
        self.own, self.gate = None, None
        if similarity == "gated":
            self.own = nn.Linear(channels, embedding)
            self.gate = nn.Linear(channels, 1)
        self.positions = nn.Parameter(gaussian_prior(kernel)) if positions else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, guide: Tensor) -> KernelMap:
        """Of `[B, C, h, w]` and `[B, D, 2 h, 2 w]`."""
        x = self.norm_features(features.permute(0, 2, 3, 1))
        queries = self.query(self.norm_guide(guide.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        keys = self.key(x).permute(0, 3, 1, 2)
        if self.own is not None and self.gate is not None:
            own, gate = (_doubled(y.permute(0, 3, 1, 2)) for y in (self.own(x), self.gate(x).sigmoid()))
            queries = torch.lerp(own, queries, gate)
        logits = affinity(queries, keys, self.kernel, 2, self.padding)
        if self.positions is not None:
            logits = logits + self.positions.repeat(1, *features.shape[2:])
        return KernelMap(torch.softmax(logits, 2), 2, self.padding)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")
