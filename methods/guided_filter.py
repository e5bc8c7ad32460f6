"""Guided filter: features as a locally affine function of colour, fitted at low resolution, applied at
high."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import interpolation_operator, resize_guidance
from upbench.ops.separable import SeparableOperator

_CHUNK = 32


class GuidedFilter(Upsampler):
    """Guided filter with colour guidance (He et al. 2010), subsampled as in the fast guided filter (2015).

    In each window of (2 radius + 1)^2 low-resolution cells a feature channel p is fitted as an affine
    function of the guidance J (the image averaged over cells),

        a = (Cov(J) + eps 1)^-1 Cov(J, p),    b = mean(p) - a . mean(J)        (eqs. 14, 15 of the 2010
        paper),

    with the full 3x3 covariance; windows are cut at the border. a and b are averaged over all windows that
    contain a cell, interpolated bilinearly to the output, and applied to the guidance I there: q = a . I + b.

    Linear in the features: a and b are, and the guidance does not depend on them.
    """

    name = "guided_filter"
    title = "Guided filter"
    paper = "He et al., Guided Image Filtering, ECCV 2010; He and Sun, Fast Guided Filter, arXiv 1505.00996"
    year = 2010
    linear = True
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, radius: int = 1, eps: float = 1e-4) -> None:
        """Fixes the window and the ridge.

        The defaults were the best of radius 1, 2, 4 and eps 1e-4 .. 0.1 on eight training photos of BSDS500:
        cosine similarity of DINOv2 ViT-S/14 features, upsampled 2x and 4x, to those of the full-size photo.

        Args:
            radius: Cells on each side of a window's centre; at least 1.
            eps: Ridge on the covariance of RGB in 0..1: edges with a variance well above it are transferred.
        """
        super().__init__()
        if radius < 1 or eps <= 0:
            raise ValueError("radius must be at least 1 and eps above 0")
        self.radius = int(radius)
        self.eps = float(eps)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`; the image is RGB in 0..1. Fits in float64, applies in float32."""
        operator = self.operator(image, features, output_size)
        out = features.new_empty(*features.shape[:2], *output_size)
        for first in range(0, features.shape[1], _CHUNK):
            some = features[:, None, first : first + _CHUNK].float()
            out[:, first : first + _CHUNK] = operator(some)
        return out

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> GuidedOperator:
        """What of the filter the image decides (see `Upsampler.operator`)."""
        image = image.float()
        high = resize_guidance(image, output_size)
        # The moments of a covariance nearly cancel, and eps is small.
        low = resize_guidance(image, (int(features.shape[-2]), int(features.shape[-1]))).double()
        fit = ColourFit(low, self.radius, self.eps)
        return GuidedOperator(fit, high, interpolation_operator(features, output_size, "bilinear"))


class ColourFit:
    """The least-squares fit of low-resolution values as affine functions of colour, window by window.

    Attributes:
        low: `[B, 3, h, w]` float64 colours of the cells.
        mean: Their means over the windows.
        inverse: `[B, h, w, 3, 3]`, inverse of Cov(J) + eps in each window.
    """

    def __init__(self, low: Tensor, radius: int, eps: float) -> None:
        """Args: low: See the class. radius, eps: As those of the method."""
        self.radius = radius
        self.low = low
        self.mean = self._box(low)
        b, _, h, w = low.shape
        second = self._box((low[:, :, None] * low[:, None]).reshape(b, 9, h, w))
        covariance = second.reshape(b, 3, 3, h, w) - self.mean[:, :, None] * self.mean[:, None]
        covariance = covariance.permute(0, 3, 4, 1, 2)
        self.inverse: Tensor = torch.linalg.inv(covariance + eps * torch.eye(3).to(low))

    def __call__(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The averaged a `[B, 3, K, h, w]` and b `[B, K, h, w]` of values `[B, K, h, w]`, in their dtype."""
        p = values.to(self.low.dtype)
        batch, k, h, w = p.shape
        p_mean = self._box(p)
        product = self._box((self.low[:, :, None] * p[:, None]).reshape(batch, 3 * k, h, w))
        covariance = product.reshape(batch, 3, k, h, w) - self.mean[:, :, None] * p_mean[:, None]
        a = torch.einsum("bhwij,bjkhw->bikhw", self.inverse, covariance)
        b = p_mean - torch.einsum("bikhw,bihw->bkhw", a, self.mean)
        a, b = self._box(a.reshape(batch, 3 * k, h, w)).reshape(a.shape), self._box(b)
        return a.to(values.dtype), b.to(values.dtype)

    def _box(self, x: Tensor) -> Tensor:
        """Mean over the window around each cell, over the cells that exist."""
        size = 2 * self.radius + 1
        return F.avg_pool2d(x, size, stride=1, padding=self.radius, count_include_pad=False)

    def moved(self, device: torch.device) -> ColourFit:
        """The same on another device."""
        other = copy(self)
        other.low, other.mean, other.inverse = (x.to(device) for x in (self.low, self.mean, self.inverse))
        return other

    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.numel() * x.element_size() for x in (self.low, self.mean, self.inverse))


class GuidedOperator(Operator):
    """q = a . I + b, with a and b interpolated to the output's pixels.

    Attributes:
        fit: Values to a and b.
        high: `[B, 3, H, W]` float32, I at the output's pixels.
        interpolation: Of a and b.
    """

    def __init__(self, fit: ColourFit, high: Tensor, interpolation: SeparableOperator) -> None:
        """Args: see the class."""
        self.fit = fit
        self.high = high
        self.interpolation = interpolation
        self.output_size = interpolation.output_size

    def __call__(self, values: Tensor) -> Tensor:
        """See `Operator`."""
        a, b = self.fit(values.sum(1))
        out: Tensor = self.interpolation(b[:, None])
        for colour in range(3):
            out = torch.addcmul(out, self.interpolation(a[:, None, colour]), self.high[:, colour, None])
        return out

    def crop(self, rows: slice, cols: slice) -> GuidedOperator:
        """See `Operator`; the fit stays whole."""
        return GuidedOperator(self.fit, self.high[:, :, rows, cols], self.interpolation.crop(rows, cols))

    def to(self, *args: Any, **kwargs: Any) -> GuidedOperator:
        """See `Operator`; it moves, and keeps its precision: slopes along faint edges are large."""
        device = self.high.new_empty(0).to(*args, **kwargs).device
        moved = self.interpolation.to(device)
        return GuidedOperator(self.fit.moved(device), self.high.to(device), moved)

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.fit.nbytes() + self.interpolation.nbytes() + self.high.numel() * self.high.element_size()
