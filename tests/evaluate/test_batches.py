"""What each step of a training shows, and its learning rate."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probing import SIZE

from upbench.contracts.protocol import Recipe
from upbench.evaluate.batches import Shown, grid, streams
from upbench.evaluate.schedule import learning_rate_factor, training_steps


def shown(
    recipe: Recipe, seeds: list[int], count: int = 6, size=lambda index: (SIZE, SIZE)
) -> list[list[Shown]]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return list(streams(count, size, recipe, seeds, generators))


class TestGrid:
    @given(height=st.integers(1, 60), width=st.integers(1, 60), share=st.floats(0.05, 1))
    def test_covers_every_pixel_with_crops_of_one_size(self, height, width, share):
        seen = torch.zeros(height, width, dtype=torch.long)
        cells = grid((height, width), share)
        for rows, cols in cells:
            seen[rows, cols] += 1
        assert (seen >= 1).all()
        assert len({(r.stop - r.start, c.stop - c.start) for r, c in cells}) == 1
        if share == 1:
            assert cells == [(slice(0, height), slice(0, width))]

    def test_parts_the_output_exactly_where_it_can(self):
        seen = torch.zeros(24, 32, dtype=torch.long)
        for rows, cols in grid((24, 32), 0.25):
            seen[rows, cols] += 1
        assert (seen == 1).all()


class TestStreams:
    def test_every_pixel_of_every_image_is_seen_equally_often(self):
        recipe = Recipe(epochs=32, batch_size=4, crop=0.25)
        seen = torch.zeros(6, SIZE, SIZE, dtype=torch.long)
        batches = shown(recipe, [0])
        assert len(batches) == training_steps(6, recipe) == 64
        for (batch,) in batches:
            assert not batch.flipped
            for image, (rows, cols) in zip(batch.indices, batch.crops, strict=True):
                seen[image, rows, cols] += 1
        assert (seen == 2).all()

    def test_every_epoch_shows_every_image_once_and_its_last_batch_what_is_left(self):
        recipe = Recipe(epochs=4, batch_size=4, crop=1.0)
        batches = [batch for (batch,) in shown(recipe, [5], count=10)]
        assert [len(batch.indices) for batch in batches] == [4, 4, 2] * 4
        epochs = [[i for b in batches[e : e + 3] for i in b.indices] for e in range(0, 12, 3)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4

    def test_each_seed_has_its_own_order_whoever_is_trained_beside_it(self):
        recipe = Recipe(epochs=3, batch_size=2, flip=0.5, crop=0.5)
        together = shown(recipe, [7, 8, 9])
        assert all(len(batches) == 3 for batches in together)
        for place, seed in enumerate((7, 8, 9)):
            assert [batches[place] for batches in together] == [b for (b,) in shown(recipe, [seed])]
        assert together[0][0].indices != together[0][1].indices or together[1][0] != together[1][1]

    def test_a_shared_order_is_the_same_for_all_seeds(self):
        recipe = Recipe(epochs=3, batch_size=2, flip=0.5, order="shared")
        together = shown(recipe, [7, 8, 9])
        assert all(len(batches) == 1 for batches in together)
        assert together == shown(recipe, [1])
        assert together == shown(recipe, [2, 3])

    def test_flips_are_of_whole_batches_and_move_nothing_else(self):
        plain = [b for (b,) in shown(Recipe(epochs=100, batch_size=2), [4])]
        with_flips = [b for (b,) in shown(Recipe(epochs=100, batch_size=2, flip=0.3), [4])]
        assert [(b.indices, b.crops) for b in plain] == [(b.indices, b.crops) for b in with_flips]
        count = sum(b.flipped for b in with_flips)
        assert abs(count - 90) < 4 * math.sqrt(300 * 0.3 * 0.7)  # of 300 coins
        assert all(b.flipped for (b,) in shown(Recipe(epochs=2, flip=1.0), [4]))

    def test_crops_follow_each_frames_size(self):
        sizes = [(24, 24), (24, 40), (16, 16)]
        recipe = Recipe(epochs=16, batch_size=2, crop=0.25)
        seen: Counter[int] = Counter()
        for (batch,) in shown(recipe, [0], count=3, size=lambda index: sizes[index]):
            for index, (rows, cols) in zip(batch.indices, batch.crops, strict=True):
                assert (rows.stop - rows.start, cols.stop - cols.start) == tuple(n // 4 for n in sizes[index])
                seen[index] += 1
        assert seen == {0: 16, 1: 16, 2: 16}

    def test_pixels(self):
        one = Shown([1, 2], [(slice(0, 3), slice(2, 4)), (slice(1, 2), slice(0, 5))])
        assert one.pixels == 11


class TestSchedule:
    def test_learning_rate_rises_and_falls(self):
        recipe = Recipe(warmup=0.1)
        factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
        assert factors[:10] == sorted(factors[:10])
        assert factors[0] > 0
        assert factors[10] == 1
        assert factors[10:] == sorted(factors[10:], reverse=True)
        assert 0 < factors[-1] < 1e-3
        assert learning_rate_factor(99, 100, Recipe(schedule="constant")) == 1
        assert learning_rate_factor(0, 1, Recipe(warmup=0)) == 1

    @pytest.mark.parametrize("schedule", ["cosine", "epoch_cosine", "oscillating", "half_cosine"])
    def test_no_rate_falls_below_the_floor(self, schedule):
        """Those of the papers (`test_plain.py`) have none, but for one."""
        recipe = Recipe(warmup=0.2, lr_floor=0.1, schedule=schedule, epochs=10)
        factors = [learning_rate_factor(step, 50, recipe) for step in range(50)]
        assert factors[0] == pytest.approx(0.1)
        assert min(factors) >= 0.1 - 1e-12
        assert max(factors) <= 1
        assert min(factors[10:]) < 0.16

    def test_an_oscillating_rate_comes_back(self):
        recipe = Recipe(warmup=0, schedule="oscillating", epochs=20)
        factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
        assert factors[20] == factors[60] == 0
        assert factors[40] == factors[80] == 1

    @pytest.mark.parametrize(("count", "batch", "steps"), [(1464, 2, 14_640), (10, 4, 60), (1, 8, 20)])
    def test_steps(self, count, batch, steps):
        assert training_steps(count, Recipe(epochs=20, batch_size=batch)) == steps
