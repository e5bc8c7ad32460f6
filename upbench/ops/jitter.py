"""Geometric jitter of images as pairs of matrices, one per axis: what a view sees of what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jitter:
    """V views of an image of H x W pixels: padded by reflection, zoomed in, cropped to H x W, mirrored.

    Attributes:
        size: (H, W).
        pad: Pixels of padding on each side.
        zoom: `[V]` at least 1.
        origin: `[V, 2]` first row and column of the crop, in pixels of the padded and zoomed image.
        mirrored: `[V]` bool, left and right exchanged.
    """

    size: tuple[int, int]
    pad: int
    zoom: Tensor
    origin: Tensor
    mirrored: Tensor

    @classmethod
    def sample(
        cls,
        views: int,
        size: tuple[int, int],
        *,
        pad: int,
        max_zoom: float,
        generator: torch.Generator,
    ) -> Jitter:
        """Random views; half are zoomed, half are mirrored. The first one is the image as it is.

        Args:
            views: V.
            size: (H, W).
            pad: Pixels; less than each side.
            max_zoom: Largest zoom.
            generator: On the CPU.
        """
        draw = torch.rand(5, views, generator=generator)
        zoom = torch.where(draw[0] > 0.5, 1 + draw[1] * (max_zoom - 1), 1.0)
        room = torch.stack([((n + 2 * pad) * zoom).floor() - n for n in size], 1)
        origin = (draw[2:4].T * (room + 1)).floor()
        mirrored = draw[4] > 0.5
        zoom[0], origin[0], mirrored[0] = 1, pad, False
        return cls(size, pad, zoom, origin, mirrored)

    def __getitem__(self, index: Tensor) -> Jitter:
        """Some of the views."""
        return Jitter(self.size, self.pad, self.zoom[index], self.origin[index], self.mirrored[index])

    def rows(self) -> Tensor:
        """`[V, H, H]`: row i of a view is a mixture (bilinear) of the image's rows."""
        return self._matrix(0)

    def cols(self) -> Tensor:
        """`[V, W, W]`, the same for columns; mirrored views included."""
        matrix = self._matrix(1)
        return torch.where(self.mirrored[:, None, None], matrix.flip(1), matrix)

    def _matrix(self, axis: int) -> Tensor:
        n = self.size[axis]
        place = torch.arange(n, device=self.zoom.device)
        seen = (place + self.origin[:, axis, None] + 0.5) / self.zoom[:, None] - 0.5
        seen = seen.clamp(0, n + 2 * self.pad - 1) - self.pad
        seen = (n - 1) - ((n - 1) - seen.abs()).abs()  # reflected at both ends
        return (1 - (seen[:, :, None] - place).abs()).clamp_(min=0)

    def apply(self, image: Tensor) -> Tensor:
        """The views of an image.

        Args:
            image: `[C, H, W]`.

        Returns:
            `[V, C, H, W]`.
        """
        rows, cols = (m.to(image) for m in (self.rows(), self.cols()))
        return torch.einsum("vij,cjk,vlk->vcil", rows, image, cols)

    def to(self, device: torch.device) -> Jitter:
        """The same on another device."""
        return Jitter(
            self.size, self.pad, self.zoom.to(device), self.origin.to(device), self.mirrored.to(device)
        )
