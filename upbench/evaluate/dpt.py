"""The head of Ranftl et al. 2021 (DPT) as probe3d has it: four maps in, one prediction out."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.protocol import DPT_INPUTS


class DPT(nn.Module):
    """Four maps, from the earliest block's to the last one's, fused from the last to the first.

    Each map goes to the hidden width by a 1x1 convolution and, at twice its size, into a stage of residual
    units; a stage adds its map to what the later ones have made. Of the sum, at four times its size, two 3x3
    convolutions make the outputs, which are enlarged by two again: 16 times in all. Enlargements are bilinear
    with aligned corners.

    Attributes:
        enlarge: Whether maps are enlarged; without it the outputs have the maps' size.
    """

    def __init__(self, channels: int, outputs: int, *, hidden: int, enlarge: bool = True) -> None:
        """Args: channels: Of each map; outputs: K; hidden: Width within; enlarge: See the class."""
        super().__init__()
        self.enlarge = enlarge
        self.narrow = nn.ModuleList(nn.Conv2d(channels, hidden, 1) for _ in range(DPT_INPUTS))
        self.stages = nn.ModuleList(Stage(hidden, first=n == DPT_INPUTS - 1) for n in range(DPT_INPUTS))
        self.last = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four `[B, C, h, w]` to `[B, K, 16 h, 16 w]`."""
        made: Tensor | None = None
        for place in reversed(range(DPT_INPUTS)):
            own = self._enlarged(self.narrow[place](maps[place]), 2)
            made = self.stages[place](own, made)
        assert made is not None
        outputs: Tensor = self.last(self._enlarged(made, 4))
        return self._enlarged(outputs, 2)

    def _enlarged(self, values: Tensor, times: int) -> Tensor:
        if not self.enlarge:
            return values
        return F.interpolate(values, scale_factor=times, mode="bilinear", align_corners=True)


class Stage(nn.Module):
    """Adds a map, after a residual unit, to what later stages have made, and refines the sum by another."""

    def __init__(self, width: int, first: bool) -> None:
        """Args: width: Channels; first: Whether nothing is there to add to."""
        super().__init__()
        self.own = None if first else Residual(width)
        self.both = Residual(width)

    def forward(self, own: Tensor, before: Tensor | None) -> Tensor:
        """`[B, C, h, w]` twice, or once for the first stage."""
        if self.own is not None and before is not None:
            own = self.own(own) + before
        made: Tensor = self.both(own)
        return made


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3."""

    def __init__(self, width: int) -> None:
        """Args: width: Channels."""
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        """`[B, C, h, w]` to the same."""
        made: Tensor = values + self.second(F.relu(self.first(F.relu(values))))
        return made
