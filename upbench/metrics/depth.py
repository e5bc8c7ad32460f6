"""Depth: each metric per image, then the mean over the images with valid pixels (as probe3d and JAFAR do)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.metrics._common import max_filter, mean, root_mean_square, same_shape

DEPTH_JUMP = 0.1
"""Relative difference of depth between neighbours above which there is a discontinuity between them."""


DEPTH_BAND_RATIO = 0.01
"""Reach of the band around depth discontinuities, as a share of the image's diagonal."""


MIN_DEPTH = 1e-3
"""Predictions are clamped to at least this many metres before logarithms and ratios are taken."""


def depth_metrics(prediction: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """Errors of one depth map over its valid pixels, p the prediction and t the target.

    Args:
        prediction: `[H, W]` metres; clamped to at least `MIN_DEPTH`.
        target: `[H, W]` metres.
        valid: `[H, W]` bool; pixels whose target is not above 0 are left out as well.

    Returns:
        `delta1`, `delta2`, `delta3`: share of pixels with max(p/t, t/p) < 1.25, 1.25^2, 1.25^3.
        `absrel`: mean |p - t| / t. `rmse`: root mean square of p - t, in metres.
        `log10`: mean |log10 p - log10 t|. `silog`: 100 times the standard deviation of ln p - ln t
        (Eigen et al. 2014, with lambda = 1, as on KITTI).
        `rmse_edge`: RMSE over the valid pixels of `depth_discontinuities`, in metres.
        All nan where no pixel is valid, `rmse_edge` also where there is no discontinuity.

    Raises:
        UpbenchError: Shapes that do not fit, or a prediction that is not finite at a valid pixel.
    """
    valid = _validate_depth(prediction, target, valid)
    edge = depth_discontinuities(target, valid)[valid]
    p = prediction[valid].double().clamp(min=MIN_DEPTH)
    t = target[valid].double()
    ratio = torch.maximum(p / t, t / p)
    log = p.log() - t.log()
    error = p - t
    return {
        **{f"delta{n}": mean((ratio < 1.25**n).double()) for n in (1, 2, 3)},
        "absrel": mean(error.abs() / t),
        "rmse": root_mean_square(error),
        "log10": mean(log.abs()) / math.log(10),
        "silog": 100 * root_mean_square(log - log.mean()),
        "rmse_edge": root_mean_square(error[edge]),
    }


def depth_discontinuities(
    depth: Tensor, valid: Tensor, jump: float = DEPTH_JUMP, ratio: float = DEPTH_BAND_RATIO
) -> Tensor:
    """The band around depth discontinuities.

    Two valid 4-neighbours a, b are on a discontinuity where max(a, b) > (1 + `jump`) min(a, b). The band
    is every pixel within r pixels (Chebyshev) of such a pixel, r = `ratio` times the diagonal, rounded, at
    least 1.

    Args:
        depth: `[H, W]` metres.
        valid: `[H, W]` bool.
        jump: Relative difference.
        ratio: Reach of the band as a share of the diagonal.

    Returns:
        `[H, W]` bool; not restricted to valid pixels.
    """
    same_shape("depth and valid mask", depth, valid)
    at_edge = torch.zeros_like(valid, dtype=torch.bool)
    for axis in (0, 1):
        n = depth.shape[axis] - 1
        a, b = depth.narrow(axis, 0, n), depth.narrow(axis, 1, n)
        both = valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        jumps = (torch.maximum(a, b) > (1 + jump) * torch.minimum(a, b)) & both
        at_edge.narrow(axis, 0, n).logical_or_(jumps)
        at_edge.narrow(axis, 1, n).logical_or_(jumps)
    radius = max(1, round(ratio * math.hypot(*depth.shape)))
    return max_filter(at_edge[None, None].float(), radius)[0, 0] > 0


def mean_over_images(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the images where it is not nan; nan where it is nowhere."""
    names = images[0] if images else ()
    values = {name: torch.tensor([image[name] for image in images], dtype=torch.float64) for name in names}
    return {name: mean(value) for name, value in values.items()}


def _validate_depth(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    same_shape("depth", prediction, target)
    same_shape("depth and valid mask", target, valid)
    if target.ndim != 2:
        raise UpbenchError(f"depth must be [H, W], got {list(target.shape)}")
    valid = valid.bool() & (target > 0) & target.isfinite()
    if not bool(prediction[valid].isfinite().all()):
        raise UpbenchError("predicted depth is not finite")
    return valid
