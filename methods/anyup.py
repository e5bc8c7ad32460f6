"""AnyUp: windowed attention whose keys describe the features of any backbone in the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Setting, Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.layers.attention import Position, Projections, from_official
from upbench.layers.convolutions import GROUPS, grid_of, pool, residual_encoder
from upbench.layers.guidance import Guidance, enlarged
from upbench.ops.window.attention import WindowOperator, window_attention, window_operator
from upbench.ops.window.tables import fraction_table
from upbench.ops.window.tiled import TiledWindows

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

HEADS = 4
Part = tuple[slice, slice]
_CHUNK = 16 * 2**20  # bytes of filter responses at a time

_OFFICIAL = {
    ".block.0.": ".norm1.",
    ".block.2.": ".conv1.",
    ".block.3.": ".norm2.",
    ".block.5.": ".conv2.",
    ".0.basis": ".0.filters",
}
_RELEASES = "https://github.com/wimmerth/anyup/releases/download"


class AnyUp(Upsampler):
    """AnyUp (Wimmer et al., ICLR 2026), native.

    Each output pixel averages the raw features of a window of about `2 * window_ratio` of either side. The
    weights come from the image (queries, keys) and from the features' own local structure (keys), which is
    described by `dim` numbers per position for any number of channels.

    As in the official code, the unified features mix channels (see `UnifiedFeatures`): the output is not
    equivariant to a permutation of the channels. The value and output projections of its attention have no
    effect; they are kept (frozen) because its checkpoints hold them and its 878,080 parameters count them.
    """

    name = "anyup"
    title = "AnyUp"
    paper = "Wimmer et al., AnyUp: Universal Feature Upsampling, ICLR 2026, arXiv 2510.12764"
    year = 2025
    license = "CC-BY-4.0"
    trainable = True
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "anyup", "6dafc91dfcaa1391d01d9bfd2b5b5ebac59ff4ecb6837e773cac7d00ed7a4b28"
        ),
        "dinov2_vits14_focus_2000": Weights.shipped(
            "anyup",
            "cd668357c54fb901528a660dd2de1e565629a3f431fa32697da94a50580fa442",
            variant="_2000",
        ),
        "paper": Weights(
            f"{_RELEASES}/checkpoint/anyup_paper.pth",
            sha256="9d035c0f27114a6f32bdd3d8ed93b6cd39dad4b8f8bf94e69fddbfbf022901b2",
            size=3_540_612,
            license="CC-BY-4.0",
            notes="official release, as in the paper",
        ),
        "multi_backbone": Weights(
            f"{_RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
            sha256="b6cc407da8986c7e5c9098e61f7531767a9aca8fff20a1bc6c99d488e61aac59",
            size=3_541_624,
            license="CC-BY-4.0",
            notes="official release, trained on features of several backbones",
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(
        self, channels: int = 384, *, dim: int = 128, filter_size: int = 5, window_ratio: float = 0.1
    ) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features; no parameter depends on it.
            dim: Width of the encoders, queries and keys.
            filter_size: Side of the filters that describe features; odd.
            window_ratio: Half the side of the window as a fraction of the map.
        """
        super().__init__(channels)
        if dim < 8 * GROUPS or dim % (8 * GROUPS):
            raise UpbenchError(f"anyup: dim {dim} is not a multiple of {8 * GROUPS}")
        if filter_size < 1 or filter_size % 2 == 0:
            raise UpbenchError(f"anyup: filter_size {filter_size} is not odd")
        if not 0 < window_ratio <= 1:
            raise UpbenchError(f"anyup: window_ratio {window_ratio} is not in (0, 1]")
        self.window_ratio = window_ratio
        self.image_encoder = residual_encoder(nn.Conv2d(3, dim, 1, bias=False), dim)
        self.position = Position(dim)
        self.query_encoder = residual_encoder(nn.Conv2d(dim, dim, 1, bias=False), dim)
        self.key_encoder = residual_encoder(nn.Conv2d(dim, dim, 1, bias=False), dim)
        self.feature_encoder = residual_encoder(UnifiedFeatures(dim, filter_size), dim)
        reflect = nn.Conv2d(2 * dim, dim, 3, padding=1, padding_mode="reflect", bias=False)
        self.aggregation = residual_encoder(reflect, dim)
        self.attention = Projections(dim)
        self._begin_as_similarity()

    @torch.no_grad()
    def _begin_as_similarity(self) -> None:
        """Makes queries and keys the same function of the image, so that attention compares colour and place.

        That is close to bilinear interpolation, from where training gets further in few steps.
        """
        self.key_encoder.load_state_dict(self.query_encoder.state_dict())
        mix: Tensor = self.aggregation[0].weight  # type: ignore[assignment]
        mix.mul_(0.3)
        mix[:, : len(mix), 1, 1] += torch.eye(len(mix))
        self.attention.begin_as_similarity(sharpness=2)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        queries, keys = self.encode(image, features, output_size)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_attention(queries, keys, features, rows, cols, heads=HEADS, average_heads=True)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> WindowOperator:
        """The attention weights of these features; all channels share them (see `Upsampler.operator`)."""
        with torch.no_grad():
            queries, keys = self.encode(image, features, output_size)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_operator(queries, keys, rows, cols, heads=HEADS, average_heads=True)

    def tile_operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
        *,
        memory_budget: int,
    ) -> TiledWindows:
        """The attention, computed for the crop that is asked for (see `Upsampler.tile_operator`)."""

        def encoded(last: nn.Module) -> Guidance:
            return Guidance([nn.Sequential(self.image_encoder, self.position, last)], image, memory_budget)

        guide = encoded(self.key_encoder).pooled(grid_of(features))
        keys = self.aggregation(torch.cat([guide, self.feature_encoder(features)], 1))
        guidance = encoded(self.query_encoder)

        def queries(part: Part) -> Tensor:
            wider, inner = enlarged(part, output_size, 1)  # what the attention's convolution sees
            projected = self.attention.project_queries(guidance.pooled(output_size, wider))
            return projected[:, :, inner[0], inner[1]]

        rows, cols = self.tables(grid_of(features), output_size)
        keys = self.attention.project_keys(keys)
        return TiledWindows(queries, keys, rows, cols, heads=HEADS, average_heads=True)

    def encode(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Queries `[B, dim, H, W]` and keys `[B, dim, h, w]`, projected."""
        if image.device.type == "cpu":  # faster there for convolutions, position and projections
            image = image.contiguous(memory_format=torch.channels_last)
        encoding = self.position(self.image_encoder(image))
        guide = pool(self.key_encoder(encoding), grid_of(features))
        queries = pool(self.query_encoder(encoding), output_size)
        del encoding
        keys = self.aggregation(torch.cat([guide, self.feature_encoder(features)], 1))
        projected: tuple[Tensor, Tensor] = self.attention(queries, keys)
        return projected

    def tables(self, feature_size: tuple[int, int], output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The low-resolution rows and columns that each output row and column sees."""
        rows, cols = (
            fraction_table(size, cells, self.window_ratio)
            for size, cells in zip(output_size, feature_size, strict=True)
        )
        return rows, cols

    @classmethod
    def skip_reason(cls, setting: Setting) -> str | None:
        """Maps of one row or column, which cannot be reflected at their border."""
        if min(setting.feature_size) < 2:
            h, w = setting.feature_size
            return f"anyup needs at least 2 x 2 features, not {h} x {w}"
        return super().skip_reason(setting)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`dim` and `filter_size`, from the filters."""
        filters = cls.convert_state(state).get("feature_encoder.0.filters")
        if filters is None or filters.ndim != 4:
            return {}
        return {"dim": int(filters.shape[0]), "filter_size": int(filters.shape[-1])}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`; the packed input projection is split into query, key and value."""
        return from_official(state, _OFFICIAL)


class UnifiedFeatures(nn.Module):
    """A description of the features' local structure, of the same size for any number of channels.

    Every normalised channel is filtered with the same `dim` filters. The official code lays the C * dim
    responses out channel by channel, reads them as dim x C, takes the softmax over the first axis and the
    mean over the second. That mixes channels and filters, and the released weights depend on it.
    """

    def __init__(self, dim: int, filter_size: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.empty(dim, 1, filter_size, filter_size))
        nn.init.kaiming_uniform_(self.filters, a=math.sqrt(5))

    def forward(self, features: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, dim, h, w]`, summing to 1 over channels. A few rows at a time."""
        b, c, h, w = map(int, features.shape)
        dim, _, side, _ = map(int, self.filters.shape)
        reach = side // 2
        padded = F.pad(F.normalize(features, dim=1), (reach,) * 4)
        patches = padded.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)  # [B, h, w, C, 5, 5]
        taps = (_taps(h, reach, features)[:, None] * _taps(w, reach, features))[:, :, None, None, None]
        filters = self.filters.flatten(1).T
        step = max(1, _CHUNK // (b * c * dim * w * features.element_size()))
        # One result from the start: small ones among large buffers would keep the heap from shrinking.
        means = features.new_empty(b, h, w, dim, dtype=torch.promote_types(features.dtype, torch.float32))
        for top in range(0, h, step):
            rows = (patches[:, top : top + step] / taps[top : top + step]).reshape(-1, c, side * side)
            responses = (rows @ filters).view(-1, dim, c)  # not transposed: read anew, position by position
            # In float32: the result is nearly constant, and what follows normalises the small differences.
            weights = torch.softmax(responses, 1, dtype=means.dtype)
            means[:, top : top + step] = weights.mean(2).view(b, -1, w, dim)
        return means.permute(0, 3, 1, 2).to(features.dtype)


def _taps(size: int, reach: int, like: Tensor) -> Tensor:
    """`[size]` how many of a filter's taps lie inside an axis."""
    place = torch.arange(size, device=like.device)
    inside = (place + reach).clamp(max=size - 1) - (place - reach).clamp(min=0) + 1
    return inside.to(like.dtype)
