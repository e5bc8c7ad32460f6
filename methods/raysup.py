"""RaysUp: neighbourhood cross-attention guided by a spatially decoupled image encoder and by camera rays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError, unknown
from upbench.layers.convolutions import GROUPS, Branch, grid_of, pool
from upbench.layers.guidance import Guidance
from upbench.layers.rays import (
    ORIGINAL_SIZES,
    ray_angles,
    ray_directions,
    ray_moments,
    ray_origins,
    rotation,
)
from upbench.layers.rotary import RotatedRows, axial_rotation, interleaved, rotate_heads, turned, turns
from upbench.layers.strips import can_stream, stream
from upbench.ops.window.attention import QueryRows, WindowOperator, window_attention, window_operator
from upbench.ops.window.tables import neighbourhood_tables
from upbench.ops.window.tiled import TiledWindows

HEADS = 4
Shape = tuple[tuple[int, int], int, int, tuple[int, int]]
Part = tuple[slice, slice]
_POINT: Shape = ((1, 1), 2, 1, (0, 0))
# Branches of each encoder: kernel (rows x columns), blocks, dilation, reflect padding (rows, columns). They
# have equal parts of the channels: four of them are a head each, one of two is two heads.
ENCODERS: dict[str, dict[str, Shape]] = {
    "decoupled": {
        "center": _POINT,
        "horizontal": ((1, 3), 1, 1, (0, 1)),
        "vertical": ((3, 1), 1, 1, (1, 0)),
        "corners": ((2, 2), 1, 2, (1, 1)),
    },
    "parallel": {
        "center": _POINT,
        "horizontal": ((1, 3), 1, 1, (0, 1)),
        "vertical": ((3, 1), 1, 1, (1, 0)),
        "square": ((3, 3), 1, 1, (1, 1)),
    },
    "multi": {
        "center": _POINT,
        "horizontal": ((1, 3), 2, 1, (0, 1)),
        "vertical": ((3, 1), 2, 1, (1, 0)),
        "square": ((3, 3), 2, 1, (1, 1)),
    },
    "dual": {"center": _POINT, "square": ((3, 3), 2, 1, (1, 1))},
    "single": {"center": _POINT},
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


class RaysUp(Upsampler):
    """RaysUp (see `paper`), native: no neighbourhood-attention package, no upsampled keys and values.

    Queries are the guidance encoding at the output size, keys the same encoding at feature size; both are
    rotated by the directions of their camera rays. Each output pixel averages `kernel_size` x `kernel_size`
    features, as the official code's NATTEN call does (kernel 6, dilation = output // feature size).

    Differences from the official code: feature maps (or outputs) smaller than the window get a window as
    large as they are, where the official code fails; `kernel_size` has an effect, which there it has not;
    without weights, attention begins close to bilinear interpolation, from where training gets further in
    few steps. As there, the image size that intrinsics refer to is taken from the largest principal point
    of the batch, so with cameras the images of a batch influence one another; `original_size="image"` is the
    corrected form. The options are the paper's ablations; docs/raysup.md has them in formulas.
    """

    name = "raysup"
    title = "RaysUp"
    paper = "Ding et al., RaysUp: Ultra-light Universal Feature Upsampling, ECCV 2026, arXiv 2606.22749"
    year = 2026
    licence = "Apache-2.0"
    trainable = True
    channel_multiple = HEADS
    linear = True
    uses_camera = True
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "raysup", "8362a791691833336804113257a4cad91848476d229d63f25e0c2f7f8a448f56"
        ),
        "dinov2_vits14_focus_2000": Weights.shipped(
            "raysup",
            "715b770cff24a6961b8bf7bd9c289db961efc70efd8acbb78901e74f3f263187",
            variant="_2000",
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(
        self,
        channels: int = 384,
        *,
        dim: int = 256,
        kernel_size: int = 6,
        encoder: str = "decoupled",
        position: str = "rayPE",
        ray_coordinates: str = "origin_direction",
        original_size: str = "principal_point",
    ) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features, a multiple of 4; no parameter depends on it.
            dim: Channels of queries and keys; each of the four heads has a quarter.
            kernel_size: Side of the window in features, odd or even.
            encoder: Branches of the guidance encoder: "decoupled" (released: 1x1, 1x3, 3x1 and the corners of
                3x3; 102,592 parameters), "parallel" (1x1, 1x3, 3x1, 3x3; 144,512), "multi" (the same with two
                blocks in each; 268,544), "dual" (1x1 and 3x3, two blocks, as NAF's; 662,528) or "single" (1x1
                of all channels, two blocks; 266,240).
            position: "rayPE" (rotations by rays), "rope" (rotations by pixel coordinates, as in NAF),
                "sinrays" (a learned projection of the sines and cosines of RayPE's angles is added to queries
                and keys) or "none".
            ray_coordinates: "origin_direction" (released) or "plucker" (direction and moment, as the paper
                has it); the same under the identity pose.
            original_size: Image size that intrinsics refer to, "principal_point" (released) or "image"; see
                `upbench.layers.rays.ray_directions`.

        Raises:
            UpbenchError: A value that is none of these.
        """
        super().__init__(channels)
        if dim < HEADS * GROUPS or dim % (HEADS * GROUPS):
            raise UpbenchError(f"raysup: dim {dim} is not a multiple of {HEADS * GROUPS}")
        if kernel_size < 1:
            raise UpbenchError(f"raysup: kernel_size {kernel_size} is not positive")
        for option, value, choices in (
            ("encoder", encoder, ENCODERS),
            ("position", position, POSITIONS),
            ("ray_coordinates", ray_coordinates, RAY_COORDINATES),
            ("original_size", original_size, ORIGINAL_SIZES),
        ):
            if value not in choices:
                raise unknown(f"{option} of raysup", str(value), choices)
        self.kernel_size = kernel_size
        self.head_dim = dim // HEADS
        self.position = position
        self.ray_coordinates = ray_coordinates
        self.original_size = original_size
        self.encoder = GuidanceEncoder(dim, encoder)
        self.ray_features = RayFeatures(dim) if position == "sinrays" else None
        for branch in self.encoder.children():
            _begin_as_interpolation(branch, position, self.head_dim)

    def forward(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Tensor:
        """See `Upsampler.forward`; `camera` defaults to `default_intrinsics` and the identity pose."""
        queries, keys = self.encode(image, grid_of(features), output_size, camera)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_attention(queries, keys, features, rows, cols, heads=HEADS)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> WindowOperator:
        """The attention weights, one group of channels per head (see `Upsampler.operator`)."""
        with torch.no_grad():
            queries, keys = self.encode(image, grid_of(features), output_size, camera)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_operator(queries, keys, rows, cols, heads=HEADS)

    def tile_operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        *,
        memory_budget: int,
    ) -> TiledWindows:
        """The attention, computed for the crop that is asked for (see `Upsampler.tile_operator`)."""
        guidance = Guidance(list(self.encoder.children()), image, memory_budget)

        def encoded(grid: tuple[int, int], part: Part | None = None) -> Tensor:
            return self._placed([guidance.pooled(grid, part)], image, grid, camera, part)

        rows, cols = self.tables(grid_of(features), output_size)
        keys = encoded(grid_of(features))
        return TiledWindows(lambda part: encoded(output_size, part), keys, rows, cols, heads=HEADS)

    def encode(
        self,
        image: Tensor,
        feature_size: tuple[int, int],
        output_size: tuple[int, int],
        camera: Camera | None,
    ) -> tuple[Tensor | QueryRows, Tensor]:
        """Queries `[B, dim, H, W]` and keys `[B, dim, h, w]` that know their positions.

        Where encoders work in strips, rotated queries come in strips as well, when attention needs them, and
        the channels of both are `interleaved`, which makes no difference to their products.
        """
        lazy = can_stream(image) and self.position in ("rayPE", "rope")
        if image.device.type == "cpu":  # twice as fast there for small kernels
            image = image.contiguous(memory_format=torch.channels_last)
        pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
        for branch in self.encoder.children():
            encoding = self._paired(branch, image) if lazy else branch(image)
            for parts, grid in zip(pooled, (output_size, feature_size), strict=True):
                parts.append(pool(encoding, grid))  # at once: the full encoding need not be held
        if not lazy:
            queries = self._placed(pooled[0], image, output_size, camera)
            return queries, self._placed(pooled[1], image, feature_size, camera)
        heads = [[head for part in parts for head in part.split(self.head_dim, 1)] for parts in pooled]

        def turn(grid: tuple[int, int], part: Part | None = None) -> Tensor:
            rotation = self._rotation(image, grid, camera, part)
            assert rotation is not None
            return turns(*rotation)

        here = turn(feature_size)
        keys = torch.cat([turned(head, here) for head in heads[1]], 1)
        across = slice(0, output_size[1])
        return RotatedRows(heads[0], lambda a, b: turn(output_size, (slice(a, b), across))), keys

    def _paired(self, branch: nn.Module, image: Tensor) -> Tensor:
        """A branch's encoding, in strips; channels that are rotated together are neighbours."""
        stem, *blocks = branch.children()
        assert isinstance(stem, nn.Conv2d)
        return stream(stem, blocks, image, interleaved(self.head_dim, stem.out_channels // self.head_dim))

    def _placed(
        self,
        encodings: Sequence[Tensor],
        image: Tensor,
        grid: tuple[int, int],
        camera: Camera | None,
        part: Part | None = None,
    ) -> Tensor:
        """Encodings of a grid (or part of it) as one, with their positions in it."""
        turn = self._rotation(image, grid, camera, part)
        placed = torch.cat(
            [
                encoding if turn is None else rotate_heads(encoding, self.head_dim, *turn)
                for encoding in encodings
            ],
            1,
        )
        if self.ray_features is None:
            return placed
        marks: Tensor = self.ray_features(*self._rays(image, grid, camera, part))
        return placed + marks.to(placed.dtype)

    def _rotation(
        self, image: Tensor, grid: tuple[int, int], camera: Camera | None, part: Part | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine that the heads of a grid (or part of it) are rotated by, if they are."""
        if self.position == "rope":
            return axial_rotation(grid, self.head_dim, image.device, part=part)
        if self.position != "rayPE":
            return None
        directions, others = self._rays(image, grid, camera, part)
        moments = others if self.ray_coordinates == "plucker" else None  # rotations by origins cancel
        return rotation(directions, self.head_dim, moments)

    def _rays(
        self, image: Tensor, grid: tuple[int, int], camera: Camera | None, part: Part | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Directions of a grid's rays, and their moments or origins (None where they are zero)."""
        directions = ray_directions(image, grid, camera, self.original_size, part)
        others = ray_moments if self.ray_coordinates == "plucker" else ray_origins
        return directions, others(directions, camera)

    def tables(self, feature_size: tuple[int, int], output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The low-resolution rows and columns that each output row and column sees."""
        return neighbourhood_tables(feature_size, output_size, self.kernel_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`encoder` from the names of the branches and blocks, `dim` from the first convolution, and
        `position` where it has parameters."""
        state = cls.convert_state(state)
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
            for name, branches in ENCODERS.items()
            if found == {branch: shape[1] for branch, shape in branches.items()}
        ]
        if not fits:
            shown = ", ".join(f"{branch} ({count})" for branch, count in found.items())
            raise UpbenchError(
                f"raysup has no encoder with the branches (blocks) {shown}; known: {', '.join(ENCODERS)}"
            )
        options: dict[str, Any] = {"encoder": fits[0]}
        stem = state.get("encoder.center.0.weight")
        if stem is not None and stem.ndim:
            options["dim"] = len(found) * int(stem.shape[0])
        if any(key.startswith("ray_features.") for key in state):
            options["position"] = "sinrays"
        return options

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`."""
        converted = {}
        for key, tensor in state.items():
            prefix = next((p for p in _OFFICIAL if key.startswith(p)), None)
            converted[key if prefix is None else _OFFICIAL[prefix] + key[len(prefix) :]] = tensor
        return converted


class GuidanceEncoder(nn.Module):
    """Branches of different receptive fields; their outputs together are the heads of queries and keys."""

    def __init__(self, dim: int = 256, kind: str = "decoupled") -> None:
        """Args: dim: Channels of all branches together; kind: One of `ENCODERS`."""
        super().__init__()
        branches = ENCODERS[kind]
        for name, shape in branches.items():
            self.add_module(name, Branch(dim // len(branches), *shape))


class RayFeatures(nn.Module):
    """Sines and cosines of RayPE's angles, projected to the channels of queries and keys."""

    def __init__(self, dim: int) -> None:
        """Args: dim: Channels of queries and keys."""
        super().__init__()
        self.head_dim = dim // HEADS
        count = 6 * (self.head_dim // 12)
        if not count:
            raise UpbenchError(
                f"raysup: dim {dim} is too small for position 'sinrays'; {12 * HEADS} at least"
            )
        self.projection = nn.Conv2d(2 * count, dim, 1)
        with torch.no_grad():  # so that attention begins as it does with rotations
            for parameter in self.projection.parameters():
                parameter.zero_()
            for head in range(HEADS):
                for i in _peaks("rayPE", self.head_dim)[0]:
                    for first, feature in ((0, i), (self.head_dim // 2, count + i)):
                        self.projection.weight[head * self.head_dim + first + i, feature] = math.sqrt(8)

    def forward(self, directions: Tensor, others: Tensor | None) -> Tensor:
        """`[B, 3, gh, gw]` directions and origins or moments (None for zeros), to `[B, dim, gh, gw]`."""
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
def _begin_as_interpolation(branch: nn.Module, position: str, head_dim: int) -> None:
    """Sets a branch's last bias, so that attention begins as interpolation (see `_peaks`)."""
    last: nn.Conv2d = branch[-1].conv2  # type: ignore[index]
    assert last.bias is not None
    angles, value = _peaks(position, head_dim)
    heads = last.bias.zero_().view(-1, 2, head_dim // 2)
    for angle in angles:
        heads[:, :, angle] = value
