"""RaysUp: an encoder of the image, rays through its pixels, attention of each pixel to a window of features.

docs/raysup.md has the method in formulas, under the paper's names. Options other than the released ones are
in `upbench.layers.raysup_options`, the way that is fast on a CPU in `upbench.layers.rotated`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.layers import raysup_options as options
from upbench.layers.convolutions import Branch, grid_of, pool
from upbench.layers.guidance import Guidance
from upbench.layers.rays import Rays, rotation
from upbench.layers.rotary import rotate_heads
from upbench.layers.rotated import rotated_in_strips
from upbench.layers.strips import can_stream
from upbench.ops.window.attention import QueryRows, WindowOperator, window_attention, window_operator
from upbench.ops.window.tables import neighbourhood_tables
from upbench.ops.window.tiled import TiledWindows

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

HEADS = 4
Size = tuple[int, int]
Part = tuple[slice, slice]
ENCODERS: dict[str, options.Branches] = {
    "decoupled": {  # kernel (rows x columns), blocks, dilation, reflect padding; each branch is a head
        "center": ((1, 1), 2, 1, (0, 0)),
        "horizontal": ((1, 3), 1, 1, (0, 1)),
        "vertical": ((3, 1), 1, 1, (1, 0)),
        "corners": ((2, 2), 1, 2, (1, 1)),
    },
    **options.OTHER_ENCODERS,
}


class GuidanceEncoder(nn.Module):
    """Branches that see different neighbourhoods; their outputs together are the heads of queries and keys.

    The paper's Spatially Decoupled Guidance Encoder, E in docs/raysup.md, has a branch for the pixel, one for
    its row, one for its column and one for the corners around it.
    """

    def __init__(self, dim: int, branches: options.Branches) -> None:
        """Args: dim: Channels of all branches together, in equal parts; branches: One of `ENCODERS`."""
        super().__init__()
        for name, shape in branches.items():
            self.add_module(name, Branch(dim // len(branches), *shape))

    def forward(self, image: Tensor, *grids: Size) -> list[list[Tensor]]:
        """`[B, 3, h_img, w_img]` to the branches' encodings `[B, dim / branches, gh, gw]` on each grid."""
        pooled: list[list[Tensor]] = [[] for _ in grids]
        for branch in self.children():
            encoding = branch(image)
            for parts, grid in zip(pooled, grids, strict=True):
                parts.append(pool(encoding, grid))  # at once: the full encoding need not be held
        return pooled


class RayPE:
    """Rotations by the rays through cells: the angles theta_{k,c} of docs/raysup.md.

    The product of a rotated query and a rotated key depends on the difference of their rays alone.
    """

    def __init__(self, head_dim: int, rays: Rays) -> None:
        """Args: head_dim: Channels of a head; rays: What rotates it."""
        self.head_dim = head_dim
        self.rays = rays

    def __call__(
        self, image: Tensor, grid: Size, camera: Camera | None, part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[B, head_dim / 2, gh, gw]` of a head's angles on a grid, or on part of it."""
        directions, others = self.rays(image, grid, camera, part)
        moments = others if self.rays.plucker else None  # rotations by origins cancel
        return rotation(directions, self.head_dim, moments)


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
    license = "Apache-2.0"
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
        options.check_options(
            ENCODERS,
            dim=dim,
            heads=HEADS,
            kernel_size=kernel_size,
            encoder=encoder,
            position=position,
            ray_coordinates=ray_coordinates,
            original_size=original_size,
        )
        self.kernel_size = kernel_size
        self.head_dim = dim // HEADS
        self.encoder = GuidanceEncoder(dim, ENCODERS[encoder])
        options.begin_as_interpolation(self.encoder.children(), position, self.head_dim)
        rays = Rays(original_size, plucker=ray_coordinates == "plucker")
        self.rotation = (
            RayPE(self.head_dim, rays)
            if position == "rayPE"
            else options.other_rotation(position, self.head_dim)
        )
        self.ray_features = options.RayFeatures(dim, HEADS, rays) if position == "sinrays" else None

    def forward(
        self, image: Tensor, features: Tensor, output_size: Size, camera: Camera | None = None
    ) -> Tensor:
        """See `Upsampler.forward`; `camera` defaults to `default_intrinsics` and the identity pose."""
        queries, keys = self.encode(image, grid_of(features), output_size, camera)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_attention(queries, keys, features, rows, cols, heads=HEADS)

    def encode(
        self, image: Tensor, feature_size: Size, output_size: Size, camera: Camera | None
    ) -> tuple[Tensor | QueryRows, Tensor]:
        """Queries `[B, dim, H, W]` and keys `[B, dim, h, w]`: one encoding on two grids, each with the
        positions of its cells."""
        rotate = self.rotation
        if rotate is not None and can_stream(image):
            return rotated_in_strips(
                self.encoder.children(),
                image,
                self.head_dim,
                output_size,
                feature_size,
                lambda grid, part: rotate(image, grid, camera, part),
            )
        if image.device.type == "cpu":  # twice as fast there for small kernels
            image = image.contiguous(memory_format=torch.channels_last)
        queries, keys = self.encoder(image, output_size, feature_size)
        return (
            self.placed(queries, image, output_size, camera),
            self.placed(keys, image, feature_size, camera),
        )

    def placed(
        self,
        encodings: Sequence[Tensor],
        image: Tensor,
        grid: Size,
        camera: Camera | None,
        part: Part | None = None,
    ) -> Tensor:
        """Encodings of a grid (or part of it) as one `[B, dim, gh, gw]`, with the positions of its cells."""
        if self.rotation is not None:
            turn = self.rotation(image, grid, camera, part)
            encodings = [rotate_heads(encoding, self.head_dim, *turn) for encoding in encodings]
        placed = torch.cat(list(encodings), 1)
        if self.ray_features is None:
            return placed
        marks: Tensor = self.ray_features(image, grid, camera, part)
        return placed + marks.to(placed.dtype)

    def tables(self, feature_size: Size, output_size: Size) -> tuple[Tensor, Tensor]:
        """The low-resolution rows and columns that each output row and column sees."""
        return neighbourhood_tables(feature_size, output_size, self.kernel_size)

    def operator(
        self, image: Tensor, features: Tensor, output_size: Size, camera: Camera | None = None
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
        output_size: Size,
        camera: Camera | None = None,
        backbone: Backbone | None = None,
        *,
        memory_budget: int,
    ) -> TiledWindows:
        """The attention, computed for the crop that is asked for (see `Upsampler.tile_operator`)."""
        guidance = Guidance(list(self.encoder.children()), image, memory_budget)

        def encoded(grid: Size, part: Part | None = None) -> Tensor:
            return self.placed([guidance.pooled(grid, part)], image, grid, camera, part)

        rows, cols = self.tables(grid_of(features), output_size)
        keys = encoded(grid_of(features))
        return TiledWindows(lambda part: encoded(output_size, part), keys, rows, cols, heads=HEADS)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Upsampler.options_from`: `encoder`, `dim`, and `position` where it has parameters."""
        return options.options_of(cls.convert_state(state), ENCODERS)

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`."""
        return options.from_official(state)
