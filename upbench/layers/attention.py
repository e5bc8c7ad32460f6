"""What JAFAR and AnyUp share: waves of the position, and the projections of their attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.layers.convolutions import grid_of


class Position(nn.Module):
    """Multiplies channels by waves of the position, in pairs (c, c + dim / 2).

    The official code starts channels of the first half from the row and of the second from the column;
    trained checkpoints mix both, so that it is a rotation in form only.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        base = 2 * math.pi * 100 ** torch.linspace(0, -1, dim // 4)
        waves = torch.zeros(2, dim)
        waves[0, : dim // 2] = waves[1, dim // 2 :] = base.repeat(2)
        self.frequencies = nn.Parameter(waves)

    def forward(
        self, x: Tensor, size: tuple[int, int] | None = None, part: tuple[slice, slice] | None = None
    ) -> Tensor:
        """`[B, dim, H, W]` to the same shape; both axes run from 0 to 1, ends included.

        Args:
            x: What to multiply.
            size: Of the whole map, where `x` is a part of it.
            part: The rows and columns of the map that `x` is.
        """
        rows, cols = (self._waves(axis, length) for axis, length in enumerate(size or grid_of(x)))
        if part is not None:
            rows, cols = rows[:, part[0]], cols[:, part[1]]
        half = int(x.shape[1]) // 2
        a, b = x.permute(0, 2, 3, 1).split(half, 3)
        cos, sin = _outer(rows[..., :half], cols[..., :half])
        first = torch.addcmul(a * cos, b, sin, value=-1).to(x.dtype)
        cos, sin = _outer(rows[..., half:], cols[..., half:])
        second = torch.addcmul(b * cos, a, sin).to(x.dtype)
        return torch.cat([first, second], 3).permute(0, 3, 1, 2)

    def _waves(self, axis: int, size: int) -> Tensor:
        """Cosine and sine along an axis, `[2, size, dim]`."""
        place = torch.linspace(0, 1, size, device=self.frequencies.device)
        angle = place[:, None] * self.frequencies[axis].float()
        return torch.stack([angle.cos(), angle.sin()])


def _outer(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """`[2, H, dim]` and `[2, W, dim]`: cosine and sine `[H, W, dim]` of the sums of the angles."""
    cos_r, sin_r = rows.unsqueeze(2)
    cos_c, sin_c = cols.unsqueeze(1)
    return torch.addcmul(cos_r * cos_c, sin_r, sin_c, value=-1), torch.addcmul(sin_r * cos_c, cos_r, sin_c)


class Projections(nn.Module):
    """Queries and keys of the attention: queries through a 3x3 convolution; both normalised and projected.

    What the official code does to values has no effect, as it applies the attention's weights to the raw
    features. It is kept, frozen, because checkpoints hold it.
    """

    def __init__(self, dim: int, channels: int | None = None) -> None:
        """Builds the projections.

        Args:
            dim: Width of queries and keys.
            channels: C of the features, where checkpoints hold a norm and a projection of them (JAFAR).
        """
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)
        if channels is not None:
            self.value_norm = RMSNorm(channels).requires_grad_(False)
        self.query, self.key = (nn.Linear(dim, dim) for _ in range(2))
        self.value = nn.Linear(channels or dim, dim)
        self.output = nn.Linear(dim, dim)
        for unused in (self.value, self.output):
            unused.requires_grad_(False)

    @torch.no_grad()
    def begin_as_similarity(self, sharpness: float) -> None:
        """Sets random weights so that logits compare what queries and keys are made of.

        Args:
            sharpness: Factor on both projections.
        """
        self.conv.weight.zero_()
        self.conv.weight[:, :, 1, 1] = torch.eye(len(self.conv.weight))
        self.query.weight.mul_(sharpness)
        self.key.weight.copy_(self.query.weight)
        for bias in (self.query.bias, self.key.bias):
            bias.zero_()

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, dim, H, W]` and `[B, dim, h, w]` to the same shapes."""
        return self.project_queries(queries), self.project_keys(keys)

    def project_queries(self, queries: Tensor) -> Tensor:
        """`[B, dim, H, W]` to the same shape; sees a pixel around, zeros beyond the border."""
        return _project(self.query, self.query_norm(self.conv(queries)))

    def project_keys(self, keys: Tensor) -> Tensor:
        """`[B, dim, h, w]` to the same shape."""
        return _project(self.key, self.key_norm(keys))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of a map; epsilon is that of the data type."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` to the same shape."""
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps)
        return x * scale * self.weight.view(-1, 1, 1)


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


_OFFICIAL = {
    "cross_decode.conv2d.": "attention.conv.",
    "cross_decode.cross_attn.norm_q.": "attention.query_norm.",
    "cross_decode.cross_attn.norm_k.": "attention.key_norm.",
    "cross_decode.cross_attn.norm_v.": "attention.value_norm.",
    "cross_decode.cross_attn.attention.q_proj_weight": "attention.query.weight",
    "cross_decode.cross_attn.attention.k_proj_weight": "attention.key.weight",
    "cross_decode.cross_attn.attention.v_proj_weight": "attention.value.weight",
    "cross_decode.cross_attn.attention.out_proj.": "attention.output.",
    "rope.freqs": "position.frequencies",
    "key_features_encoder.": "feature_encoder.",
}
_PACKED = "cross_decode.cross_attn.attention.in_proj_"


def from_official(state: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """A checkpoint of JAFAR or AnyUp under our names; names that are ours pass unchanged.

    Both lay their attention out as `nn.MultiheadAttention` does: projections of queries, keys and values are
    rows of one matrix where all have the same width and three matrices else; their biases are always one
    vector.

    Args:
        state: The official tensors.
        renamed: Parts of names that are the method's own, official to ours.
    """
    converted = {}
    for key, tensor in state.items():
        if key.startswith(_PACKED):
            converted.update(unpacked("attention.", key[len(_PACKED) :], tensor))
            continue
        for official, ours in (*_OFFICIAL.items(), *renamed.items()):
            key = key.replace(official, ours)
        converted[key] = tensor
    return converted


def unpacked(prefix: str, kind: str, packed: Tensor) -> dict[str, Tensor]:
    """The rows of a packed input projection of `nn.MultiheadAttention`, as three linear layers have them.

    Args:
        prefix: What names begin with, as in "attention.".
        kind: "weight" or "bias".
        packed: `[3 dim, ...]`, rows of queries, keys and values.
    """
    parts = zip(("query", "key", "value"), packed.chunk(3), strict=False)
    return {f"{prefix}{name}.{kind}": part.clone() for name, part in parts}
