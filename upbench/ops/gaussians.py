"""Averages of low-resolution cells with an anisotropic Gaussian of each cell's own, in space and in colour.

Output pixels lie in s x s blocks, one per cell. All pixels of a block see the same cells, those within
`RADIUS` cells of the block's own, so a block's logits are one matrix product: with the position (x, y) and
the colour I of a pixel relative to its block's centre and mean colour, and (u, v) and G those of a cell,

    log w = -(A (x-u)^2 + B (x-u)(y-v) + C (y-v)^2 + g |I-G|^2)

is the product of (x^2, xy, y^2, x, y, 1, I, |I|^2) with ten numbers of the cell. A block at the border sees
fewer cells than one in the middle; blocks of about equal count are computed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError

RADIUS = 8
"""Cells on each side of a block's own that its pixels may see; a disc."""
TERMS = 10
"""Multiply-adds of one weight: of one pixel and one cell that it sees."""
RECONSTRUCTION_MACS = 2 * TERMS + 2 * 4
"""The same of a call of `reconstruction`, gradient included."""
_NEVER = -1e30  # log multiplicity of a cell that is not seen; finite, since it is multiplied by zeros
_BUDGET = {"cpu": 2**20}  # bytes of weights at a time; on a CPU about what its caches serve well
_BUDGET_ELSEWHERE = 256 * 2**20


@dataclass(frozen=True)
class Kernels:
    """The Gaussians of one image's cells.

    Attributes:
        image: `[3, s h, s w]` guidance at output size, float.
        guide: `[3, h, w]` colours of the cells.
        precision: `[4, h, w]` A, B, C in 1 / pixel^2 and g, see the head of this module; A goes with
            columns, C with rows.
        reach: `[s h, s w]` int64, how many cells away (1 .. `RADIUS`) a pixel sees; None for `RADIUS`
            everywhere.
    """

    image: Tensor
    guide: Tensor
    precision: Tensor
    reach: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return int(self.guide.shape[1]), int(self.guide.shape[2])

    @property
    def scale(self) -> int:
        """s, pixels per cell along each axis."""
        return int(self.image.shape[1]) // int(self.guide.shape[1])

    def to(self, device: torch.device) -> Kernels:
        """The same kernels on another device."""
        reach = None if self.reach is None else self.reach.to(device)
        return Kernels(self.image.to(device), self.guide.to(device), self.precision.to(device), reach)

    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = (self.image, self.guide, self.precision, self.reach)
        return sum(part.nbytes for part in parts if part is not None)


class GaussianOperator(Operator):
    """The averages of B images, as an operator (see `Operator`).

    It keeps the kernels, not the weights: these are hundreds of times larger, and computing them anew costs
    about as much as reading them.
    """

    def __init__(self, kernels: Sequence[Kernels], window: tuple[slice, slice] | None = None) -> None:
        """Args: kernels: Of each image, on the same grid; window: Rows and columns of the output."""
        first = kernels[0]
        full = (int(first.image.shape[1]), int(first.image.shape[2]))
        self.kernels = tuple(kernels)
        self.window = window or (slice(0, full[0]), slice(0, full[1]))
        self.output_size = tuple(part.stop - part.start for part in self.window)  # type: ignore[assignment]

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, 1, K, h, w]` to `[B, K, H, W]`, in the dtype of `values`; computed in float32 at least."""
        expected = (len(self.kernels), 1, *self.kernels[0].grid)
        if values.ndim != 5 or (*values.shape[:2], *values.shape[3:]) != expected:
            raise UpbenchError(
                f"operator takes [{expected[0]}, 1, K, {expected[2]}, {expected[3]}], "
                f"got {list(values.shape)}"
            )
        parts = [self._image(k, v[0]) for k, v in zip(self.kernels, values, strict=True)]
        return parts[0][None] if len(parts) == 1 else torch.stack(parts)

    def _image(self, kernels: Kernels, values: Tensor) -> Tensor:
        """`[K, h, w]` to `[K, H, W]`."""
        s, dtype = kernels.scale, torch.promote_types(values.dtype, kernels.image.dtype)
        rows, cols = (range(part.start // s, -(-part.stop // s)) for part in self.window)
        dense = values.new_empty(len(values), len(rows), s, len(cols), s)
        cells = values.to(dtype).flatten(1).T
        for chunk in chunks(kernels, rows, cols):
            weights = torch.softmax(chunk.logits(kernels), 1)
            seen = cells.index_select(0, chunk.cells.flatten()).unflatten(0, chunk.cells.shape)
            part = torch.bmm(seen.transpose(1, 2), weights).unflatten(2, (s, s))
            dense[:, chunk.rows - rows.start, :, chunk.cols - cols.start] = part.to(values.dtype)
        top, left = (part.start % s for part in self.window)
        height, width = self.output_size
        whole = dense.view(len(values), len(rows) * s, len(cols) * s)
        return whole[:, top : top + height, left : left + width]

    def crop(self, rows: slice, cols: slice) -> GaussianOperator:
        """See `Operator`; only blocks that the rectangle touches are computed."""
        bounds = []
        for part, cut, size in zip(self.window, (rows, cols), self.output_size, strict=True):
            first, last, _ = cut.indices(size)
            bounds.append(slice(part.start + first, part.start + last))
        return GaussianOperator(self.kernels, (bounds[0], bounds[1]))

    def to(self, *args: Any, **kwargs: Any) -> GaussianOperator:
        """The operator on another device. Kernels keep their dtype: they are few, and sensitive to it."""
        device = self.kernels[0].image.new_empty(0).to(*args, **kwargs).device
        return GaussianOperator([k.to(device) for k in self.kernels], self.window)

    def nbytes(self) -> int:
        """Bytes of the kernels."""
        return sum(k.nbytes() for k in self.kernels)


@dataclass(frozen=True)
class Chunk:
    """Blocks that are computed together: b blocks of n pixels that see at most K cells.

    Attributes:
        rows, cols: `[b]` where the blocks lie on the grid.
        cells: `[b, K]` flat index of each cell that is seen; fillers have a multiplicity of 0.
        offset: `[2, b, K]` u and v of each cell relative to its block's centre, in pixels.
        guide: `[3, b, K]` G of each cell, relative to the mean colour of its block.
        often: `[b, K, RADIUS]` log of how many offsets within each reach lead to the cell.
        pixels: `[b, 10, n]` what a pixel brings into the product; see the head of this module.
        colour: `[b, 3, n]` of each pixel, as it is.
        block: `[b, n]` flat index of each pixel in the image.
    """

    rows: Tensor
    cols: Tensor
    cells: Tensor
    offset: Tensor
    guide: Tensor
    often: Tensor
    pixels: Tensor
    colour: Tensor
    block: Tensor

    def logits(self, kernels: Kernels) -> Tensor:
        """`[b, K, n]` log weights, before the softmax over K.

        Args: kernels: Those that the chunk was made for, or others for the same image.
        """
        a, b, c, g = kernels.precision.flatten(1)[:, self.cells]
        u, v = self.offset
        constant = -(a * u * u + b * u * v + c * v * v) - g * self.guide.square().sum(0)
        reach = None if kernels.reach is None else kernels.reach.flatten()[self.block]
        if reach is None:
            constant = constant + self.often[..., -1]
        slopes = [2 * a * u + b * v, 2 * c * v + b * u]
        colours = [*(2 * g * self.guide), -g]
        terms = torch.stack([-a, -b, -c, *slopes, constant, *colours], 2)
        if reach is None:
            return torch.bmm(terms, self.pixels)
        chosen = F.one_hot(reach - 1, RADIUS).to(terms.dtype)
        return torch.bmm(
            torch.cat([terms, self.often], 2), torch.cat([self.pixels, chosen.transpose(1, 2)], 1)
        )

    def pull_back(self, gradient: Tensor) -> Tensor:
        """`[4, b, K]` gradient with respect to A, B, C and g of each cell that is seen.

        Args: gradient: `[b, K, n]` with respect to `logits`.
        """
        xx, xy, yy, x, y, one, *colours, square = torch.bmm(gradient, self.pixels.mT).unbind(2)
        u, v = self.offset
        norm = self.guide.square().sum(0)
        towards = sum(2 * part * of for part, of in zip(self.guide, colours, strict=True))
        return torch.stack(
            [
                2 * u * x - xx - u * u * one,
                v * x + u * y - xy - u * v * one,
                2 * v * y - yy - v * v * one,
                towards - square - norm * one,
            ]
        )


def chunks(kernels: Kernels, rows: range | None = None, cols: range | None = None) -> Iterator[Chunk]:
    """The blocks of an image, or of a rectangle of it, a memory budget at a time.

    Args:
        kernels: Image, guide and grid; the precision is not looked at.
        rows: Of blocks; all by default.
        cols: Of blocks; all by default.
    """
    (h, w), s, device = kernels.grid, kernels.scale, kernels.image.device
    rows, cols = rows or range(h), cols or range(w)
    places = _product(*(torch.arange(part.start, part.stop, device=device) for part in (rows, cols)))
    step = _disc(device)
    near = places[:, None] + step  # [N, D, 2]
    inside = ((near >= 0) & (near < torch.tensor((h, w), device=device))).all(2)
    counts = inside.sum(1)
    order = counts.argsort(stable=True)
    budget = _BUDGET.get(device.type, _BUDGET_ELSEWHERE) // (s * s * kernels.image.element_size())
    first, sizes = 0, counts[order].tolist()
    while first < len(sizes):
        last = first + 1
        while last < len(sizes) and (last + 1 - first) * sizes[last] <= budget:
            last += 1
        part = order[first:last]
        yield _chunk(kernels, places[part], inside[part], sizes[last - 1])
        first = last


def _chunk(kernels: Kernels, places: Tensor, inside: Tensor, most: int) -> Chunk:
    """Blocks at `places` `[b, 2]`, whose cells are those of the disc that lie `inside` `[b, D]`."""
    (h, w), s = kernels.grid, kernels.scale
    dtype, device = kernels.image.dtype, kernels.image.device
    step = _disc(device)
    slots = (~inside).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]  # those inside come first
    often = _multiplicity(places, step, (h, w)).gather(1, slots[..., None].expand(-1, -1, RADIUS))
    near = (places[:, None] + step[slots]).clamp_(min=0)
    near = torch.minimum(near, torch.tensor((h - 1, w - 1), device=device))
    cells = near[..., 0] * w + near[..., 1]
    away = ((near - places[:, None]) * s).to(dtype)
    within = torch.arange(s, device=device)
    y, x = (places[:, i, None] * s + within for i in (0, 1))
    block = (y[:, :, None] * (w * s) + x[:, None, :]).flatten(1)
    colour = kernels.image.flatten(1)[:, block]  # [3, b, n]
    mean = colour.mean(2, keepdim=True)
    relative = colour - mean
    centred = within.to(dtype) - (s - 1) / 2
    v, u = (t.flatten().expand(len(places), -1) for t in torch.meshgrid(centred, centred, indexing="ij"))
    pixels = [u * u, u * v, v * v, u, v, torch.ones_like(u), *relative, relative.square().sum(0)]
    return Chunk(
        rows=places[:, 0],
        cols=places[:, 1],
        cells=cells,
        offset=torch.stack([away[..., 1], away[..., 0]]),
        guide=kernels.guide.flatten(1)[:, cells] - mean,
        often=often.to(dtype),
        pixels=torch.stack(pixels, 1),
        colour=colour.transpose(0, 1).contiguous(),
        block=block,
    )


def _product(rows: Tensor, cols: Tensor) -> Tensor:
    """`[n * m, 2]` every pair."""
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), 2).flatten(0, 1)


def _disc(device: torch.device) -> Tensor:
    """`[D, 2]` offsets (rows, columns) within `RADIUS` cells."""
    axis = torch.arange(-RADIUS, RADIUS + 1, device=device)
    square = _product(axis, axis)
    return square[square.square().sum(1) <= RADIUS**2]


def _multiplicity(places: Tensor, step: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[b, D, RADIUS]` log of how many offsets of at most 1, 2, .. cells lead to the cell at each offset.

    Offsets that leave the grid lead to the nearest cell on its border, which is nearer than they are and so
    always in the disc itself.
    """
    far = torch.tensor((grid[0] - 1, grid[1] - 1), device=step.device)
    arrives = torch.minimum((places[:, None] + step).clamp_(min=0), far) - places[:, None]
    width = 2 * RADIUS + 1
    table = step.new_zeros(width * width)
    table[(step[:, 0] + RADIUS) * width + step[:, 1] + RADIUS] = torch.arange(len(step), device=step.device)
    slot = table[(arrives[..., 0] + RADIUS) * width + arrives[..., 1] + RADIUS]  # [b, D]
    from_reach = step.square().sum(1).double().sqrt().ceil().long().clamp_(min=1) - 1
    count = torch.zeros(len(places), len(step) * RADIUS, device=step.device)
    count.scatter_add_(1, slot * RADIUS + from_reach, torch.ones_like(slot, dtype=count.dtype))
    return count.view(len(places), len(step), RADIUS).cumsum(2).log().clamp_(min=_NEVER)


def reconstruction(kernels: Kernels, source: Tensor, parts: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
    """How well an image is rebuilt from few colours, and how to do better.

    Args:
        kernels: With `image` as what is to be rebuilt.
        source: `[3, h, w]` what is averaged.
        parts: `chunks(kernels)`, kept for many calls.

    Returns:
        The mean absolute error, and its gradient with respect to `kernels.precision` `[4, h, w]`. The
        gradient is that of each block's softmax in closed form, so that weights are never kept.
    """
    cells = torch.cat([source, torch.ones_like(source[:1])]).flatten(1).T
    loss = source.new_zeros(())
    gradient = torch.zeros_like(kernels.precision.flatten(1))
    for chunk in parts:
        weights = chunk.logits(kernels)
        weights.sub_(weights.amax(1, keepdim=True)).exp_()
        seen = cells.index_select(0, chunk.cells.flatten()).unflatten(0, chunk.cells.shape)
        sums = torch.bmm(seen.mT, weights)
        total = sums[:, 3:]
        rebuilt = sums[:, :3] / total
        error = rebuilt - chunk.colour
        loss += error.abs().sum()
        slope = error.sign_().div_(total)
        # of a softmax: w_k (slope . s_k - slope . rebuilt)
        inner = torch.cat([slope, -(slope * rebuilt).sum(1, keepdim=True)], 1)
        gradient.index_add_(
            1, chunk.cells.flatten(), chunk.pull_back(weights.mul_(torch.bmm(seen, inner))).flatten(1)
        )
    count = kernels.image.numel()
    return loss / count, gradient.view_as(kernels.precision) / count
