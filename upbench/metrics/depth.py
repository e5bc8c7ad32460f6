"""Depth: each metric per image, then the mean over the images with valid pixels (as probe3d and JAFAR do)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import diagonal_fraction, mean, root, same_shape, spread

DEPTH_JUMP = 0.1
"""Relative difference of depth between neighbours above which there is a discontinuity between them."""


DEPTH_BAND_RATIO = 0.01
"""Reach of the band around depth discontinuities, as a fraction of the image's diagonal."""


MIN_DEPTH = 1e-3
"""Predictions are clamped to at least this many metres before logarithms and ratios are taken."""

DEPTH_METRICS = ("delta1", "delta2", "delta3", "absrel", "rmse", "log10", "silog", "rmse_edge")
"""What `depth_metrics` gives."""

ALIGNED_METRICS = ("rmse_aligned", "delta1_aligned", "delta2_aligned", "delta3_aligned")
"""What `aligned_values` gives."""

Average = Callable[..., Tensor]


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """Errors of one depth map over its valid pixels, p the prediction and t the target.

    Args:
        prediction: `[H, W]` metres; clamped to at least `MIN_DEPTH`.
        target: `[H, W]` metres.
        valid: `[H, W]` bool; pixels whose target is not above 0 are left out as well.

    Returns:
        `delta1`, `delta2`, `delta3`: fraction of pixels with max(p/t, t/p) < 1.25, 1.25^2, 1.25^3.
        `absrel`: mean |p - t| / t. `rmse`: root mean square of p - t, in metres.
        `log10`: mean |log10 p - log10 t|. `silog`: 100 times the standard deviation of ln p - ln t
        (Eigen et al. 2014, with lambda = 1, as on KITTI).
        `rmse_edge`: RMSE over the valid pixels of `depth_discontinuities`, in metres.
        All nan where no pixel is valid, `rmse_edge` also where there is no discontinuity.

    Raises:
        UpbenchError: Shapes that do not fit, or a prediction that is not finite at a valid pixel.
    """
    same_shape("depth", prediction, target)
    same_shape("depth and valid mask", target, valid)
    if target.ndim != 2:
        raise UpbenchError(f"depth must be [H, W], got {list(target.shape)}")
    values, wrong = depth_values(prediction[None], target[None], valid[None].bool())
    if bool(wrong):
        raise UpbenchError("predicted depth is not finite")
    return dict(zip(DEPTH_METRICS, values[0].tolist(), strict=True))


def depth_values(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """`depth_metrics` of each image. Validates nothing and does not wait for the device.

    Args:
        prediction: `[B, H, W]` metres.
        target: `[B, H, W]` metres.
        valid: `[B, H, W]` bool.

    Returns:
        `[B, 8]` float64 in the order of `DEPTH_METRICS`; and `[]` bool, whether a prediction at a valid pixel
        is not finite, so that the values mean nothing.
    """
    valid = valid & (target > 0) & target.isfinite()
    edge = depth_discontinuities(target, valid)
    if target.device.type == "cpu":  # there it is cheaper to go on with what is valid only
        rows, finite = [], []
        maps = (prediction.flatten(1), target.flatten(1), edge.flatten(1))
        for p, t, e, kept in zip(*maps, valid.flatten(1), strict=True):
            index = kept.nonzero().squeeze(1)
            p, t, e = (part.index_select(0, index) for part in (p, t, e))
            finite.append(p.isfinite().all())
            rows.append(_measures(p, t, e, _average_of_all))
        return torch.stack(rows), ~torch.stack(finite).all()
    wrong = (valid & ~prediction.isfinite()).any()
    p, t = (torch.where(valid, part, 1).flatten(1) for part in (prediction, target))
    there = valid.flatten(1)

    def average(values: Tensor, among: Tensor | None = None) -> Tensor:
        counted = there if among is None else there & among
        return torch.where(counted, values, 0).sum(1, keepdim=True) / counted.sum(1, keepdim=True)

    return _measures(p, t, edge.flatten(1), average).squeeze(-2), wrong


def _average_of_all(values: Tensor, among: Tensor | None = None) -> Tensor:
    return (values if among is None else values[among]).mean()


def _measures(p: Tensor, t: Tensor, edge: Tensor, average: Average) -> Tensor:
    """`[..., 8]` the metrics of pixels: p and t in metres, and whether they lie at a discontinuity."""
    p = p.double().clamp(min=MIN_DEPTH)
    t = t.double()
    ratio = torch.maximum(p / t, t / p)
    log = p.log() - t.log()
    error = p - t
    squared = error.square()
    return torch.stack(
        [
            *(average((ratio < 1.25**n).double()) for n in (1, 2, 3)),
            average(error.abs() / t),
            root(average(squared)),
            average(log.abs()) / math.log(10),
            100 * root(average((log - average(log)).square())),
            root(average(squared, edge)),
        ],
        -1,
    )


def aligned_values(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of each image after scale and shift of its prediction were fitted to the target.

    Scale and shift are those of least squares over the image's valid pixels ("scale-invariant" in probe3d);
    what they take below `MIN_DEPTH` is clamped there. Validates nothing and does not wait for the device.

    Args:
        prediction: `[B, H, W]`, in any unit.
        target: `[B, H, W]` metres.
        valid: `[B, H, W]` bool; pixels whose target is not above 0 are left out as well.

    Returns:
        `[B, 4]` float64 in the order of `ALIGNED_METRICS`, in metres and fractions, nan where no pixel is
        valid; and the aligned predictions, `[B, H, W]` float64.
    """
    valid = valid & (target > 0) & target.isfinite()
    p, t = (torch.where(valid, part, 0).double() for part in (prediction, target))
    count = valid.sum((1, 2), keepdim=True)

    def average(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0).sum((1, 2), keepdim=True) / count

    centre, level = average(p), average(t)
    spread_of = average((p - centre).square())
    slope = average((p - centre) * (t - level)) / torch.where(spread_of > 0, spread_of, torch.inf)
    aligned = (slope * (prediction.double() - centre) + level).clamp(min=MIN_DEPTH)
    ratio = torch.maximum(aligned / t, t / aligned)
    values = [root(average((aligned - t).square()))]
    values += [average((ratio < 1.25**n).double()) for n in (1, 2, 3)]
    return torch.stack([value[:, 0, 0] for value in values], 1), aligned


def depth_discontinuities(
    depth: Tensor, valid: Tensor, jump: float = DEPTH_JUMP, ratio: float = DEPTH_BAND_RATIO
) -> Tensor:
    """The band around depth discontinuities.

    Two valid 4-neighbours a, b are on a discontinuity where max(a, b) > (1 + `jump`) min(a, b). The band
    is every pixel within r pixels (Chebyshev) of such a pixel, r = `ratio` times the diagonal, rounded, at
    least 1.

    Args:
        depth: `[H, W]` or `[B, H, W]` metres.
        valid: Same shape, bool.
        jump: Relative difference.
        ratio: Reach of the band as a fraction of the diagonal.

    Returns:
        Bool, of the same shape; not restricted to valid pixels.

    Raises:
        UpbenchError: Shapes that do not fit.
    """
    same_shape("depth and valid mask", depth, valid)
    at_edge = torch.zeros_like(valid, dtype=torch.bool)
    for axis in (-2, -1):
        n = depth.shape[axis] - 1
        a, b = depth.narrow(axis, 0, n), depth.narrow(axis, 1, n)
        both = valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        jumps = (torch.maximum(a, b) > (1 + jump) * torch.minimum(a, b)) & both
        at_edge.narrow(axis, 0, n).logical_or_(jumps)
        at_edge.narrow(axis, 1, n).logical_or_(jumps)
    return spread(at_edge, diagonal_fraction(ratio, *depth.shape[-2:]))


def mean_of_values(values: Tensor, names: Sequence[str] = DEPTH_METRICS) -> dict[str, float]:
    """`mean_over_images` of the values of N images: `[N, M]` as `depth_values` or `aligned_values` gives
    them."""
    return {name: mean(column) for name, column in zip(names, values.unbind(1), strict=True)}


def mean_over_images(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the images where it is not nan; nan where it is nowhere.

    Args: images: The metrics of each image, by name (`depth_metrics`).
    """
    names = images[0] if images else ()
    values = {name: torch.tensor([image[name] for image in images], dtype=torch.float64) for name in names}
    return {name: mean(value) for name, value in values.items()}
