"""Features that stand at known places of the image, onto a grid of output pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def placement_matrix(
    centres: Sequence[float], length: float, output_size: int, device: torch.device | None = None
) -> Tensor:
    """The matrix that interpolates one axis linearly between features at given places.

    The weight of a feature falls linearly with the distance of the output pixel's centre and is 0 at one
    spacing (the widest gap between features), or at one output pixel where that is wider, which
    antialiases; weights are then divided by their sum. Beyond the outermost features the border is repeated.
    On centres (j + 0.5) length / n this is bilinear resampling (`upbench.ops.resample.resize`).

    Args:
        centres: Where the n features stand, ascending, in pixels of the image: its first pixel spans 0 to 1.
        length: Of the image along this axis in pixels; the output spans it.
        output_size: Pixels of the output.
        device: Of the result.

    Returns:
        `[output_size, n]` float32, rows summing to 1.
    """
    places = torch.tensor(centres, dtype=torch.float64, device=device)
    pixel = length / output_size
    gap = float(places.diff().max()) if len(places) > 1 else length
    pixels = (torch.arange(output_size, dtype=torch.float64, device=device) + 0.5) * pixel
    # No pixel is farther from a feature than half a gap, so that none is left without a weight.
    pixels = pixels.clamp(float(places[0]) - gap / 2, float(places[-1]) + gap / 2)
    weights = (1 - (pixels[:, None] - places).abs() / max(gap, pixel)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).float()
