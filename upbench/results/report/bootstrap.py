"""Differences between methods with an uncertainty: a paired bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much one method's per-image values differ from another's.

    Attributes:
        mean: Mean over images of the difference.
        low, high: Ends of the 95 % interval (percentiles of the bootstrap).
        images: Images that have a value for both.
    """

    mean: float
    low: float
    high: float
    images: int


def paired_difference(
    scores: Mapping[str, Any],
    base: Mapping[str, Any],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference | None:
    """The difference between two methods on the images that both have.

    The values of an image are averaged over seeds first: the interval is about the choice of images. Images
    are drawn with replacement, the two values of an image together, so that what is hard for both methods
    cancels.

    Args:
        scores: {"names": images, "values": one list per seed}, as records keep it.
        base: The same of the method that is compared with.
        resamples: How many times the images are drawn.
        seed: Of the drawing.

    Returns:
        The difference, or None where fewer than two images have a value for both.
    """
    ours, theirs = _by_image(scores), _by_image(base)
    pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
    differences = np.array([a - b for a, b in pairs if math.isfinite(a - b)])
    count = len(differences)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    with np.errstate(over="ignore", invalid="ignore"):  # values no metric has; the result is then not finite
        means = np.concatenate(
            [
                differences[generator.integers(count, size=(part, count))].mean(axis=1)
                for part in _parts(resamples, count)
            ]
        )
        low, high = np.quantile(means, (0.025, 0.975))
        mean = differences.mean()
    return Difference(float(mean), float(low), float(high), count)


def _by_image(scores: Mapping[str, Any]) -> dict[str, float]:
    values: Sequence[Sequence[float]] = scores["values"]
    if not values:
        return {}
    return {
        name: sum(of_image) / len(of_image) for name, *of_image in zip(scores["names"], *values, strict=True)
    }


def _parts(total: int, count: int, numbers: int = 5_000_000) -> list[int]:
    """`total` in parts of which each draws at most so many numbers."""
    size = max(1, numbers // count)
    return [min(size, total - start) for start in range(0, total, size)]
