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

_STRIP_BYTES = 1024 * 1024  # per thread; a core's own cache holds a strip, its activations and the weights
_MIN_PIXELS = 96 * 96  # smaller maps stay in the cache by themselves
_MIN_SIDE = 3  # what reflection needs; smaller ones are left to the layers, which refuse them


def can_stream(x: Tensor) -> bool:
    """Whether `stream` serves this call: float32 on a CPU, without gradients, autocast or a trace."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-2] * x.shape[-1] >= _MIN_PIXELS
        and min(x.shape[-2:]) >= _MIN_SIDE
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.compiler.is_compiling()
    )


def stream(
    stem: nn.Conv2d, blocks: Iterable[nn.Module], image: Tensor, order: Tensor | None = None
) -> Tensor:
    """A stem and blocks (`upbench.layers.convolutions.Block`): `[B, Cin, H, W]` to `[B, C, H, W]`.

    Convolutions keep the size of the map and are padded by reflection; those of residual blocks are 1x1.

    Args:
        stem: The first convolution.
        blocks: What follows.
        image: `[B, Cin, H, W]`.
        order: `[C]` int64, which channel comes in which place of the result (there must be a block without a
            residual at the end); all in their own place by default.

    Returns:
        `[B, C, H, W]`, channels last in memory.
    """
    blocks = list(blocks)
    b, _, height, width = image.shape
    image = image.contiguous(memory_format=torch.channels_last)
    out = torch.empty((b, stem.out_channels, height, width), memory_format=torch.channels_last)
    for index in range(b):
        x = out[index : index + 1]
        statistics = _convolve(image[index : index + 1], None, stem, x, measured=bool(blocks))
        for block in blocks:
            norm1, conv1, norm2, conv2, residual = _parts(block)
            inner = torch.empty_like(x) if residual else x  # else every layer is done in place
            statistics = _convolve(x, statistics.affine(norm1, width), conv1, inner)
            measured = block is not blocks[-1]
            places = None if measured else order
            statistics = _convolve(
                inner, statistics.affine(norm2, width), conv2, x, measured, residual, places
            )
    return out


def _parts(block: nn.Module) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d, bool]:
    return block.norm1, block.conv1, block.norm2, block.conv2, block.residual  # type: ignore[return-value]


class _Statistics:
    """Means and variances of the channels of one map, strip by strip."""

    def __init__(self, bias: Tensor | None) -> None:
        """Args: bias: `[C]` that belongs to the map and has not been added to it."""
        self._bias = bias
        self._strips: list[tuple[Tensor, Tensor, int]] = []

    def add(self, strip: Tensor) -> None:
        """Args: strip: `[1, C, h, W]`, channels last."""
        mean, variance = torch.batch_norm_update_stats(strip, None, None, 0.0)
        self._strips.append((mean, variance, int(strip.shape[2]) * int(strip.shape[3])))

    def affine(self, norm: nn.GroupNorm, width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift `[1, C, 1, W]` that bias and norm come to; as long as a row, for long inner
        loops."""
        means = torch.stack([strip[0] for strip in self._strips]).double()
        variances = torch.stack([strip[1] for strip in self._strips]).double()
        bias = torch.zeros_like(means[0]) if self._bias is None else self._bias.double()
        share = torch.tensor([strip[2] for strip in self._strips], dtype=torch.float64)
        share = (share / share.sum())[:, None, None]
        groups = (-1, norm.num_groups, means.shape[1] // norm.num_groups)
        means, variances = (means + bias).view(groups), variances.view(groups)
        centre = (share * means).sum(0).mean(1, keepdim=True)
        spread = (share * (variances + (means - centre).square())).sum(0).mean(1, keepdim=True)
        scale = norm.weight.double().view(groups[1:]) * (spread + norm.eps).rsqrt()
        shift = norm.bias.double().view(groups[1:]) + (bias.view(groups[1:]) - centre) * scale
        return _along_row(scale, width), _along_row(shift, width)


def _along_row(values: Tensor, width: int) -> Tensor:
    row = values.float().view(1, 1, 1, -1).expand(1, 1, width, -1)
    return row.contiguous().permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    affine: tuple[Tensor, Tensor] | None,
    conv: nn.Conv2d,
    out: Tensor,
    measured: bool = True,
    add: bool = False,
    order: Tensor | None = None,
) -> _Statistics:
    """Writes conv(silu(scale x + shift)), or conv(x) without `affine`, to `out`, which may be `x`.

    Args:
        x: `[1, Cin, H, W]`.
        affine: Scale and shift.
        conv: The convolution.
        out: `[1, Cout, H, W]`.
        measured: Whether to take statistics of the output. If so, the bias of a 1x1 convolution is left to
            them.
        add: Whether to add to `out`, for a 1x1 convolution.
        order: `[Cout]`, which channel comes in which place of `out`.
    """
    height, width = int(x.shape[2]), int(x.shape[3])
    pointwise = conv.kernel_size == (1, 1)
    deferred = pointwise and measured and not add
    weight, bias = conv.weight, conv.bias
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    statistics = _Statistics(bias if deferred else None)
    if pointwise:
        weight = weight.flatten(1).t()
    row = width * max(conv.in_channels, conv.out_channels) * x.element_size()
    window = _Window(x, affine, (int(conv.padding[0]), int(conv.padding[1])))
    step = max(8, torch.get_num_threads() * _STRIP_BYTES // row)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip, target = window.rows(top, bottom), out[:, :, top:bottom]
        if pointwise:
            pixels = strip.permute(0, 2, 3, 1).reshape(-1, conv.in_channels)
            product = target.permute(0, 2, 3, 1).view(-1, conv.out_channels)
            _product(pixels, weight, None if deferred else bias, product, add)
        else:
            target.copy_(F.conv2d(strip, weight, bias, dilation=conv.dilation))
        if measured:
            statistics.add(target)
    return statistics


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
    if add:
        out.addmm_(x, weight)
    else:
        torch.mm(x, weight, out=out)
    if bias is not None:  # addmm would first write the bias to all of the output
        out.add_(bias)


class _Window:
    """Strips of silu(scale x + shift), or of x itself, with what a convolution sees around them.

    Rows are read once, and before the rows above them are asked for no more: they may be overwritten.
    """

    def __init__(self, x: Tensor, affine: tuple[Tensor, Tensor] | None, reach: tuple[int, int]) -> None:
        """Args: x: `[1, C, H, W]`; affine: Scale and shift; reach: Rows and columns around, by reflection."""
        self._x = x
        self._affine = affine
        self._reach = reach
        self._seen = 0  # rows read so far
        self._last: Tensor | None = None

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows top - reach..bottom + reach - 1; strips come in order and without gaps."""
        high, wide = self._reach
        height, width = int(self._x.shape[2]), int(self._x.shape[3])
        stop = min(bottom + high, height)
        fresh = self._x[:, :, self._seen : stop]
        if self._affine is None and not (high or wide):
            self._seen = stop
            return fresh
        shape = (1, int(self._x.shape[1]), bottom - top + 2 * high, width + 2 * wide)
        strip = torch.empty(shape, memory_format=torch.channels_last)
        first = self._seen - (top - high)
        new = strip[:, :, first : first + stop - self._seen]
        self._fill(new[..., wide : wide + width], fresh)
        for k in range(wide):
            new[..., wide - 1 - k] = new[..., wide + 1 + k]
            new[..., wide + width + k] = new[..., wide + width - 2 - k]
        if self._last is not None:
            strip[:, :, :first] = self._last[:, :, self._last.shape[2] - first :]
        else:
            for k in range(high):
                strip[:, :, high - 1 - k] = strip[:, :, high + 1 + k]
        for row in range(first + stop - self._seen, shape[2]):  # below the map
            edge = high + height - 1 - top
            strip[:, :, row] = strip[:, :, 2 * edge - row]
        self._seen, self._last = stop, strip
        return strip

    def _fill(self, target: Tensor, rows: Tensor) -> None:
        if self._affine is None:
            target.copy_(rows)
            return
        scale, shift = self._affine
        torch.addcmul(shift, rows, scale, out=target)
        F.silu(target, inplace=True)
