"""Operators that upsample by two, stacked to sixteen: CARAFE, SAPA, DySample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from upbench.layers.convolutions import grid_of
from upbench.ops.chain import ChainOperator, LinearMap, resizing
from upbench.ops.resample import doublings, to_size

STEPS = 4
RATIO = 2**STEPS
"""What a stack upsamples by."""

Guide = Callable[[tuple[int, int]], Tensor]


class Stack(nn.Module):
    """Up to four doublings of a map, then a bilinear resize to the size that is asked for.

    As many stages run as it takes for neither axis to be smaller than the output, at least one and at most
    four. A stage sees the features as the stages before it left them.

    Where stages share their weights, one stage is applied again and again, as LiFT is. Training maps of
    which the largest is four times the smallest reach the first two stages only; the others, with weights of
    their own, would stay as they began.
    """

    def __init__(self, stage: Callable[[], nn.Module], share_stages: bool) -> None:
        """Builds the stages.

        Args:
            stage: Makes one. Called with features `[B, C, h, w]` and a guide `[B, D, 2 h, 2 w]` or None, it
                gives the `LinearMap` that doubles them.
            share_stages: Whether all have the same weights.
        """
        super().__init__()
        self.stages = nn.ModuleList(stage() for _ in range(1 if share_stages else STEPS))

    def forward(self, features: Tensor, output_size: tuple[int, int], guide: Guide | None = None) -> Tensor:
        """Upsamples features.

        Args:
            features: `[B, C, h, w]`.
            output_size: (H, W).
            guide: Gives the stages' guides by their size; none for stages that look at the features alone.

        Returns:
            `[B, C, H, W]`.
        """
        for stage in self._stages(features, output_size):
            features = _map(stage, features, guide)(features)
        return to_size(features, output_size)

    @torch.no_grad()
    def operator(
        self, features: Tensor, output_size: tuple[int, int], guide: Guide | None = None
    ) -> ChainOperator:
        """What `forward` does to these features, as an operator; arguments as there."""
        maps: list[LinearMap] = []
        for stage in self._stages(features, output_size):
            features = maps[-1](features) if maps else features
            maps.append(_map(stage, features, guide))
        return ChainOperator(maps, resizing(maps[-1].output_size, output_size, features))

    def _stages(self, features: Tensor, output_size: tuple[int, int]) -> list[nn.Module]:
        steps = min(STEPS, doublings(grid_of(features), output_size))
        return [self.stages[i % len(self.stages)] for i in range(steps)]


def _map(stage: nn.Module, features: Tensor, guide: Guide | None) -> LinearMap:
    h, w = grid_of(features)
    step: LinearMap = stage(features, None if guide is None else guide((2 * h, 2 * w)))
    return step


def shares_stages(state: Mapping[str, Tensor], prefix: str = "stack.") -> bool:
    """Whether a checkpoint is of a stack whose stages share their weights."""
    return not any(key.startswith(f"{prefix}stages.1.") for key in state)


def gaussian_prior(side: int, sigma: float = 0.45) -> Tensor:
    """`[side * side, 2, 2]` logits of a softmax over taps that begins close to bilinear interpolation.

    A Gaussian of the distance between the centres of a tap's cell and of each of the four pixels of the
    middle cell, in cells. With this sigma the nearest three of an axis weigh 0.76, 0.22 and 0.02, where
    bilinear interpolation has 0.75, 0.25 and 0; taps that begin at zero would not learn.
    """
    cells = torch.arange(side) - side // 2
    pixels = torch.tensor([-0.25, 0.25])
    square = (cells[:, None] - pixels).square() / (2 * sigma**2)  # [side, 2]
    return -(square[:, None, :, None] + square[None, :, None, :]).flatten(0, 1)
