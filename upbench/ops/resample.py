"""Resampling that treats rows and columns alike and looks at no image.

All functions use half-pixel centres: cell j of n spans [j, j + 1) of an axis of length n. Each axis is
treated by itself: one that shrinks is antialiased even where the other one grows.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.ops.separable import SeparableOperator

Mode = Literal["nearest", "bilinear", "bicubic"]


def resize(values: Tensor, output_size: tuple[int, int], mode: Mode) -> Tensor:
    """Interpolates `[B, C, h, w]` to `[B, C, H, W]`.

    Args:
        values: Any float dtype; half types are antialiased in float32 (PyTorch has no such kernel on the
            CPU).
        output_size: (H, W).
        mode: "nearest" takes the cell that holds the output pixel's centre ("nearest-exact" of PyTorch),
            never antialiased. "bilinear" and "bicubic" repeat the border; "bicubic" has a = -0.75 where an
            axis grows (as PyTorch) and a = -0.5 where it shrinks (as Pillow).

    Returns:
        `[B, C, H, W]`, dtype of `values`; a copy where the size stays.
    """
    if mode == "nearest":
        return F.interpolate(values, output_size, mode="nearest-exact")
    (h, w), (out_h, out_w) = values.shape[-2:], output_size
    smaller = (min(h, out_h), min(w, out_w))
    if smaller != (h, w):
        values = _shrink(values, smaller, mode)
    if smaller != (out_h, out_w):
        values = F.interpolate(values, output_size, mode=mode, align_corners=False)
    return values.clone() if smaller == (h, w) == (out_h, out_w) else values


def to_size(values: Tensor, output_size: tuple[int, int]) -> Tensor:
    """What a method with a fixed ratio does last: its output, at the size that was asked for.

    Bilinear, and antialiased along an axis that shrinks, as `resize` is: the next native size can be much
    larger than the output, and pixels must not be skipped.

    Args:
        values: `[B, C, h, w]` at the native size.
        output_size: (H, W).

    Returns:
        `[B, C, H, W]`; `values` itself where the size is right, so that nothing is copied.
    """
    return (
        values if tuple(values.shape[-2:]) == tuple(output_size) else resize(values, output_size, "bilinear")
    )


def doublings(feature_size: tuple[int, int], output_size: tuple[int, int]) -> int:
    """How often a map must be doubled until neither axis is smaller than the output; at least once.

    The number of steps of a method that upsamples x2 at a time, before `to_size`.
    """
    steps = 1
    while any(n << steps < out for n, out in zip(feature_size, output_size, strict=True)):
        steps += 1
    return steps


def _shrink(values: Tensor, size: tuple[int, int], mode: Mode) -> Tensor:
    x = values.to(torch.promote_types(values.dtype, torch.float32))
    if size[1] == 1 < size[0]:  # PyTorch's kernel repeats one row where the result is one column wide
        x = F.interpolate(x.mT, size[::-1], mode=mode, align_corners=False, antialias=True).mT
    else:
        x = F.interpolate(x, size, mode=mode, align_corners=False, antialias=True)
    return x.to(values.dtype)


def interpolation_matrix(
    size: int, output_size: int, mode: Mode, device: torch.device | None = None
) -> Tensor:
    """`[output_size, size]` float32, the matrix by which `resize` multiplies an axis."""
    unit = torch.eye(size, device=device).reshape(1, size, size, 1)
    return resize(unit, (output_size, 1), mode)[0, :, :, 0].T.contiguous()


def interpolation_operator(features: Tensor, output_size: tuple[int, int], mode: Mode) -> SeparableOperator:
    """`resize` of values on the grid of `features` as an operator."""
    rows, cols = (
        interpolation_matrix(n, out, mode, features.device)
        for n, out in zip(features.shape[-2:], output_size, strict=True)
    )
    return SeparableOperator(rows, cols)


def lanczos_matrix(size: int, output_size: int, lobes: int = 3, device: torch.device | None = None) -> Tensor:
    """The matrix of a Lanczos resampling of one axis, `[output_size, size]` float32, rows summing to 1.

    Entry (i, j) is proportional to L((j + 0.5 - (i + 0.5) s) / max(s, 1)) with s = size / output_size and
    L(t) = sinc(t) sinc(t / lobes) for |t| < lobes, else 0. The part of the window that lies outside the grid
    is left out and the rest renormalised (Pillow's convention). Where the axis shrinks, the kernel is widened
    by s, which antialiases.
    """
    scale = size / output_size
    cells = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    centres = (torch.arange(output_size, dtype=torch.float64, device=device) + 0.5) * scale
    t = (cells - centres[:, None]) / max(scale, 1.0)
    weights = torch.where(t.abs() < lobes, torch.sinc(t) * torch.sinc(t / lobes), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def lanczos_operator(features: Tensor, output_size: tuple[int, int], lobes: int = 3) -> SeparableOperator:
    """A Lanczos resampling of values on the grid of `features` as an operator."""
    rows, cols = (
        lanczos_matrix(n, out, lobes, features.device)
        for n, out in zip(features.shape[-2:], output_size, strict=True)
    )
    return SeparableOperator(rows, cols)


def resize_guidance(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A guidance image `[B, 3, h_img, w_img]` on another grid, `[B, 3, *size]`.

    An axis that shrinks is averaged over the pixels that each cell touches (adaptive average pooling), so
    that a cell's colour is that of the patch its feature describes; one that grows is interpolated linearly.
    """
    h, w = image.shape[-2:]
    smaller = (min(h, size[0]), min(w, size[1]))
    if smaller != (h, w):
        image = F.adaptive_avg_pool2d(image, smaller)
    if smaller != size:
        image = F.interpolate(image, size, mode="bilinear", align_corners=False)
    return image
