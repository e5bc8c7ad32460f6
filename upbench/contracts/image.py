"""How images are normalised, for backbones and for the methods that they guide."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_image(image01: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`[B, 3, H, W]` RGB in 0..1, normalised per channel."""
    return (image01 - per_channel(mean, image01)) / per_channel(std, image01)


def per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """`[1, 3, 1, 1]`, dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)
