"""Camera rays through the cells of a grid, and RayPE: rotations by their coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.layers.convolutions import grid_of

DIRECTION_PERIOD = 8.0
ORIGIN_PERIOD = 4.0  # of moments, too
BASE = 3.0  # each frequency over the one before
ORIGINAL_SIZES = ("principal_point", "image")


def default_intrinsics(image: Tensor) -> Tensor:
    """`[B, 4]` fx = W, fy = H, cx = W / 2, cy = H / 2 of the image, for want of a camera."""
    height, width = grid_of(image)
    one = torch.tensor([width, height, width / 2, height / 2], dtype=torch.float32, device=image.device)
    return one.expand(int(image.shape[0]), 4)


def ray_directions(
    image: Tensor,
    grid: tuple[int, int],
    camera: Camera | None,
    original_size: str = "principal_point",
    part: tuple[slice, slice] | None = None,
) -> Tensor:
    """Unit directions `[B, 3, gh, gw]` of the rays through the cells of a grid over the image, in world axes.

    Intrinsics are scaled from the size of the image that they refer to, the "original size", to the grid.
    The direction through the cell (i, j) is R ((j + 0.5 - cx) / fx, (i + 0.5 - cy) / fy, 1), normalised.

    Args:
        image: `[B, 3, h_img, w_img]`; only its size counts.
        grid: (gh, gw).
        camera: None for `default_intrinsics` and the identity pose.
        original_size: "principal_point": twice the largest principal point of the batch, in whole pixels, as
            in the official code; right where every principal point is the centre and they are all equal.
            "image": the size of the image that is given; right for any principal point, image by image.
        part: Rows and columns of the grid to compute, start and stop given; all of them by default.
    """
    intrinsics = default_intrinsics(image) if camera is None else camera.intrinsics.to(image.device).float()
    fx, fy, cx, cy = (value.view(-1, 1, 1) for value in intrinsics.unbind(1))
    height: int | Tensor
    width: int | Tensor
    if original_size == "image":
        height, width = grid_of(image)
    else:
        height, width = (torch.trunc(2 * centre.max()) for centre in (cy, cx))
    sy, sx = grid[0] / height, grid[1] / width
    rows, cols = (
        torch.arange(span.start, span.stop, device=image.device)
        for span in part or (slice(0, grid[0]), slice(0, grid[1]))
    )
    x = (cols + 0.5 - cx * sx) / (fx * sx)
    y = (rows.view(-1, 1) + 0.5 - cy * sy) / (fy * sy)
    shape = (int(intrinsics.shape[0]), len(rows), len(cols))
    rays = torch.stack([x.expand(shape), y.expand(shape), torch.ones(shape, device=image.device)], 1)
    if camera is not None and camera.pose is not None:
        turn = camera.pose[:, :3, :3].to(image.device).float()
        rays = (turn @ rays.flatten(2)).view(rays.shape)
    x, y, z = rays.unbind(1)  # a norm over three far apart numbers, several times as fast by hand
    return rays / (x * x + y * y + z * z).sqrt().unsqueeze(1)


def ray_origins(directions: Tensor, camera: Camera | None) -> Tensor | None:
    """Where rays begin, `[B, 3, 1, 1]` in world axes: the centre of each camera; None for the identity
    pose."""
    if camera is None or camera.pose is None:
        return None
    return camera.pose[:, :3, 3, None, None].to(directions.device).float()


def ray_moments(directions: Tensor, camera: Camera | None) -> Tensor | None:
    """Plücker moments `[B, 3, gh, gw]`, origin x direction; None where all are zero by the identity pose.

    (direction, moment) names the line itself: moving the origin along the ray changes neither.
    """
    origins = ray_origins(directions, camera)
    return None if origins is None else torch.cross(origins.expand_as(directions), directions, dim=1)


@dataclass(frozen=True)
class Rays:
    """The rays through the cells of a grid, as directions and what goes with them.

    Attributes:
        original_size: What intrinsics refer to; see `ray_directions`.
        plucker: Whether moments (`ray_moments`) go with the directions; else origins (`ray_origins`).
    """

    original_size: str = "principal_point"
    plucker: bool = False

    def __call__(
        self,
        image: Tensor,
        grid: tuple[int, int],
        camera: Camera | None,
        part: tuple[slice, slice] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Directions `[B, 3, gh, gw]`, and moments or origins (None where they are zero); see there."""
        directions = ray_directions(image, grid, camera, self.original_size, part)
        return directions, (ray_moments if self.plucker else ray_origins)(directions, camera)


def ray_angles(directions: Tensor, dim: int, others: Tensor | None = None) -> Tensor:
    """RayPE's angles of a head of `dim` channels, `[B, gh, gw, 6 * floor(dim / 12)]`.

    Six numbers describe a ray; each gets floor(dim / 12) frequencies (2 pi / P) 3^k, with the period P = 8
    for directions and 4 for the others. Angle 6 k + c belongs to the other number c for c < 3, and to the
    component c - 3 of the direction else.

    Args:
        directions: `[B, 3, gh, gw]`.
        dim: Channels of a head.
        others: Origins or moments `[B, 3, gh, gw]` (or what can be expanded to that); None for zeros.
    """
    count = dim // 2 // 6
    powers = BASE ** torch.arange(count, device=directions.device)

    def turned(values: Tensor, period: float) -> Tensor:  # channels lie last in memory, as in the encoding
        return (2 * math.pi / period * powers).view(-1, 1) * values.permute(0, 2, 3, 1).unsqueeze(3)

    angles = turned(directions, DIRECTION_PERIOD)
    if others is None:
        return F.pad(angles, (3, 0)).flatten(3)
    others = others.expand_as(directions)
    return torch.cat([turned(others, ORIGIN_PERIOD), angles], 4).flatten(3)


def rotation(directions: Tensor, dim: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RayPE of one head, as the cosine and sine `[B, dim / 2, gh, gw]` of its angles.

    All rays of a pinhole camera share their origin, so that a rotation by it cancels in every product of a
    query and a key: only Plücker moments are taken beside the directions, never origins.
    """
    angles = ray_angles(directions, dim, moments)
    angles = F.pad(angles, (0, dim // 2 - int(angles.shape[3]))).permute(0, 3, 1, 2)
    return angles.cos(), -angles.sin()
