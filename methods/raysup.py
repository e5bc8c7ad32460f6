"""RaysUp: neighbourhood cross-attention guided by a spatially decoupled image encoder and by camera rays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upbench.base import Camera, Setting, Upsampler
from upbench.errors import UpbenchError
from upbench.layers.convolutions import GROUPS, Branch, grid_of, pool
from upbench.layers.rays import ray_directions, rotate, rotation
from upbench.ops.window import WindowOperator, window_attention, window_operator
from upbench.ops.windows import neighbourhood_table
from upbench.weights import Weights

HEADS = 4  # one per branch of the encoder
# Branch: kernel (rows x columns), blocks, dilation, reflect padding (rows, columns).
BRANCHES: dict[str, tuple[tuple[int, int], int, int, tuple[int, int]]] = {
    "center": ((1, 1), 2, 1, (0, 0)),
    "horizontal": ((1, 3), 1, 1, (0, 1)),
    "vertical": ((3, 1), 1, 1, (1, 0)),
    "corners": ((2, 2), 1, 2, (1, 1)),
}
_OFFICIAL = {
    "image_tokenizer.img_encoder.enc_center.": "encoder.center.",
    "image_tokenizer.img_encoder.enc_horiz.": "encoder.horizontal.",
    "image_tokenizer.img_encoder.enc_vert.": "encoder.vertical.",
    "image_tokenizer.img_encoder.enc_corners.": "encoder.corners.",
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
    of the batch, so with cameras the images of a batch influence one another.
    """

    name = "raysup"
    title = "RaysUp"
    paper = "Ding et al., RaysUp: Ultra-light Universal Feature Upsampling, ECCV 2026, arXiv 2606.22749"
    year = 2026
    licence = "Apache-2.0"
    trainable = True
    linear = True
    uses_camera = True
    weights = {
        "dinov2_vits14_focus": Weights(
            "raysup_dinov2_vits14_focus.safetensors",
            sha256="db55858d15751ea440166f572852dada2d6097073afcee40ef908cc4eaed32d4",
            licence="Apache-2.0; trained on research-only photos",
            backbone="dinov2_vits14_focus",
            notes="trained here on BSDS500 and Urban100; see the card beside the file",
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(self, channels: int = 384, *, dim: int = 256, kernel_size: int = 6) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features, a multiple of 4; no parameter depends on it.
            dim: Channels of queries and keys; each of the four branches, and so each head, has a quarter.
            kernel_size: Side of the window in features.
        """
        super().__init__(channels)
        if dim < HEADS * GROUPS or dim % (HEADS * GROUPS):
            raise UpbenchError(f"raysup: dim {dim} is not a multiple of {HEADS * GROUPS}")
        if kernel_size < 1:
            raise UpbenchError(f"raysup: kernel_size {kernel_size} is not positive")
        self.kernel_size = kernel_size
        self.encoder = GuidanceEncoder(dim // HEADS)

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

    def encode(
        self,
        image: Tensor,
        feature_size: tuple[int, int],
        output_size: tuple[int, int],
        camera: Camera | None,
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries `[B, dim, H, W]` and keys `[B, dim, h, w]`."""
        grids = (output_size, feature_size)
        rotations = [rotation(ray_directions(image, grid, camera), self.encoder.dim) for grid in grids]
        if image.device.type == "cpu":  # twice as fast there for small kernels
            image = image.contiguous(memory_format=torch.channels_last)
        halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        for branch in self.encoder.children():
            encoding = branch(image)  # pooled at once: the full encoding is never held
            for parts, grid, (cos, sin) in zip(halves, grids, rotations, strict=True):
                pooled = pool(encoding, grid)
                parts.extend(rotate(pooled, cos, sin))
        return torch.cat(halves[0], 1), torch.cat(halves[1], 1)

    def tables(self, feature_size: tuple[int, int], output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The low-resolution rows and columns that each output row and column sees."""
        rows, cols = (
            neighbourhood_table(size, cells, self.kernel_size)
            for size, cells in zip(output_size, feature_size, strict=True)
        )
        return rows, cols

    @classmethod
    def skip_reason(cls, setting: Setting) -> str | None:
        """Features whose channels cannot be split over the heads."""
        if setting.channels % HEADS:
            return f"raysup splits channels over {HEADS} heads; {setting.channels} cannot be"
        return None

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`dim`, from the first convolution."""
        stem = cls.convert_state(state).get("encoder.center.0.weight")
        return {} if stem is None or stem.ndim == 0 else {"dim": HEADS * int(stem.shape[0])}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`."""
        converted = {}
        for key, tensor in state.items():
            prefix = next((p for p in _OFFICIAL if key.startswith(p)), None)
            converted[key if prefix is None else _OFFICIAL[prefix] + key[len(prefix) :]] = tensor
        return converted


class GuidanceEncoder(nn.Module):
    """Four branches of different receptive fields; their outputs are the heads of queries and keys."""

    def __init__(self, dim: int = 64) -> None:
        """Args: dim: Channels of each branch."""
        super().__init__()
        self.dim = dim
        for name, shape in BRANCHES.items():
            branch = Branch(dim, *shape)
            _begin_as_interpolation(branch[-1].conv2)  # type: ignore[arg-type]
            self.add_module(name, branch)


@torch.no_grad()
def _begin_as_interpolation(last: nn.Conv2d) -> None:
    """Sets a branch's last bias: unlearned attention falls off with the angle between rays.

    Queries and keys are the same encoding, so what is constant in it turns into a kernel of the distance
    alone; the third and fourth frequency make it about one low-resolution cell wide, close to bilinear
    interpolation. Encodings too narrow for these frequencies are left with a bias of zero.
    """
    bias, half = last.bias, last.out_channels // 2
    assert bias is not None
    bias.zero_()
    for k in (2, 3):
        if 6 * k + 6 <= half:
            for first in (0, half):
                bias[first + 6 * k + 3 : first + 6 * k + 6] = 2.0
