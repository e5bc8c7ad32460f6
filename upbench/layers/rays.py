"""Camera rays through the cells of a grid, and RayPE: rotations by their coordinates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.base import Camera
from upbench.layers.convolutions import grid_of


def default_intrinsics(image: Tensor) -> Tensor:
    """`[B, 4]` fx = W, fy = H, cx = W / 2, cy = H / 2 of the image, for want of a camera."""
    height, width = grid_of(image)
    one = torch.tensor([width, height, width / 2, height / 2], dtype=torch.float32, device=image.device)
    return one.expand(int(image.shape[0]), 4)


def ray_directions(image: Tensor, grid: tuple[int, int], camera: Camera | None) -> Tensor:
    """Unit directions `[B, 3, gh, gw]` of the rays through the cells of a grid over the image, in world axes.

    Intrinsics are scaled from the "original size" to the grid; that size is twice the largest principal point
    of the batch, in whole pixels, as in the official code.
    """
    intrinsics = default_intrinsics(image) if camera is None else camera.intrinsics.to(image.device).float()
    fx, fy, cx, cy = (value.view(-1, 1, 1) for value in intrinsics.unbind(1))
    height, width = (torch.trunc(2 * centre.max()) for centre in (cy, cx))
    sy, sx = grid[0] / height, grid[1] / width
    x = (torch.arange(grid[1], device=image.device) + 0.5 - cx * sx) / (fx * sx)
    y = (torch.arange(grid[0], device=image.device).view(-1, 1) + 0.5 - cy * sy) / (fy * sy)
    shape = (int(intrinsics.shape[0]), *grid)
    rays = torch.stack([x.expand(shape), y.expand(shape), torch.ones(shape, device=image.device)], 1)
    if camera is not None and camera.pose is not None:
        turn = camera.pose[:, :3, :3].to(image.device).float()
        rays = (turn @ rays.flatten(2)).view(rays.shape)
    return F.normalize(rays, dim=1)


def rotation(directions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """RayPE angles of one head, as their cosine and sine `[B, dim / 2, gh, gw]`.

    Six numbers describe a ray, its origin and its direction; each gets floor(dim / 12) frequencies that grow
    by 3. All rays of a pinhole camera share their origin, so that its rotation cancels in every product of a
    query and a key: those angles are left at zero.
    """
    count = dim // 2 // 6
    frequencies = 2 * math.pi / 8 * 3.0 ** torch.arange(count, device=directions.device)
    # Channels lie last in memory, as they do in the encoding.
    turned = frequencies.view(-1, 1) * directions.permute(0, 2, 3, 1).unsqueeze(3)
    angles = F.pad(F.pad(turned, (3, 0)).flatten(3), (0, dim // 2 - 6 * count)).permute(0, 3, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a head `[B, dim, gh, gw]`, turned backwards; c is paired with c + dim / 2."""
    a, b = x.chunk(2, 1)
    return torch.addcmul(a * cos, b, sin).to(x.dtype), torch.addcmul(b * cos, a, sin, value=-1).to(x.dtype)
