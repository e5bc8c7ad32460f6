"""Fourier features of coordinates, as FeatUp's implicit network and LoftUp use them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Waves(nn.Module):
    """Sines and cosines of coordinates, at frequencies from e^-2 to e^10 that grow geometrically."""

    def __init__(self, components: int, count: int) -> None:
        """Args: components: Coordinates of a point; count: Frequencies."""
        super().__init__()
        self.biases = nn.Parameter(torch.randn(2, components, count))

    def forward(self, points: Tensor) -> Tensor:
        """`[..., components]` to `[..., 2 * components * count]`, sines first; frequencies vary slowest."""
        frequencies = torch.linspace(-2, 10, int(self.biases.shape[2])).exp().to(points.device)
        # Product and sum are rounded one after the other: a fused operation would change the output.
        angles = (points.unsqueeze(-2) * frequencies.view(-1, 1)).flatten(-2)
        sines, cosines = self.biases.to(angles.dtype).flatten(1)
        return torch.cat([(angles + sines).sin(), (angles + cosines).cos()], -1)


def places(size: tuple[int, int], like: Tensor) -> Tensor:
    """`[H, W, 2]` row and column, -1 to 1 with both ends, in float32 or better, on the device of `like`."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
    return torch.stack(axes, 2).to(like.device, torch.promote_types(like.dtype, torch.float32))
