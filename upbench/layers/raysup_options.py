"""RaysUp's options: the paper's ablations, where training begins, and what checkpoints tell of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.errors import UpbenchError, unknown
from upbench.layers.convolutions import GROUPS
from upbench.layers.rays import ORIGINAL_SIZES, Rays, ray_angles
from upbench.layers.rotary import axial_rotation

Part = tuple[slice, slice]
Branches = Mapping[str, tuple[tuple[int, int], int, int, tuple[int, int]]]
"""Name -> kernel (rows x columns), blocks, dilation, reflect padding (rows, columns); see `Branch`."""

POINT = ((1, 1), 2, 1, (0, 0))
OTHER_ENCODERS: dict[str, Branches] = {
    "parallel": {
        "center": POINT,
        "horizontal": ((1, 3), 1, 1, (0, 1)),
        "vertical": ((3, 1), 1, 1, (1, 0)),
        "square": ((3, 3), 1, 1, (1, 1)),
    },
    "multi": {
        "center": POINT,
        "horizontal": ((1, 3), 2, 1, (0, 1)),
        "vertical": ((3, 1), 2, 1, (1, 0)),
        "square": ((3, 3), 2, 1, (1, 1)),
    },
    "dual": {"center": POINT, "square": ((3, 3), 2, 1, (1, 1))},
    "single": {"center": POINT},
}
POSITIONS = ("rayPE", "rope", "sinrays", "none")
RAY_COORDINATES = ("origin_direction", "plucker")
_OFFICIAL = {
    f"image_tokenizer.img_encoder.enc_{theirs}.": f"encoder.{ours}."
    for theirs, ours in (
        ("center", "center"),
        ("horiz", "horizontal"),
        ("vert", "vertical"),
        ("corners", "corners"),
        ("1x1", "center"),
        ("1x3", "horizontal"),
        ("3x1", "vertical"),
        ("3x3", "square"),
    )
}


def check_options(
    encoders: Mapping[str, Branches],
    *,
    dim: int,
    heads: int,
    kernel_size: int,
    encoder: str,
    position: str,
    ray_coordinates: str,
    original_size: str,
) -> None:
    """Refuses what the method has not.

    Raises:
        UpbenchError: A value that is none of those that there are.
    """
    if dim < heads * GROUPS or dim % (heads * GROUPS):
        raise UpbenchError(f"raysup: dim {dim} is not a multiple of {heads * GROUPS}")
    if kernel_size < 1:
        raise UpbenchError(f"raysup: kernel_size {kernel_size} is not positive")
    for option, value, choices in (
        ("encoder", encoder, encoders),
        ("position", position, POSITIONS),
        ("ray_coordinates", ray_coordinates, RAY_COORDINATES),
        ("original_size", original_size, ORIGINAL_SIZES),
    ):
        if value not in choices:
            raise unknown(f"{option} of raysup", str(value), choices)
    if position == "sinrays" and dim < 12 * heads:
        raise UpbenchError(f"raysup: dim {dim} is too small for position 'sinrays'; {12 * heads} at least")


class AxialPositions:
    """`position="rope"`: heads are rotated by pixel coordinates, as in NAF, in place of rays."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def __call__(
        self, image: Tensor, grid: tuple[int, int], camera: Camera | None, part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[head_dim / 2, gh, gw]` of a head's angles on a grid, or on part of it."""
        return axial_rotation(grid, self.head_dim, image.device, part=part)


def other_rotation(position: str, head_dim: int) -> AxialPositions | None:
    """What heads are rotated by where it is not rays; None where they are not rotated."""
    return AxialPositions(head_dim) if position == "rope" else None


class RayFeatures(nn.Module):
    """`position="sinrays"`: sines and cosines of RayPE's angles, projected and added to queries and keys."""

    def __init__(self, dim: int, heads: int, rays: Rays) -> None:
        """Args: dim: Channels of queries and keys, of all heads; heads: How many; rays: What they see."""
        super().__init__()
        self.head_dim = dim // heads
        self.rays = rays
        count = 6 * (self.head_dim // 12)
        self.projection = nn.Conv2d(2 * count, dim, 1)
        with torch.no_grad():  # so that attention begins as it does with rotations
            for parameter in self.projection.parameters():
                parameter.zero_()
            for head in range(heads):
                for i in _peaks("rayPE", self.head_dim)[0]:
                    for first, feature in ((0, i), (self.head_dim // 2, count + i)):
                        self.projection.weight[head * self.head_dim + first + i, feature] = math.sqrt(8)

    def forward(
        self, image: Tensor, grid: tuple[int, int], camera: Camera | None, part: Part | None = None
    ) -> Tensor:
        """`[B, dim, gh, gw]` of a grid over an image `[B, 3, h_img, w_img]`, or of part of it."""
        directions, others = self.rays(image, grid, camera, part)
        angles = ray_angles(directions, self.head_dim, others).permute(0, 3, 1, 2)
        features = torch.cat([angles.sin(), angles.cos()], 1)
        projected: Tensor = self.projection(features.to(self.projection.weight.dtype))
        return projected


def _peaks(position: str, dim: int) -> tuple[list[int], float]:
    """Angles of a head that an initial bias goes to, and the bias.

    Queries and keys are the same encoding, so what is constant in it turns into a kernel of the distance
    alone: unlearned attention then falls off with the angle between rays. The third and fourth frequency of
    RayPE make that kernel about one low-resolution cell wide, close to bilinear interpolation. The bias of
    RoPE, whose frequencies are lower, gives a kernel of the same curvature for the default camera.
    """
    if position == "rope":
        return [0, 1, dim // 4, dim // 4 + 1], math.sqrt(8)
    if position == "rayPE":
        return [6 * k + c for k in (2, 3) for c in (3, 4, 5) if 6 * k + 6 <= dim // 2], 2.0
    return [], 0.0


@torch.no_grad()
def begin_as_interpolation(branches: Iterable[nn.Module], position: str, head_dim: int) -> None:
    """Sets each branch's last bias, so that attention begins as interpolation (see `_peaks`)."""
    angles, value = _peaks(position, head_dim)
    for branch in branches:
        last: nn.Conv2d = branch[-1].conv2  # type: ignore[index]
        assert last.bias is not None
        heads = last.bias.zero_().view(-1, 2, head_dim // 2)
        for angle in angles:
            heads[:, :, angle] = value


def options_of(state: Mapping[str, Tensor], encoders: Mapping[str, Branches]) -> dict[str, Any]:
    """`encoder` from the names of the branches and blocks, `dim` from the first convolution, and `position`
    where it has parameters; of a checkpoint under our names.

    Raises:
        UpbenchError: Branches that no encoder has.
    """
    blocks: dict[str, set[str]] = {}
    for key in state:
        if key.startswith("encoder."):
            _, branch, block, *_ = (*key.split("."), "", "")
            blocks.setdefault(branch, set()).add(block)
    if not blocks:
        return {}
    found = {branch: max(1, len(names) - 1) for branch, names in blocks.items()}
    fits = [
        name
        for name, branches in encoders.items()
        if found == {branch: shape[1] for branch, shape in branches.items()}
    ]
    if not fits:
        shown = ", ".join(f"{branch} ({count})" for branch, count in found.items())
        raise UpbenchError(
            f"raysup has no encoder with the branches (blocks) {shown}; known: {', '.join(encoders)}"
        )
    options: dict[str, Any] = {"encoder": fits[0]}
    stem = state.get("encoder.center.0.weight")
    if stem is not None and stem.ndim:
        options["dim"] = len(found) * int(stem.shape[0])
    if any(key.startswith("ray_features.") for key in state):
        options["position"] = "sinrays"
    return options


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint under the official names, under ours; ours pass unchanged."""
    converted = {}
    for key, tensor in state.items():
        prefix = next((p for p in _OFFICIAL if key.startswith(p)), None)
        converted[key if prefix is None else _OFFICIAL[prefix] + key[len(prefix) :]] = tensor
    return converted
