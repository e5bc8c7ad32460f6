"""How many steps a training takes, and the learning rate at each of them."""

from __future__ import annotations

import math

from upbench.contracts.protocol import Recipe


def training_steps(count: int, recipe: Recipe) -> int:
    """How many steps a training on so many images takes."""
    return recipe.epochs * math.ceil(count / recipe.batch_size)


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """The fraction of the peak learning rate at a step: linear warm-up, then `recipe.schedule`.

    Args:
        step: From 0.
        steps: Of the whole training.
        recipe: See `Recipe.schedule`.
    """
    warm, floor = round(recipe.warmup * steps), recipe.lr_floor
    if step < warm:
        return floor + (1 - floor) * (step / warm if floor else (step + 1) / (warm + 1))
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "epoch_cosine":
        epoch = step // max(1, steps // recipe.epochs)
        return floor + (1 - floor) * _half_wave(epoch / recipe.epochs)
    if recipe.schedule == "oscillating":
        return floor + (1 - floor) * _half_wave(step / recipe.epochs)
    done = (step - warm) / max(1, steps - warm)
    if recipe.schedule == "half_cosine":
        return floor + (1 - floor) * math.cos(math.pi * done / 2)
    return floor + (1 - floor) * _half_wave(done)


def _half_wave(x: float) -> float:
    """From 1 at 0 to 0 at 1, and on."""
    return 0.5 * (1 + math.cos(math.pi * x))
