"""Encodings of the guidance image that are read in rectangles, whatever the size of the image.

Convolutions see a few pixels around, but a group norm sees the whole image. So an encoding that is too large
to be kept is computed in several passes over the image in blocks: one for the statistics of every norm, in
their order, each with the norms before it already known. Then any rectangle of it can be computed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.errors import UpbenchError
from upbench.layers.attention import Position
from upbench.layers.convolutions import Block, grid_of, pool
from upbench.ops.pooling import pool_part, pooled_span
from upbench.system.allocator import trim

_TEMPORARIES = 4  # maps that computing an encoding holds beside the result, about
_BLOCK_MAPS = 14  # maps that computing a block takes, the allocator's leftovers included
_WIDEST = 1024  # columns of a block
_LEAST = 4096  # pixels of a block

Part = tuple[slice, slice]


class Guidance:
    """The encoding of a batch of images by one or several encoders, `[B, dim, h_img, w_img]`, in parts.

    Attributes:
        size: (h_img, w_img).
        kept: Whether the whole encoding is held in memory.
    """

    def __init__(self, encoders: Sequence[nn.Module], image: Tensor, memory_budget: int) -> None:
        """Encodes the image, or gathers the statistics of its norms where the encoding is too large to keep.

        Args:
            encoders: Made of `Branch`, `residual_encoder` and `Position`; their channels are concatenated.
            image: `[B, 3, h_img, w_img]`, normalised.
            memory_budget: Bytes that the encoding and its computation may take, about.

        Raises:
            UpbenchError: An encoder with other modules, where the encoding is too large to keep.
        """
        self.size = grid_of(image)
        chains = [list(_steps(encoder)) for encoder in encoders]
        dims = [_channels(chain) for chain in chains]
        pixel = int(image.shape[0]) * image.element_size()
        area = self.size[0] * self.size[1]
        self.kept = area * pixel * (sum(dims) + _TEMPORARIES * max(dims)) <= memory_budget
        if image.device.type == "cpu":
            image = image.contiguous(memory_format=torch.channels_last)
        if self.kept:
            self._encodings: list[Tensor | _Chain] = [encoder(image) for encoder in encoders]
        else:
            block = max(_LEAST, memory_budget // (pixel * _BLOCK_MAPS * max(dims)))
            self._encodings = [_Chain(chain, image, block) for chain in chains]

    def pooled(self, grid: tuple[int, int], part: Part | None = None) -> Tensor:
        """The encoding, averaged adaptively to a grid, or a part of that.

        Args:
            grid: (gh, gw); smaller or larger than the image.
            part: Rows and columns of the grid, start and stop given; all of it by default.

        Returns:
            `[B, dim, gh, gw]`, or as large as the part.
        """
        rows, cols = part or (slice(0, grid[0]), slice(0, grid[1]))
        return torch.cat([self._pooled(encoding, grid, rows, cols) for encoding in self._encodings], 1)

    def _pooled(self, encoding: Tensor | _Chain, grid: tuple[int, int], rows: slice, cols: slice) -> Tensor:
        if isinstance(encoding, _Chain):
            return pooled_in_blocks(encoding, self.size, grid, (rows, cols), encoding.block)
        if (rows.stop - rows.start, cols.stop - cols.start) == grid:
            return pool(encoding, grid)
        spans = _spans(self.size, grid, rows, cols)
        return pool_part(encoding[:, :, spans[0], spans[1]], self.size, grid, rows, cols)


def pooled_in_blocks(
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    grid: tuple[int, int],
    part: Part | None = None,
    block: int = 1 << 18,
) -> Tensor:
    """Adaptive average pooling of a map that is never there at once.

    Args:
        read: Gives any rectangle `[B, C, rows, cols]` of the map.
        size: Of the map.
        grid: (gh, gw) to pool to; smaller or larger than the map.
        part: Rows and columns of the grid, start and stop given; all of it by default.
        block: Pixels of the map to read at a time, about.

    Returns:
        `[B, C, gh, gw]`, or as large as the part.
    """
    rows, cols = part or (slice(0, grid[0]), slice(0, grid[1]))
    width = min(_WIDEST, size[1])
    steps = max(1, block // width * grid[0] // size[0]), max(1, width * grid[1] // size[1])
    out = None
    for r, c in product(_runs(rows, steps[0]), _runs(cols, steps[1])):
        values = pool_part(read(*_spans(size, grid, r, c)), size, grid, r, c)
        if out is None:
            out = values.new_empty(*values.shape[:2], rows.stop - rows.start, cols.stop - cols.start)
        top, left = r.start - rows.start, c.start - cols.start
        out[:, :, top : top + r.stop - r.start, left : left + c.stop - c.start] = values
    assert out is not None
    return out


def _spans(size: tuple[int, int], grid: tuple[int, int], rows: slice, cols: slice) -> Part:
    return pooled_span(size[0], grid[0], rows), pooled_span(size[1], grid[1], cols)


def enlarged(part: Part, size: tuple[int, int], by: int) -> tuple[Part, Part]:
    """A part of a map with `by` more cells on each side, as far as the map goes; and the part in that."""
    outer = [_grown(span, by, length) for span, length in zip(part, size, strict=True)]
    inner = [slice(s.start - o.start, s.stop - o.start) for s, o in zip(part, outer, strict=True)]
    return (outer[0], outer[1]), (inner[0], inner[1])


_Step = tuple[str, nn.Module | None]


def _steps(module: nn.Module) -> Iterator[_Step]:
    """A module as a list of what is done, one after the other."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _steps(child)
    elif isinstance(module, Block):
        yield from [("keep", None)] if module.residual else []
        yield from [("norm", module.norm1), ("conv", module.conv1)]
        yield from [("norm", module.norm2), ("conv", module.conv2)]
        yield from [("add", None)] if module.residual else []
    elif isinstance(module, nn.Conv2d) and _keeps_size(module):
        yield "conv", module
    elif isinstance(module, Position):
        yield "place", module
    else:
        yield "other", module


def _channels(chain: Sequence[_Step]) -> int:
    convolutions = [module for _, module in chain if isinstance(module, nn.Conv2d)]
    return max(module.out_channels for module in convolutions)


class _Chain:
    """An encoder that computes any rectangle of its output.

    Attributes:
        block: Pixels at a time.
    """

    def __init__(self, steps: Sequence[_Step], image: Tensor, block: int) -> None:
        for kind, module in steps:
            if kind == "other":
                raise UpbenchError(f"an encoder with {type(module).__name__} cannot be computed in parts")
        self.steps = steps
        self.image = image
        self.block = block
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (_, module) in enumerate(steps):
            if isinstance(module, nn.GroupNorm):
                self.norms[index] = self._statistics(index, module)

    def __call__(self, rows: slice, cols: slice) -> Tensor:
        """`[B, dim, rows, cols]`."""
        return self._run(rows, cols, len(self.steps))

    def _statistics(self, index: int, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Factor and summand `[B, dim, 1, 1]` that a norm amounts to, over the whole image.

        Means and variances of blocks are merged in float64 (Chan et al., Updating Formulae and a Pairwise
        Algorithm for Computing Sample Variances, 1979).
        """
        height, width = grid_of(self.image)
        across = min(_WIDEST, width)
        count, mean, square = 0, torch.zeros(()), torch.zeros(())
        for rows, cols in product(
            _runs(slice(0, height), max(1, self.block // across)), _runs(slice(0, width), across)
        ):
            x = self._run(rows, cols, index)
            var, centre = torch.var_mean(x.float(), (2, 3), correction=0)
            var, centre, pixels = var.double(), centre.double(), int(x[0, 0].numel())
            delta, total = centre - mean, count + pixels
            square = square + var * pixels + delta.square() * (count * pixels / total)
            mean, count = mean + delta * (pixels / total), total
        grouped = mean.unflatten(1, (norm.num_groups, -1))
        centre = grouped.mean(2, keepdim=True)
        var = (square / count).unflatten(1, (norm.num_groups, -1)).mean(2, keepdim=True)
        var = var + (grouped - centre).square().mean(2, keepdim=True)
        factor = (var + norm.eps).rsqrt().expand_as(grouped).flatten(1) * norm.weight
        trim()
        summand = norm.bias - centre.expand_as(grouped).flatten(1) * factor
        return factor.float()[..., None, None], summand.float()[..., None, None]

    def _run(self, rows: slice, cols: slice, count: int) -> Tensor:
        """The first `count` steps for a rectangle of their output."""
        size, wanted = grid_of(self.image), (rows, cols)
        reach = [0, 0]
        for _, module in self.steps[:count]:
            if isinstance(module, nn.Conv2d):
                reach = [have + pad for have, pad in zip(reach, _padding(module), strict=True)]
        part = (_grown(rows, reach[0], size[0]), _grown(cols, reach[1], size[1]))
        x, kept = self.image[:, :, part[0], part[1]], None
        for index, (kind, module) in enumerate(self.steps[:count]):
            if kind == "keep":
                kept = (x, part)
            elif kind == "add":
                assert kept is not None
                x = x + _cut(*kept, part)
            elif isinstance(module, nn.Conv2d):
                x, part = _convolve(module, x, part, size)
            elif isinstance(module, nn.GroupNorm):
                factor, summand = self.norms[index]
                x = F.silu(torch.addcmul(summand, x, factor), inplace=True).to(x.dtype)
            else:
                assert isinstance(module, Position)
                x = module(x, size, part)
        return _cut(x, part, wanted)


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a convolution sees as far as it pads, on all sides, and skips nothing."""
    reach = tuple(d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    plain = conv.stride == (1, 1) and conv.groups == 1 and not isinstance(conv.padding, str)
    return plain and reach == tuple(2 * int(p) for p in conv.padding)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    rows, cols = (int(p) for p in conv.padding)
    return rows, cols


def _convolve(conv: nn.Conv2d, x: Tensor, part: Part, size: tuple[int, int]) -> tuple[Tensor, Part]:
    """A convolution of a part of a map: padded where it ends with the map, smaller by that elsewhere."""
    borders: list[int] = []
    left: list[slice] = []
    for span, pad, length in zip(part, _padding(conv), size, strict=True):
        before, after = span.start == 0, span.stop == length
        borders = [pad * before, pad * after, *borders]  # F.pad begins with the last axis
        left.append(slice(span.start + pad * (not before), span.stop - pad * (not after)))
    if any(borders):
        x = F.pad(x, borders, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    return F.conv2d(x, conv.weight, conv.bias, dilation=conv.dilation), (left[0], left[1])


def _grown(span: slice, by: int, length: int) -> slice:
    return slice(max(0, span.start - by), min(length, span.stop + by))


def _cut(x: Tensor, part: Part, wanted: Part) -> Tensor:
    """What is wanted of the part that x is."""
    (top, left), (rows, cols) = (s.start for s in part), wanted
    return x[:, :, rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]


def _runs(span: slice, step: int) -> Iterator[slice]:
    for start in range(span.start, span.stop, step):
        yield slice(start, min(start + step, span.stop))
