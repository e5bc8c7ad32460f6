"""NAF: neighbourhood attention filtering, guided by an image encoder of two branches and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.layers.convolutions import GROUPS, Branch, grid_of, pool
from upbench.layers.guidance import Guidance, pooled_in_blocks
from upbench.layers.rotary import axial_rotation, rotate, rotate_heads
from upbench.ops.window.attention import WindowOperator, window_attention, window_operator
from upbench.ops.window.tables import neighbourhood_tables
from upbench.ops.window.tiled import TiledWindows

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

HEADS = 4
Part = tuple[slice, slice]
BASE = 100.0  # of the periods of the positions
_MAX_REDUCTION = 4  # images beyond so many times the output are made smaller first
_OFFICIAL = {
    "image_encoder.encoder.": "encoder.pixel.",
    "image_encoder.sem_encoder.": "encoder.context.",
}
_PERIODS = "image_encoder.rope.periods"


class NAF(Upsampler):
    """NAF (see `paper`), native: no neighbourhood-attention package, no upsampled keys and values.

    Queries are the guidance encoding at the output size, turned by the position (RoPE); keys are the turned
    queries, pooled to the features. Each output pixel averages `kernel_size` x `kernel_size` features, as the
    official code's NATTEN call does (kernel 9, dilation = output // feature size).

    As in the official code, an image more than four times the output on either axis is first resized
    bilinearly to (min(H, 4 Ho, 4 Wo), min(W, 4 Wo, 4 Ho)): both axes, and the aspect ratio may change.

    Differences from it: feature maps (or outputs) smaller than the window get a window as large as they are,
    and outputs smaller than the features a dilation of 1 (it has no such bound), where the official code
    fails; positions are computed for each call, where it caches them by size alone; without weights,
    attention begins close to bilinear interpolation, from where training gets further in few steps.
    """

    name = "naf"
    title = "NAF"
    paper = (
        "Chambon et al., NAF: Zero-Shot Feature Upsampling via Neighborhood Attention Filtering, "
        "arXiv 2511.18452"
    )
    year = 2025
    license = "Apache-2.0"
    trainable = True
    channel_multiple = HEADS
    linear = True
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "naf", "06680f77ed4ec96df9233eab9d0283e17460bc1354e5bc8368e6dae3719c8c46"
        ),
        "release": Weights(
            "https://github.com/valeoai/NAF/releases/download/model/naf_release.pth",
            sha256="c096c1ab2217a5c3ac136365f721685e2201379cb69d509cfb0261183847c98f",
            size=2_664_431,
            license="Apache-2.0",
            notes="official release; for any backbone",
        ),
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(self, channels: int = 384, *, dim: int = 256, kernel_size: int = 9, blocks: int = 2) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features, a multiple of 4; no parameter depends on it.
            dim: Channels of queries and keys, half of them from each branch of the encoder.
            kernel_size: Side of the window in features.
            blocks: Blocks of two convolutions in each branch.
        """
        super().__init__(channels)
        if dim < 2 * HEADS * GROUPS or dim % (2 * HEADS * GROUPS):
            raise UpbenchError(f"naf: dim {dim} is not a multiple of {2 * HEADS * GROUPS}")
        for option, value in (("kernel_size", kernel_size), ("blocks", blocks)):
            if value < 1:
                raise UpbenchError(f"naf: {option} {value} is not positive")
        self.kernel_size = kernel_size
        self.head_dim = dim // HEADS
        self.encoder = nn.ModuleDict(
            {
                "pixel": Branch(dim // 2, (1, 1), blocks),
                "context": Branch(dim // 2, (3, 3), blocks, padding=(1, 1)),
            }
        )

        for branch in self.encoder.values():
            _begin_as_interpolation(branch, self.head_dim)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        queries, keys = self.encode(image, grid_of(features), output_size)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_attention(queries, keys, features, rows, cols, heads=HEADS)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> WindowOperator:
        """The attention weights, one group of channels per head (see `Upsampler.operator`)."""
        with torch.no_grad():
            queries, keys = self.encode(image, grid_of(features), output_size)
        rows, cols = self.tables(grid_of(features), output_size)
        return window_operator(queries, keys, rows, cols, heads=HEADS)

    def tile_operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
        *,
        memory_budget: int,
    ) -> TiledWindows:
        """The attention, computed for the crop that is asked for (see `Upsampler.tile_operator`)."""
        image = _limited(image, output_size)
        guidance = Guidance(list(self.encoder.values()), image, memory_budget)

        def queries(part: Part) -> Tensor:
            turn = axial_rotation(output_size, self.head_dim, image.device, part=part)
            return rotate_heads(guidance.pooled(output_size, part), self.head_dim, *turn)

        keys = pooled_in_blocks(lambda rows, cols: queries((rows, cols)), output_size, grid_of(features))
        rows, cols = self.tables(grid_of(features), output_size)
        return TiledWindows(queries, keys, rows, cols, heads=HEADS)

    def encode(
        self, image: Tensor, feature_size: tuple[int, int], output_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Turned queries `[B, dim, H, W]` and keys `[B, dim, h, w]`."""
        image = _limited(image, output_size)
        if image.device.type == "cpu":  # twice as fast there for small kernels
            image = image.contiguous(memory_format=torch.channels_last)
        cos, sin = axial_rotation(output_size, self.head_dim, image.device)
        parts: list[Tensor] = []
        for branch in self.encoder.values():
            encoding = pool(branch(image), output_size)
            for head in encoding.split(self.head_dim, 1):
                parts.extend(rotate(head, cos, sin))
        queries = torch.cat(parts, 1)
        return queries, pool(queries, feature_size)

    def tables(self, feature_size: tuple[int, int], output_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The low-resolution rows and columns that each output row and column sees."""
        return neighbourhood_tables(feature_size, output_size, self.kernel_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`dim` and `blocks`, from the branch of 1x1 convolutions."""
        stem = state.get("encoder.pixel.0.weight")
        if stem is None or stem.ndim == 0:
            return {}
        blocks = {key.split(".")[2] for key in state if key.startswith("encoder.pixel.")} - {"0"}
        return {"dim": 2 * int(stem.shape[0]), "blocks": max(1, len(blocks))}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`; the official table of periods is checked and left out."""
        converted = {}
        for key, tensor in state.items():
            if key == _PERIODS:
                expected = BASE ** (torch.arange(tensor.numel()) / tensor.numel())
                if not torch.allclose(tensor.float().flatten(), expected, rtol=1e-2):
                    raise ValueError(f"its rotary periods are not {BASE:g}^(m / {tensor.numel()})")
                continue
            prefix = next((p for p in _OFFICIAL if key.startswith(p)), None)
            converted[key if prefix is None else _OFFICIAL[prefix] + key[len(prefix) :]] = tensor
        return converted


@torch.no_grad()
def _begin_as_interpolation(branch: nn.Module, head_dim: int) -> None:
    """Sets a branch's last bias: unlearned attention falls off with the distance.

    What is constant in the encoding turns into a kernel of the distance alone. With the shortest eighth of
    the periods and this amplitude it is about one cell of a 16 x 16 map wide, for any number of channels.
    """
    count = head_dim // 4  # periods of an axis
    shortest = max(1, count // 8)
    bias: Tensor = branch[-1].conv2.bias.zero_()  # type: ignore[index]
    parts = bias.view(-1, 4, count)  # heads; the halves of a pair, for rows and for columns
    parts[:, :, :shortest] = 6 * (head_dim / 64) ** 0.25 * (2 / shortest) ** 0.5


def _limited(image: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The image, made smaller where it is more than four times the output."""
    height, width = grid_of(image)
    tall, wide = (_MAX_REDUCTION * size for size in output_size)
    if height <= tall and width <= wide:
        return image
    size = (min(height, tall, wide), min(width, tall, wide))
    return F.interpolate(image, size, mode="bilinear", align_corners=False)
