"""RaysUp: neighbourhood cross-attention guided by a spatially decoupled image encoder and by camera rays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.base import Camera, Setting, Upsampler
from upbench.errors import UpbenchError
from upbench.ops.window import WindowOperator, window_attention, window_operator
from upbench.ops.windows import neighbourhood_table
from upbench.weights import Weights

HEADS = 4  # one per branch of the encoder
GROUPS = 8
# Branch: kernel (rows x columns), dilation, reflect padding (rows, columns), blocks.
BRANCHES: dict[str, tuple[tuple[int, int], int, tuple[int, int], int]] = {
    "center": ((1, 1), 1, (0, 0), 2),
    "horizontal": ((1, 3), 1, (0, 1), 1),
    "vertical": ((3, 1), 1, (1, 0), 1),
    "corners": ((2, 2), 2, (1, 1), 1),
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
        queries, keys = self.encode(image, _size(features), output_size, camera)
        rows, cols = self.tables(_size(features), output_size)
        return window_attention(queries, keys, features, rows, cols, heads=HEADS)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> WindowOperator:
        """The attention weights, one group of channels per head (see `Upsampler.operator`)."""
        with torch.no_grad():
            queries, keys = self.encode(image, _size(features), output_size, camera)
        rows, cols = self.tables(_size(features), output_size)
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
                pooled = encoding if _size(encoding) == grid else F.adaptive_avg_pool2d(encoding, grid)
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
        for name, (kernel, dilation, padding, blocks) in BRANCHES.items():
            self.add_module(name, Branch(dim, kernel, dilation, padding, blocks))


class Branch(nn.Sequential):
    """The image `[B, 3, H, W]` to `[B, dim, H, W]`: a convolution, then blocks without residuals."""

    def __init__(
        self, dim: int, kernel: tuple[int, int], dilation: int, padding: tuple[int, int], blocks: int
    ) -> None:
        def conv(inputs: int) -> nn.Conv2d:
            if not any(padding):
                return nn.Conv2d(inputs, dim, kernel, dilation=dilation)
            return nn.Conv2d(inputs, dim, kernel, padding=padding, dilation=dilation, padding_mode="reflect")

        stages = [Block(conv(dim), conv(dim)) for _ in range(blocks)]
        super().__init__(conv(3), *stages)
        _begin_as_interpolation(stages[-1].conv2)


class Block(nn.Module):
    """GroupNorm - SiLU - convolution, twice."""

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, conv1.in_channels)
        self.conv1 = conv1
        self.norm2 = nn.GroupNorm(GROUPS, conv2.in_channels)
        self.conv2 = conv2

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` to the same shape."""
        inplace = not torch.is_grad_enabled()
        x = self.conv1(F.silu(self.norm1(x), inplace))
        x = self.conv2(F.silu(self.norm2(x), inplace))
        return x


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


def default_intrinsics(image: Tensor) -> Tensor:
    """`[B, 4]` fx = W, fy = H, cx = W / 2, cy = H / 2 of the image, for want of a camera."""
    height, width = _size(image)
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


def _size(x: Tensor) -> tuple[int, int]:
    return int(x.shape[-2]), int(x.shape[-1])
