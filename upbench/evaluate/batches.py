"""What each step of a training shows: which images, which part of each, and whether they are mirrored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from upbench.contracts.protocol import Recipe
from upbench.contracts.task import Crop

Size = tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """A batch.

    Attributes:
        indices: Of the frames.
        crops: The rectangle of each frame's output that is seen.
        flipped: Whether all of them are mirrored.
    """

    indices: list[int]
    crops: list[Crop]
    flipped: bool = False

    @property
    def pixels(self) -> int:
        """Of all rectangles together."""
        return sum((r.stop - r.start) * (c.stop - c.start) for r, c in self.crops)


def streams(
    count: int,
    output_size: Callable[[int], Size],
    recipe: Recipe,
    seeds: list[int],
    generators: list[torch.Generator],
) -> Iterator[list[Shown]]:
    """Every step's batches: one for each seed, or one for all unless each has an order of its own.

    A frame shows the next cell of its grid each epoch, so that every pixel of the split is seen equally
    often.

    Args:
        count: Of the frames.
        output_size: (H, W) of a frame's output.
        recipe: Batch size, crop, flips and order.
        seeds: One for each training.
        generators: One for each seed; the order is drawn from it.
    """
    if recipe.order != "own":
        shared = torch.Generator().manual_seed(0)
        for shown in _stream(count, output_size, recipe, shared, 0):
            yield [shown]
        return
    each = [_stream(count, output_size, recipe, g, s) for g, s in zip(generators, seeds, strict=True)]
    yield from map(list, zip(*each, strict=True))


def _stream(
    count: int, output_size: Callable[[int], Size], recipe: Recipe, generator: torch.Generator, seed: int
) -> Iterator[Shown]:
    grids: dict[Size, list[Crop]] = {}

    def crop(index: int, cell: int) -> Crop:
        size = output_size(index)
        if size not in grids:
            grids[size] = grid(size, recipe.crop)
        return grids[size][cell % len(grids[size])]

    cells = len(grid(output_size(0), recipe.crop))
    order = torch.randperm(cells, generator=generator).tolist()
    first = torch.randint(cells, (count,), generator=generator).tolist()
    coins = torch.Generator().manual_seed(seed)  # of its own, so that flips move nothing else
    for epoch in range(recipe.epochs):
        stored = recipe.order == "stored"
        images = list(range(count)) if stored else torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, recipe.batch_size):
            chosen = images[start : start + recipe.batch_size]
            flipped = recipe.flip > 0 and float(torch.rand((), generator=coins)) < recipe.flip
            yield Shown(chosen, [crop(i, order[(first[i] + epoch) % cells]) for i in chosen], flipped)


def grid(output_size: Size, fraction: float) -> list[Crop]:
    """Crops of `fraction` of each side that cover the output; they part it exactly where 1 / fraction is an
    integer.

    Crops at random positions would show the borders of an image a hundred times less often than its middle.
    """
    axes = []
    for length in output_size:
        side = max(1, round(fraction * length))
        count = math.ceil(length / side)
        starts = [round(i * (length - side) / max(1, count - 1)) for i in range(count)]
        axes.append([slice(start, start + side) for start in starts])
    return [(rows, cols) for rows in axes[0] for cols in axes[1]]
