"""DySample: each pixel is sampled from the features at a point that the features predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError, unknown
from upbench.layers.stack import RATIO, Stack, shares_stages
from upbench.ops.chain import ChainOperator, LinearMap

STYLES = ("lp", "pl")
REACH = 0.25
"""Of a cell: without a learned scope, the factor on offsets (the paper's static scope factor)."""


class DySample(Upsampler):
    """DySample (see `paper`), doubling by doubling up to x16, then resized.

    In a stage each of a cell's four pixels is sampled, bilinearly, where it lies between the features, plus
    a quarter of an offset that a 1x1 convolution of the features predicts; `groups` groups of channels have
    offsets of their own. Style "lp" predicts the offsets of the four pixels and then shuffles them to their
    places, "pl" shuffles the features first (a quarter of the channels at each pixel). With
    `dynamic_scope` (a "+" in the paper) the factor is half a sigmoid of another convolution. Points outside
    the map are drawn to its border. The image is not looked at.

    It begins as bilinear interpolation. What is ours: in the paper the operator is a layer of a network, and
    learns with it; here four stand alone, share their weights (see `upbench.layers.stack.Stack`;
    `share_stages=False` for weights of their own) and learn to restore features (`upbench train`).
    """

    name = "dysample"
    title = "DySample"
    paper = "Liu et al., Learning to Upsample by Learning to Sample, ICCV 2023, arXiv 2308.15085"
    year = 2023
    license = "MIT"
    guided = False
    trainable = True
    native_ratio = RATIO
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "dysample", "bb3f9fca9c83fbddb3a8c82670475c2b22e649b207c53512d0465ad3dfcd9053", channels=384
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(
        self,
        channels: int = 384,
        *,
        style: str = "lp",
        groups: int = 4,
        dynamic_scope: bool = False,
        share_stages: bool = True,
    ) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features.
            style: "lp" or "pl"; the second one needs a multiple of four channels.
            groups: Groups of channels with offsets of their own; divides C.
            dynamic_scope: Whether the reach of offsets is learned.
            share_stages: Whether the four stages have the same weights.
        """
        super().__init__(channels)
        if style not in STYLES:
            raise unknown("dysample: style", style, STYLES)
        if groups < 1 or channels % groups:
            raise UpbenchError(f"dysample: {channels} channels cannot be split into {groups} groups")
        if style == "pl" and channels % 4:
            raise UpbenchError(f"dysample: style 'pl' needs a multiple of 4 channels, got {channels}")
        self.stack = Stack(lambda: Stage(channels, style, groups, dynamic_scope), share_stages)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        dense: Tensor = self.stack(features, output_size)
        return dense

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> ChainOperator:
        """See `Upsampler.operator`: the points of every stage and group."""
        return self.stack.operator(features, output_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Upsampler.options_from`."""
        weight, start = (state.get(f"stack.stages.0.{name}") for name in ("offset.weight", "start"))
        if weight is None or start is None or weight.ndim != 4 or start.ndim != 4:
            return {}
        style = "lp" if len(weight) == start.numel() else "pl"
        return {
            "channels": int(weight.shape[1]) * (1 if style == "lp" else 4),
            "style": style,
            "groups": int(start.shape[1]),
            "dynamic_scope": "stack.stages.0.scope.weight" in state,
            "share_stages": shares_stages(state),
        }


class Stage(nn.Module):
    """Points for twice the size."""

    start: Tensor

    def __init__(self, channels: int, style: str, groups: int, dynamic_scope: bool) -> None:
        super().__init__()
        self.shuffled_first = style == "pl"
        inputs, outputs = (channels // 4, 2 * groups) if self.shuffled_first else (channels, 8 * groups)
        self.offset = nn.Conv2d(inputs, outputs, 1)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        self.scope = None
        if dynamic_scope:
            self.scope = nn.Conv2d(inputs, outputs, 1)  # half a sigmoid of zero is a quarter
            nn.init.zeros_(self.scope.weight)
            nn.init.zeros_(self.scope.bias)  # type: ignore[arg-type]
        place = torch.tensor([-0.25, 0.25])  # of a cell's pixels, from its centre
        places = torch.stack([place.expand(2, 2), place.expand(2, 2).T])  # (x, y), row, column
        self.register_buffer("start", places.unsqueeze(1).repeat(1, groups, 1, 1))

    def forward(self, features: Tensor, guide: None = None) -> PointMap:
        """Of `[B, C, h, w]`."""
        x = F.pixel_shuffle(features, 2) if self.shuffled_first else features
        offsets = self.offset(x) * (REACH if self.scope is None else 0.5 * self.scope(x).sigmoid())
        offsets = offsets if self.shuffled_first else F.pixel_shuffle(offsets, 2)
        precise = torch.promote_types(offsets.dtype, torch.float32)
        b, _, h, w = features.shape
        start = self.start.to(precise).repeat(1, 1, h, w)  # [2, groups, 2 h, 2 w]
        return PointMap(offsets.to(precise).view(b, *start.shape) + start, (int(h), int(w)))


@dataclass
class PointMap(LinearMap):
    """Each pixel is a bilinear sample of the values; those outside are those at the border.

    Attributes:
        offsets: `[B, 2, G, H, W]` x and y of each pixel's point from the centre of the cell that holds the
            pixel, in cells; small, so that float16 serves.
        size: (h, w) of the grid that points refer to.
        pixels: Row and column of the first pixel, where the map is cut from a larger one.
        cells: Row and column of the first cell that it is called with.
    """

    offsets: Tensor
    size: tuple[int, int]
    pixels: tuple[int, int] = (0, 0)
    cells: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.groups = int(self.offsets.shape[2])
        self.output_size = (int(self.offsets.shape[3]), int(self.offsets.shape[4]))

    def __call__(self, values: Tensor) -> Tensor:
        """See `LinearMap`; computed in float32 at least."""
        b, c, h, w = map(int, values.shape)
        y, x = self._points()
        grid = torch.stack([(x - self.cells[1]) * (2 / w) - 1, (y - self.cells[0]) * (2 / h) - 1], -1)
        dtype = torch.promote_types(values.dtype, grid.dtype)
        grouped = values.reshape(b * self.groups, c // self.groups, h, w).to(dtype)
        dense = F.grid_sample(
            grouped, grid.flatten(0, 1).to(dtype), padding_mode="border", align_corners=False
        )
        return dense.view(b, c, *self.output_size).to(values.dtype)

    def _points(self) -> tuple[Tensor, Tensor]:
        """y and x `[B, G, H, W]` in cells; a cell's centre lies at its index and a half."""
        dtype = torch.promote_types(self.offsets.dtype, torch.float32)
        x, y = self.offsets.to(dtype).unbind(1)
        rows, cols = (
            (torch.arange(first, first + count, device=x.device) // 2 + 0.5)
            for first, count in zip(self.pixels, self.output_size, strict=True)
        )
        return y + rows[:, None], x + cols

    def crop(self, rows: slice, cols: slice) -> tuple[PointMap, slice, slice]:
        """See `LinearMap`; offsets are a view."""
        (top, bottom, _), (left, right, _) = (
            part.indices(size) for part, size in zip((rows, cols), self.output_size, strict=True)
        )
        pixels = (self.pixels[0] + top, self.pixels[1] + left)
        part = replace(self, offsets=self.offsets[..., top:bottom, left:right], pixels=pixels)
        row_cells, col_cells = (
            _touched(points, size) for points, size in zip(part._points(), self.size, strict=True)
        )
        part.cells = (row_cells.start, col_cells.start)
        top, left = self.cells
        row_inputs = slice(row_cells.start - top, row_cells.stop - top)
        return part, row_inputs, slice(col_cells.start - left, col_cells.stop - left)

    def to(self, *args: Any, **kwargs: Any) -> PointMap:
        """See `LinearMap`."""
        return replace(self, offsets=self.offsets.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the offsets."""
        return self.offsets.numel() * self.offsets.element_size()


def _touched(points: Tensor, size: int) -> slice:
    """The cells of an axis that bilinear samples at some points read."""
    low, high = (points.min() - 0.5).floor(), (points.max() - 0.5).floor() + 1
    return slice(int(low.clamp(0, size - 1)), int(high.clamp(0, size - 1)) + 1)
