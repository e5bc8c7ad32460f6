"""JAFAR: global attention whose keys are the image's, modulated by the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.operator import Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.layers.attention import Position, Projections, from_official
from upbench.layers.convolutions import GROUPS, Block, grid_of, pool, residual_encoder
from upbench.ops.attention import global_attention, global_operator

HEADS = 4
_OFFICIAL = {"sft_key.": "modulation."}
_RELEASE = "https://github.com/PaulCouairon/JAFAR/releases/download/Weights"


def _released(backbone: str, channels: int, sha256: str | None = None, notes: str = "") -> Weights:
    return Weights(
        f"{_RELEASE}/{backbone}.pth",
        sha256=sha256,
        license="Apache-2.0",
        backbone=backbone,
        channels=channels,
        key="jafar",
        notes=f"official release{notes}",
    )


class JAFAR(Upsampler):
    """JAFAR (Couairon et al., NeurIPS 2025), native.

    Each output pixel averages the raw features of all cells. Queries and keys are encodings of the image and
    of the position in it; the keys, pooled to the features' grid, are scaled and shifted by functions of the
    features (a spatial feature transform, SFT). So C is tied to the weights, and so is the backbone.

    As in the official code, on which its weights depend: the position turns channels in a way that is a
    rotation in form only (see `Position`), and the softmax weights are averaged over heads before they are
    applied. The norm and the projection of values and the output projection have no effect; they are kept
    (frozen) because its checkpoints hold them and its 529,792 + 257 C parameters count them.

    The official code holds the weights of all heads at once, 3.3 GB at 448 pixels and 32 x 32 features; here
    they are computed for runs of queries (see `upbench.ops.attention`). Without weights, attention begins
    close to bilinear interpolation, from where training gets further in few steps.
    """

    name = "jafar"
    title = "JAFAR"
    paper = "Couairon et al., JAFAR: Jack up Any Feature at Any Resolution, NeurIPS 2025, arXiv 2506.11136"
    year = 2025
    license = "Apache-2.0"
    trainable = True
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "jafar", "b9ae6d4775cd61bd5488444bac15f45a34b134752c3a8f1776f87a22d7bdbbc8", channels=384
        ),
        "dinov2_vits14": _released(
            "vit_small_patch14_dinov2.lvd142m",
            384,
            "139e683d1aaadf9ad5a15e33e0908df1ae3e1bf338f21468b8430526723cb7e3",
            "; sha256 of a third party's copy",
        ),
        "dinov2_vitb14": _released("vit_base_patch14_dinov2.lvd142m", 768),
        "dinov2_vits14_reg4": _released("vit_small_patch14_reg4_dinov2", 384),
        "vitb16": _released("vit_base_patch16_224", 768, notes="; its README swaps this link with the next"),
        "dino_vitb16": _released("vit_base_patch16_224.dino", 768),
        "clip_vitb16": _released("vit_base_patch16_clip_384", 768),
        "siglip2_vitb16": _released("vit_base_patch16_siglip_512.v2_webli", 768),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(self, channels: int = 384, *, dim: int = 128) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features; the first convolution of their encoder depends on it.
            dim: Width of the encoders, queries and keys.
        """
        super().__init__(channels)
        if dim < 8 * GROUPS or dim % (8 * GROUPS):
            raise UpbenchError(f"jafar: dim {dim} is not a multiple of {8 * GROUPS}")
        self.image_encoder = residual_encoder(nn.Conv2d(3, dim, 1, bias=False), dim)
        self.position = Position(dim)
        self.query_encoder = residual_encoder(nn.Conv2d(dim, dim, 1, bias=False), dim)
        self.key_encoder = residual_encoder(nn.Conv2d(dim, dim, 1, bias=False), dim)
        self.feature_encoder = residual_encoder(nn.Conv2d(channels, dim, 1, bias=False), dim)
        self.modulation = Modulation(dim)
        self.attention = Projections(dim, channels)
        self._begin_as_similarity()

    @torch.no_grad()
    def _begin_as_similarity(self) -> None:
        """Makes queries and keys nearly the same function of the image, so that attention compares place and
        colour.

        With the official initialisation it begins as an average over the whole map, and learning where a
        pixel lies would take most of a short training. The features' encoding gets a constant part, from
        which the modulation makes a factor near 1; the image's encoding does, too, so that the position
        alone, at three times the frequencies, tells places apart.
        """
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        self.attention.begin_as_similarity(sharpness=4)
        self.position.frequencies.mul_(3)
        _add_constant(self.image_encoder, 1.0)
        constant = _add_constant(self.feature_encoder, 2.0)
        gamma, beta = self.modulation.gamma.weight, self.modulation.beta.weight
        for weight in (gamma, beta):
            weight.mul_(0.1)
        gamma[:, :, 0, 0] += constant / constant.square().sum()

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        queries, keys = self.encode(image, features, output_size)
        return global_attention(queries, keys, features, heads=HEADS, average_heads=True)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Operator:
        """The attention to these features; all channels share its weights (see `Upsampler.operator`)."""
        with torch.no_grad():
            queries, keys = self.encode(image, features, output_size)
        return global_operator(queries, keys, heads=HEADS, average_heads=True)

    def encode(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries `[B, dim, H, W]` and keys `[B, dim, h, w]`, projected."""
        if image.device.type == "cpu":  # faster there for convolutions, position and projections
            image = image.contiguous(memory_format=torch.channels_last)
        encoding = self.position(self.image_encoder(image))
        guide = pool(self.key_encoder(encoding), grid_of(features))
        queries = F.group_norm(pool(self.query_encoder(encoding), output_size), GROUPS)
        del encoding
        keys = self.modulation(guide, self.feature_encoder(F.normalize(features, dim=1)))
        projected: tuple[Tensor, Tensor] = self.attention(queries, keys)
        return projected

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`dim` and `channels`, from the first convolution over features."""
        stem = cls.convert_state(state).get("feature_encoder.0.weight")
        if stem is None or stem.ndim != 4:
            return {}
        return {"dim": int(stem.shape[0]), "channels": int(stem.shape[1])}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`; projections are packed into one matrix where C = dim."""
        return from_official(state, _OFFICIAL)


def _add_constant(encoder: nn.Sequential, bias: float) -> Tensor:
    """Adds a constant `[dim]` to an encoder's output, by the bias of its last norm, and returns it."""
    last = encoder[-1]
    assert isinstance(last, Block)
    last.norm2.bias.fill_(bias)
    added: Tensor = last.conv2.weight[:, :, 0, 0] @ F.silu(last.norm2.bias)
    return added


class Modulation(nn.Module):
    """Spatial feature transform (Wang et al., CVPR 2018): keys, normalised, then scaled and shifted by
    functions of the features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Conv2d(dim, dim, 1, bias=False)
        self.beta = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, keys: Tensor, features: Tensor) -> Tensor:
        """Keys and encoded features, both `[B, dim, h, w]`, to the same shape."""
        return torch.addcmul(self.beta(features), self.gamma(features), F.group_norm(keys, GROUPS))
