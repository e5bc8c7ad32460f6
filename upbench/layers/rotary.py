"""Rotations of pairs of channels, the form that rotary encodings of position take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upbench.ops.window.attention import QueryRows


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns a head by an angle per pair of channels; channel c is paired with c + dim / 2.

    Args:
        x: `[B, dim, H, W]`.
        cos: Of the angles, `[dim / 2, H, W]` with or without a batch.
        sin: Of the angles, too; its negative turns backwards.

    Returns:
        The two halves of the turned head, `[B, dim / 2, H, W]` each, in the dtype of `x`.
    """
    a, b = x.chunk(2, 1)
    return torch.addcmul(a * cos, b, sin, value=-1).to(x.dtype), torch.addcmul(b * cos, a, sin).to(x.dtype)


def rotate_heads(x: Tensor, dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head of `dim` channels turned by the same angles (see `rotate`); `[B, heads * dim, H, W]`."""
    return torch.cat([half for head in x.split(dim, 1) for half in rotate(head, cos, sin)], 1)


def axial_rotation(
    grid: tuple[int, int],
    dim: int,
    device: torch.device,
    base: float = 100.0,
    part: tuple[slice, slice] | None = None,
) -> tuple[Tensor, Tensor]:
    """Axial RoPE of a head (NAF, Chambon et al. 2025): cosine and sine `[dim / 2, H, W]` of its angles.

    Both axes run from -1 to 1, cells at their centres. The first dim / 4 angles are 2 pi y / T_m, the others
    2 pi x / T_m, with the periods T_m = base^(4 m / dim), m = 0 .. dim / 4 - 1.

    Args:
        grid: (H, W).
        dim: Channels of the head, a multiple of 4.
        device: Where to compute.
        base: Of the periods.
        part: Rows and columns of the grid to compute, start and stop given; all of them by default.
    """
    count = dim // 4
    frequencies = 2 * math.pi * base ** (-torch.arange(count, device=device) / count)
    spans = part or (slice(0, grid[0]), slice(0, grid[1]))
    rows, cols = (
        (2 * (torch.arange(span.start, span.stop, device=device) + 0.5) / size - 1).view(-1, 1) * frequencies
        for span, size in zip(spans, grid, strict=True)
    )
    shape = (len(rows), len(cols), count)
    # Channels lie last in memory, as they do in the encoding.
    angles = torch.cat([rows.unsqueeze(1).expand(shape), cols.unsqueeze(0).expand(shape)], 2).permute(2, 0, 1)
    return angles.cos(), angles.sin()


def interleaved(dim: int, heads: int = 1) -> Tensor:
    """`[heads * dim]` the order of channels in which those that `rotate` pairs are neighbours."""
    pairs = torch.arange(dim).view(2, -1).T.flatten()
    return (dim * torch.arange(heads)[:, None] + pairs).flatten()


def turns(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosine and sine `[..., dim / 2, H, W]` as complex numbers `[..., H, W, dim / 2]`."""
    return torch.complex(*(part.movedim(-3, -1).contiguous() for part in (cos, sin)))


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """`rotate` for channels that are `interleaved`: one product of complex numbers.

    Args:
        x: `[B, dim, H, W]`, channels last in memory.
        turn: `[H, W, dim / 2]` from `turns`, with or without a batch.
    """
    numbers = torch.view_as_complex(x.permute(0, 2, 3, 1).unflatten(3, (-1, 2)))
    return torch.view_as_real(numbers * turn).flatten(3).permute(0, 3, 1, 2)


class RotatedRows(QueryRows):
    """Heads that are rotated when they are asked for. Their channels are `interleaved`."""

    def __init__(self, heads: Sequence[Tensor], turn: Callable[[int, int], Tensor]) -> None:
        """Takes what to rotate.

        Args:
            heads: Each `[B, dim, H, W]` float32, channels last in memory.
            turn: Gives `turns` of rows start..stop-1.
        """
        b, dim, height, width = heads[0].shape
        first = heads[0]
        super().__init__((b, len(heads) * dim, height, width), len(heads), first.dtype, first.device)
        self._heads = [head.permute(0, 2, 3, 1).unflatten(3, (-1, 2)) for head in heads]
        self._turn = turn

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """See `QueryRows`."""
        shape = (*out.shape[2:6], -1)  # R, n, T, m
        turn = self._turn(start, stop)
        turn = turn.reshape(*turn.shape[:-3], *shape)
        target = torch.view_as_complex(out.unflatten(6, (-1, 2)))
        for index, head in enumerate(self._heads):
            numbers = torch.view_as_complex(head[:, start:stop])
            torch.mul(numbers.reshape(len(head), *shape), turn, out=target[:, index])
