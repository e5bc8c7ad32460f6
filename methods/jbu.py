"""Joint bilateral upsampling: a Gaussian in space times a Gaussian in colour, no training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import resize_guidance
from upbench.ops.window.attention import WindowOperator
from upbench.ops.window.tables import Tiling, radius_table, tiling


class JBU(Upsampler):
    """Joint bilateral upsampling (Kopf et al. 2007, Section 3).

    Every output pixel p is an average of the low-resolution cells q around it,

        S_p = sum_q w_pq f_q / sum_q w_pq,
        w_pq = exp(-|p' - q|^2 / (2 sigma_spatial^2)) exp(-|I_p - J_q|^2 / (2 sigma_range^2)),

    where p' is p's centre on the low-resolution grid, I the guidance at output resolution and J the guidance
    averaged over each low-resolution cell (the paper samples the image at the cell's centre; a feature
    describes the whole patch). q runs over the (2 radius + 1)^2 cells around the one that holds p', those
    outside the grid left out. Along an axis where the output is smaller than the features, sigma_spatial and
    radius grow by their ratio, so that no cell is skipped.

    The weights come from the image alone: the method is linear in the features.
    """

    name = "jbu"
    title = "JBU"
    paper = "Kopf et al., Joint Bilateral Upsampling, ACM TOG 26(3) (SIGGRAPH 2007)"
    year = 2007
    linear = True
    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, radius: int = 2, sigma_spatial: float = 0.75, sigma_range: float = 0.1) -> None:
        """Fixes the kernel.

        The default sigmas were the best of 0.5, 0.75, 1 and 0.05 .. 1 on eight training photos of BSDS500:
        cosine similarity of DINOv2 ViT-S/14 features, upsampled 2x and 4x, to those of the full-size photo.

        Args:
            radius: Cells on each side of the one that holds the pixel; at least 1.
            sigma_spatial: Standard deviation in space, in low-resolution cells.
            sigma_range: Standard deviation in colour, for RGB in 0..1.
        """
        super().__init__()
        if radius < 1 or sigma_spatial <= 0 or sigma_range <= 0:
            raise ValueError("radius must be at least 1, sigma_spatial and sigma_range above 0")
        self.radius = int(radius)
        self.sigma_spatial = float(sigma_spatial)
        self.sigma_range = float(sigma_range)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`; the image is RGB in 0..1."""
        return self.operator(image, features, output_size)(features.unsqueeze(1))

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> WindowOperator:
        """See `Upsampler.operator`: the normalised weights."""
        image = image.float()
        grid = (int(features.shape[-2]), int(features.shape[-1]))
        high = resize_guidance(image, output_size)
        low = resize_guidance(image, grid)
        rows, cols = (
            self._axis(size, cells, image.device) for size, cells in zip(output_size, grid, strict=True)
        )
        logits = self._range(high, low, rows[0], cols[0])
        logits += rows[1][None, :, None, :, None, :, None]
        logits += cols[1][None, None, :, None, :, None, :]
        weights = torch.softmax(logits.flatten(3, 4).flatten(4), dim=3)
        return WindowOperator(weights, rows[0], cols[0], groups=1)

    def _axis(self, size: int, cells: int, device: torch.device) -> tuple[Tiling, Tensor]:
        """The windows of an axis as tiles, and their spatial log weights `[T, K, n]`, -inf outside."""
        shrink = max(1.0, cells / size)
        radius = math.ceil(self.radius * shrink)
        tiles = tiling(radius_table(size, cells, radius), cells, device)
        position = (_positions(tiles) + 0.5) * (cells / size) - 0.5
        distance = position[:, None, :] - tiles.cells[:, :, None]
        log = -(distance**2) / (2 * (self.sigma_spatial * shrink) ** 2)
        return tiles, log if tiles.bias is None else log + tiles.bias.transpose(1, 2)

    def _range(self, high: Tensor, low: Tensor, rows: Tiling, cols: Tiling) -> Tensor:
        """Colour log weights `[B, Tr, Tc, Kr, Kc, n, m]`, up to a term that all cells of a pixel share."""
        y, x = _positions(rows), _positions(cols)
        pixels = high[:, :, y[:, None, :, None], x[None, :, None, :]]
        cells = low[:, :, rows.cells[:, None, :, None], cols.cells[None, :, None, :]]
        # |I - J|^2 = |I|^2 - 2 I.J + |J|^2, and the softmax does not see |I|^2
        product = torch.einsum("bcrtkl,bcrtnm->brtklnm", cells, pixels)
        square = cells.square().sum(1)[..., None, None]
        return product.sub_(square / 2).div_(self.sigma_range**2)


def _positions(tiles: Tiling) -> Tensor:
    """`[T, n]` int64, the output position of each place of a tile; beyond the axis its ends are repeated."""
    place = torch.arange(tiles.count * tiles.size, device=tiles.cells.device) - tiles.before
    return place.clamp_(0, tiles.length - 1).reshape(tiles.count, tiles.size)
