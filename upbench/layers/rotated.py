"""Guidance encodings whose heads are rotated by position, a strip of rows at a time on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from upbench.layers.convolutions import pool
from upbench.layers.rotary import RotatedRows, interleaved, turned, turns
from upbench.layers.strips import stream

Size = tuple[int, int]
Rotation = Callable[[Size, tuple[slice, slice] | None], tuple[Tensor, Tensor]]


def rotated_in_strips(
    branches: Iterable[nn.Module],
    image: Tensor,
    dim: int,
    output_size: Size,
    feature_size: Size,
    rotation: Rotation,
) -> tuple[RotatedRows, Tensor]:
    """Queries and keys that never exist at full size beside their encodings, where `can_stream` allows it.

    Encoders work in strips; queries are rotated strip by strip, when attention needs them. The channels of
    both are `interleaved`, which makes no difference to their products.

    Args:
        branches: `Branch`es, whose outputs are the heads of queries and keys.
        image: `[B, 3, h_img, w_img]`, normalised.
        dim: Channels of a head.
        output_size: (H, W) of the queries.
        feature_size: (h, w) of the keys.
        rotation: Cosine and sine of a head's angles (`rotate`) on a grid, or on rows and columns of it.

    Returns:
        Queries `[B, heads * dim, H, W]` and keys `[B, heads * dim, h, w]`.
    """
    image = image.contiguous(memory_format=torch.channels_last)
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for branch in branches:
        stem, *blocks = branch.children()
        assert isinstance(stem, nn.Conv2d)
        encoding = stream(stem, blocks, image, interleaved(dim, stem.out_channels // dim))
        for heads, grid in ((queries, output_size), (keys, feature_size)):
            heads.extend(pool(encoding, grid).split(dim, 1))  # at once: the encoding need not be held
    here = turns(*rotation(feature_size, None))
    across = slice(0, output_size[1])
    return (
        RotatedRows(queries, lambda first, last: turns(*rotation(output_size, (slice(first, last), across)))),
        torch.cat([turned(head, here) for head in keys], 1),
    )
