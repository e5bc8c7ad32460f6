"""Chains of GroupNorm - SiLU - convolution on a CPU, a strip of rows at a time.

A full-size map of 64 channels at 448 pixels is 51 MB. Layer by layer, norm, activation, padding and
convolution each send it through memory; a strip goes through all four while it lies in the cache. Its
statistics for the next norm are taken on the way, and no map is padded in full. The function is the same; its
statistics, in float64 over those of the strips, come closer to the exact ones than one float32 pass does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STRIP_BYTES = 1536 * 1024  # per thread; about what a core's own cache holds beside the weights
_MIN_PIXELS = 96 * 96  # smaller maps stay in the cache by themselves


def can_stream(x: Tensor) -> bool:
    """Whether `stream` serves this call: float32 on a CPU, without gradients, autocast or a trace."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-2] * x.shape[-1] >= _MIN_PIXELS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.compiler.is_compiling()
    )


def stream(stem: nn.Conv2d, blocks: Iterable[nn.Module], image: Tensor) -> Tensor:
    """A stem and blocks (`upbench.layers.convolutions.Block`): `[B, Cin, H, W]` to `[B, C, H, W]`.

    The result lies in channels-last order. Convolutions keep the size of the map and are padded by
    reflection; those of residual blocks are 1x1.
    """
    blocks = list(blocks)
    b, _, height, width = image.shape
    image = image.contiguous(memory_format=torch.channels_last)
    shape = (b, stem.out_channels, height, width)
    out = torch.empty(shape, memory_format=torch.channels_last)
    between = torch.empty((1, *shape[1:]), memory_format=torch.channels_last)
    for index in range(b):
        x = out[index : index + 1]
        statistics = _Statistics()
        _convolve(image[index : index + 1], None, stem, x, statistics)
        for block in blocks:
            norm1, conv1, norm2, conv2, residual = _parts(block)
            affine, statistics = statistics.affine(norm1, width), _Statistics()
            _convolve(x, affine, conv1, between, statistics)
            affine, statistics = statistics.affine(norm2, width), _Statistics()
            last = None if block is blocks[-1] else statistics
            _convolve(between, affine, conv2, x, last, add=residual)
    return out


def _parts(block: nn.Module) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d, bool]:
    return block.norm1, block.conv1, block.norm2, block.conv2, block.residual  # type: ignore[return-value]


class _Statistics:
    """Means and variances of the channels of one map, strip by strip."""

    def __init__(self) -> None:
        self._strips: list[tuple[Tensor, Tensor, int]] = []

    def add(self, strip: Tensor) -> None:
        """Args: strip: `[1, C, h, W]`, channels last."""
        mean, variance = torch.batch_norm_update_stats(strip, None, None, 0.0)
        self._strips.append((mean, variance, int(strip.shape[2]) * int(strip.shape[3])))

    def affine(self, norm: nn.GroupNorm, width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift `[1, C, 1, W]` that the norm comes to; as long as a row, for long inner loops."""
        means = torch.stack([strip[0] for strip in self._strips]).double()
        variances = torch.stack([strip[1] for strip in self._strips]).double()
        share = torch.tensor([strip[2] for strip in self._strips], dtype=torch.float64)
        share = (share / share.sum())[:, None, None]
        groups = (-1, norm.num_groups, means.shape[1] // norm.num_groups)
        means, variances = means.view(groups), variances.view(groups)
        centre = (share * means).sum(0).mean(1, keepdim=True)
        spread = (share * (variances + (means - centre).square())).sum(0).mean(1, keepdim=True)
        scale = norm.weight.double().view(groups[1:]) * (spread + norm.eps).rsqrt()
        shift = norm.bias.double().view(groups[1:]) - centre * scale
        return _along_row(scale, width), _along_row(shift, width)


def _along_row(values: Tensor, width: int) -> Tensor:
    row = values.float().view(1, 1, 1, -1).expand(1, 1, width, -1)
    return row.contiguous().permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    conv: nn.Conv2d,
    out: Tensor,
    statistics: _Statistics | None,
    add: bool = False,
) -> None:
    """Writes conv(silu(scale x + shift)), or conv(x) without `affine`, to `out` (adds it, for a 1x1)."""
    height, width = int(x.shape[2]), int(x.shape[3])
    reach = int(conv.padding[0])
    row = width * max(conv.in_channels, conv.out_channels) * x.element_size()
    step = max(8, torch.get_num_threads() * _STRIP_BYTES // row)
    pointwise = conv.kernel_size == (1, 1)
    weight = conv.weight.flatten(1).t() if pointwise else conv.weight
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = _activated(x, top - reach, bottom + reach, int(conv.padding[1]), affine)
        target = out[:, :, top:bottom]
        if pointwise:
            pixels = strip.permute(0, 2, 3, 1).reshape(-1, conv.in_channels)
            _product(pixels, weight, conv.bias, target.permute(0, 2, 3, 1).view(-1, conv.out_channels), add)
        else:
            target.copy_(F.conv2d(strip, weight, conv.bias, dilation=conv.dilation))
        if statistics is not None:
            statistics.add(target)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
    if add:
        out.addmm_(x, weight)
    else:
        torch.mm(x, weight, out=out)
    if bias is not None:  # addmm would first write the bias to all of the output
        out.add_(bias)


def _activated(x: Tensor, top: int, bottom: int, reach: int, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows top..bottom-1 of silu(scale x + shift), rows and columns outside of the map by reflection."""
    height, width = int(x.shape[2]), int(x.shape[3])
    above, below = max(0, -top), max(0, bottom - height)
    rows = x[:, :, top + above : bottom - below]
    if affine is None and not (above or below or reach):
        return rows
    shape = (1, int(x.shape[1]), bottom - top, width + 2 * reach)
    padded = torch.empty(shape, memory_format=torch.channels_last)
    inner = padded[:, :, above : bottom - top - below, reach : reach + width]
    if affine is None:
        inner.copy_(rows)
    else:
        torch.addcmul(affine[1], rows, affine[0], out=inner)
        F.silu(inner, inplace=True)
    for k in range(above):
        padded[:, :, above - 1 - k] = padded[:, :, above + 1 + k]
    for k in range(below):
        padded[:, :, bottom - top - below + k] = padded[:, :, bottom - top - below - 2 - k]
    for k in range(reach):
        padded[..., reach - 1 - k] = padded[..., reach + 1 + k]
        padded[..., reach + width + k] = padded[..., reach + width - 2 - k]
    return padded
