"""Upsample Anything: Gaussians fitted to each image, no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.operator import FunctionOperator, Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import MacCount, Upsampler
from upbench.errors import UpbenchError
from upbench.ops.gaussians import (
    RADIUS,
    RECONSTRUCTION_MACS,
    TERMS,
    GaussianOperator,
    Kernels,
    chunks,
    reconstruction,
)
from upbench.ops.resample import resize_guidance, to_size
from upbench.system.progress import bar

SIGMA_SPACE = 16.0  # initial standard deviations, in output pixels and in colour (0..1)
SIGMA_COLOUR = 0.12
DECAY = 1e-8 ** (1 / 5100)  # of the learning rate per step
BETAS = (0.9, 0.999)
_EPS = 1e-8  # of Adam, and of a kernel's variances
_SMALLEST = 1e-6  # standard deviation


class UpsampleAnything(Upsampler):
    """Upsample Anything (see `paper`): test-time optimisation of a joint bilateral kernel per cell.

    Each low-resolution cell has an anisotropic Gaussian in space (two standard deviations, an angle) and one
    in colour. They are fitted, image by image, so that the image is rebuilt from a small version of itself,
    and then average the features in the place of the colours. The features have no say in the weights: the
    method is linear in them.

    As in the official code: a pixel sees the cells within R cells of the one it lies in, R = ceil(2 sigma)
    with sigma in *output pixels*, so that R is 8 nearly always; offsets that leave the grid count its border
    cells again; the schedule of the learning rate is made for 5100 steps, of which 51 are taken. It states
    no licence. Differences: the fit is in float32 on every device (half precision with scaled gradients
    there, on a GPU), and images of any size are taken. The kernels live on a grid of whole pixels per cell:
    for other output sizes the image is brought to the next multiple of the feature size, the same for both
    axes, and the result is resized to the output (`upbench.ops.resample.to_size`).

    The fit is chaotic: a change of the image by one bit moves single pixels of the output by a few tenths of
    the features' scale after 51 steps (the mean hardly moves), and so does another order of summation.
    """

    name = "upsample_anything"
    title = "Upsample Anything"
    paper = (
        "Seo et al., Upsample Anything: A Simple and Hard to Beat Baseline for Feature Upsampling, "
        "arXiv 2511.16301"
    )
    year = 2025
    license = "none stated"
    linear = True
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)
    precise_image = True  # what is fitted hangs on every bit of it
    preset_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"contract": {"steps": 5}}

    def __init__(self, steps: int = 51, lr: float = 0.1) -> None:
        """Sets the budget of the fit.

        Args:
            steps: Steps of Adam per image; 0 leaves isotropic Gaussians as wide as a patch.
            lr: Learning rate of the first step.
        """
        super().__init__()
        if steps < 0:
            raise UpbenchError(f"upsample_anything: steps must be at least 0, got {steps}")
        if lr <= 0:
            raise UpbenchError(f"upsample_anything: lr must be above 0, got {lr}")
        self.steps = int(steps)
        self.lr = float(lr)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`; the image is RGB in 0..1."""
        native = self._native(image, features, output_size)
        return to_size(native(features.unsqueeze(1)), output_size)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Operator:
        """See `Upsampler.operator`; the fit is made once, here."""
        native = self._native(image, features, output_size)
        if native.output_size == tuple(output_size):
            return native
        return FunctionOperator(
            lambda values: to_size(native(values.unsqueeze(1)), output_size),
            output_size,
            held=native.nbytes(),
        )

    def macs(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> MacCount:
        """See `Upsampler.macs`: products of every pixel with the cells that it sees, steps of the fit
        included (each forward and backward, in closed form)."""
        h, w, scale = _grid(features, output_size)
        image = resize_guidance(image.float(), (scale * h, scale * w))
        pairs = sum(chunk.cells.numel() * scale**2 for chunk in chunks(_initial(image[0], (h, w))[1]))
        batch, channels = (int(n) for n in features.shape[:2])
        counts = {
            "fit": batch * pairs * self.steps * RECONSTRUCTION_MACS,
            "weights": batch * pairs * TERMS,
            "average": batch * pairs * channels,
        }
        if (scale * h, scale * w) != tuple(output_size):
            counts["resize"] = batch * channels * output_size[0] * output_size[1] * 4
        note = f"MACs, time and memory include {self.steps} steps of optimisation per image"
        return MacCount(sum(counts.values()), counts, note=note)

    @torch.no_grad()
    def _native(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> GaussianOperator:
        """The fitted operator to the next multiple of the feature size."""
        h, w, scale = _grid(features, output_size)
        image = image.to(torch.promote_types(image.dtype, torch.float32))
        image = resize_guidance(image, (scale * h, scale * w))
        fitted = []
        with bar("fitting kernels", total=len(image) * self.steps) as progress:
            for one in image:
                fitted.append(fit(one, (h, w), self.steps, self.lr, progress.advance).kernels)
        return GaussianOperator(fitted)


def _grid(features: Tensor, output_size: tuple[int, int]) -> tuple[int, int, int]:
    """h, w and the whole number of pixels per cell with which neither axis is smaller than the output."""
    h, w = (int(n) for n in features.shape[-2:])
    return h, w, max(-(-output_size[0] // h), -(-output_size[1] // w))


@dataclass(frozen=True)
class Fit:
    """What became of an image's optimisation.

    Attributes:
        maps: `[4, h, w]` log sigma_x, log sigma_y, raw angle and log sigma_colour; see `kernels_of`.
        kernels: The same as kernels.
        losses: `[steps]` mean absolute error of the rebuilt image, before each step.
    """

    maps: Tensor
    kernels: Kernels
    losses: Tensor


@torch.no_grad()
def fit(
    image: Tensor,
    grid: tuple[int, int],
    steps: int = 51,
    lr: float = 0.1,
    advance: Callable[[], None] = lambda: None,
) -> Fit:
    """Fits the kernels of one image: Adam on the mean absolute error of the image, rebuilt from itself.

    Args:
        image: `[3, s h, s w]` RGB in 0..1, float32 or float64.
        grid: (h, w).
        steps: Of Adam.
        lr: Of the first step.
        advance: Called after each step.
    """
    source = F.interpolate(image[None], grid, mode="bicubic", align_corners=False)[0]
    maps, kernels = _initial(image, grid)
    mean, square = torch.zeros_like(maps), torch.zeros_like(maps)
    parts = tuple(chunks(kernels)) if steps else ()
    losses = []
    for step in range(steps):
        loss, gradient = reconstruction(kernels, source, parts)
        gradient = pull_back(maps, gradient)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        unbiased = (square / (1 - BETAS[1] ** (step + 1))).sqrt_() + _EPS
        maps = maps - lr * DECAY**step / (1 - BETAS[0] ** (step + 1)) * mean / unbiased
        kernels = kernels_of(image, maps, kernels.guide)
        losses.append(loss)
        advance()
    return Fit(maps, kernels, torch.stack(losses) if losses else image.new_zeros(0))


def _initial(image: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Kernels]:
    """Maps before the first step: the same isotropic Gaussian everywhere."""
    maps = image.new_tensor([math.log(SIGMA_SPACE), math.log(SIGMA_SPACE), 0.0, math.log(SIGMA_COLOUR)])
    maps = maps.view(4, 1, 1).repeat(1, *grid)
    return maps, kernels_of(image, maps)


def kernels_of(image: Tensor, maps: Tensor, guide: Tensor | None = None) -> Kernels:
    """The Gaussians that raw parameters stand for.

    Args:
        image: `[3, s h, s w]`.
        maps: `[4, h, w]`. Standard deviations are the exponential of the first two (output pixels) and the
            last (colour); the angle is pi tanh of the third.
        guide: `[3, h, w]` colours of the cells; the image resized bilinearly by default.
    """
    grid = (int(maps.shape[1]), int(maps.shape[2]))
    if guide is None:
        guide = F.interpolate(image[None], grid, mode="bilinear", align_corners=False)[0]
    along, across, colour = (_inverse(maps[i])[0] for i in (0, 1, 3))
    cos, sin = _direction(maps[2])
    precision = [
        cos * cos * along + sin * sin * across,
        2 * cos * sin * (along - across),
        sin * sin * along + cos * cos * across,
        colour,
    ]
    widest = maps[:2].amax(0).exp()
    reach = None
    if bool((2 * widest <= RADIUS - 1).any()):
        size = (int(image.shape[1]), int(image.shape[2]))
        dense = F.interpolate(widest[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        reach = (2 * dense).ceil().clamp_(1, RADIUS).long()
    return Kernels(image, guide, torch.stack(precision), reach)


def pull_back(maps: Tensor, gradient: Tensor) -> Tensor:
    """`[4, h, w]` gradient with respect to `maps`, from that with respect to `Kernels.precision`.

    In closed form, so that it needs no graph and works in inference mode. The reach has no gradient.
    """
    (along, d_along), (across, d_across), (_, d_colour) = (_inverse(maps[i]) for i in (0, 1, 3))
    cos, sin = _direction(maps[2])
    a, b, c, g = gradient
    turn = (c - a) * 2 * cos * sin + b * 2 * (cos * cos - sin * sin)
    return torch.stack(
        [
            (a * cos * cos + b * 2 * cos * sin + c * sin * sin) * d_along,
            (a * sin * sin - b * 2 * cos * sin + c * cos * cos) * d_across,
            turn * (along - across) * math.pi * (1 - maps[2].tanh().square()),
            g * d_colour,
        ]
    )


def _inverse(log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """1 / (2 sigma^2 + eps), and its derivative with respect to log sigma."""
    sigma = log_sigma.exp()
    variance = 2 * sigma.clamp(min=_SMALLEST).square()
    inverse = 1 / (variance + _EPS)
    return inverse, torch.where(sigma >= _SMALLEST, -2 * variance * inverse.square(), 0.0)


def _direction(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle."""
    angle = math.pi * raw.tanh()
    return angle.cos(), angle.sin()
