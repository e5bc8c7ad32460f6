"""LoftUp: a transformer over the pixels' coordinates and colours that reads the low-resolution features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError, unknown
from upbench.layers.attention import unpacked
from upbench.layers.convolutions import grid_of
from upbench.layers.waves import Waves, places
from upbench.ops.attention import global_attention

HEADS = 4
DEPTH = 2
COLOUR_RANGES = ("batch", "image")
_PIXEL_WAVES, _CELL_WAVES = 20, 5  # frequencies of pixels (row, column, colour) and of cells (row, column)
_POSITION = 2 * 2 * _CELL_WAVES  # channels appended to the features
_BUDGET = {"cpu": 32 * 2**20}  # bytes of the transformer's working memory
_BUDGET_ELSEWHERE = 1 << 30
_OFFICIAL = {
    "channelnorm.norm.": "feature_norm.",
    "upsampler.fourier_feat.1.": "pixel_waves.",
    "upsampler.lr_pe.": "cell_waves.",
    "upsampler.first_conv.0.norm.": "stem_norm.",
    "upsampler.first_conv.1.": "stem.0.",
    "upsampler.first_conv.2.": "stem.1.",
    "upsampler.first_conv.4.": "stem.3.",
    "upsampler.first_conv.5.": "stem.4.",
    "upsampler.ca_transformer.norm.": "norm.",
    "upsampler.ca_transformer.": "",
    ".0.norm_q.": ".query_norm.",
    ".0.norm_kv.": ".key_norm.",
    ".0.attention.out_proj.": ".output.",
    ".1.net.0.": ".mlp.0.",
    ".1.net.1.": ".mlp.1.",
    ".1.net.4.": ".mlp.3.",
    "upsampler.final_conv.0.": "head.",
    "upsampler.final_conv.1.": "output_norm.",
}
_PACKED = ".0.attention.in_proj_"


def _released(name: str, backbone: str, channels: int) -> Weights:
    return Weights(
        f"https://huggingface.co/haiwen/loftup-{name}/resolve/main/pytorch_model.bin",
        filename=f"loftup-{name}.bin",
        license="MIT",
        backbone=backbone,
        channels=channels,
        notes="official release",
    )


class LoftUp(Upsampler):
    """LoftUp (Huang et al., ICCV 2025) with the norm of the features that its checkpoints hold, native.

    Every pixel is described by sines and cosines of its coordinates and its colour; two convolutions and two
    layers of cross-attention to all low-resolution cells turn that into a feature. The widths depend on C, so
    that weights serve one backbone.

    The official output has the size of the image. For another one the image is resized (bilinear, not
    antialiased), as the official example advises: no output is resized, and there is no native ratio.

    As in the official code, on which its weights depend:

    * Colours are scaled by their range over the whole batch, so that images of a batch influence one another.
      `colour_range="image"` takes each image's own range; for a single image it is the same.
    * The waves' biases are read in another order than they are indexed: `[5, 20]` becomes `[20, 5]`
      without a transposition.

    Frequencies reach e^10, so that a colour or a coordinate that differs by one unit in the last place
    changes the output by up to 7e-3, and an image in half precision is another image. Coordinates are
    computed in float32 on the CPU, whatever the device and dtype.
    """

    name = "loftup"
    title = "LoftUp"
    paper = (
        "Huang et al., LoftUp: Learning a Coordinate-Based Feature Upsampler for Vision Foundation Models, "
        "ICCV 2025, arXiv 2504.14032"
    )
    year = 2025
    license = "MIT"
    trainable = True
    channel_multiple = HEADS
    precise_image = True
    weights = {
        "dinov2s": _released("dinov2s", "vit_small_patch14_dinov2.lvd142m", 384),
        "dinov2s_reg": _released("dinov2s_reg", "vit_small_patch14_reg4_dinov2.lvd142m", 384),
        "dinov2b": _released("dinov2b", "vit_base_patch14_dinov2.lvd142m", 768),
        "dinov2b_reg": _released("dinov2b_reg", "vit_base_patch14_reg4_dinov2.lvd142m", 768),
        "clip": _released("clip", "CLIP ViT-B/16 as in MaskCLIP", 512),
        "siglip": _released("siglip", "vit_base_patch16_siglip_224.webli", 768),
        "siglip2": _released("siglip2", "vit_base_patch16_siglip_224.v2_webli", 768),
    }

    def __init__(self, channels: int = 384, *, colour_range: str = "batch") -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features, a multiple of 4; nearly all widths depend on it.
            colour_range: What colours are scaled by: their range over the "batch" (official) or over each
                "image".
        """
        super().__init__(channels)
        if channels < HEADS or channels % HEADS:
            raise UpbenchError(f"loftup: {channels} channels are not a multiple of {HEADS}")
        if colour_range not in COLOUR_RANGES:
            raise unknown("colour range of loftup", colour_range, COLOUR_RANGES)
        self.colour_range = colour_range
        dim = channels + _POSITION
        self.feature_norm = nn.LayerNorm(channels)
        self.cell_waves = Waves(2, _CELL_WAVES)
        self.pixel_waves = Waves(5, _PIXEL_WAVES)
        inputs = 2 * 5 * _PIXEL_WAVES + 3
        self.stem_norm = nn.LayerNorm(inputs)
        self.stem = nn.Sequential(
            *(nn.Conv2d(inputs, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)),
            *(nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)),
        )
        self.layers = nn.ModuleList(Layer(dim, channels) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Conv2d(dim, channels, 1)
        self.output_norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        if grid_of(image) != tuple(output_size):
            image = F.interpolate(image, output_size, mode="bilinear", align_corners=False)
        pixels = self.encode(image)
        cells = self.describe(features)
        read = [layer.read(cells) for layer in self._layers()]
        if torch.is_grad_enabled() and (pixels.requires_grad or cells.requires_grad):
            return self.decode(pixels, read).to(features.dtype)  # autocast
        out = features.new_empty(int(features.shape[0]), self.channels, *output_size)
        for rows in _strips(pixels):
            out[:, :, rows] = self.decode(pixels[:, rows], read)
        return out

    def encode(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` to pixels `[B, H, W, C + 20]`."""
        precise = image.to(torch.promote_types(image.dtype, torch.float32))
        over = (0, 2, 3) if self.colour_range == "batch" else (2, 3)
        low, high = precise.amin(over, keepdim=True), precise.amax(over, keepdim=True)
        colour = ((precise - low) / (high - low).clamp(min=1e-4) - 0.5).permute(0, 2, 3, 1)
        place = places(grid_of(image), colour).expand(*colour.shape[:3], 2)
        waves = self.pixel_waves(torch.cat([place, colour], 3))
        inputs = torch.cat([waves, colour], 3).to(self.stem_norm.weight.dtype)
        encoded: Tensor = self.stem(self.stem_norm(inputs).permute(0, 3, 1, 2))
        return encoded.permute(0, 2, 3, 1)

    def describe(self, features: Tensor) -> Tensor:
        """`[B, C, h, w]` to cells `[B, h, w, C + 20]`: normalised, with their position beside."""
        normed: Tensor = self.feature_norm(features.permute(0, 2, 3, 1))
        place = self.cell_waves(places(grid_of(features), normed)).to(normed.dtype)
        return torch.cat([normed, place.expand(*normed.shape[:3], _POSITION)], 3)

    def decode(self, pixels: Tensor, read: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Pixels `[B, n, W, C + 20]`, and keys and values for each layer, to features `[B, C, n, W]`."""
        for layer, (keys, values) in zip(self._layers(), read, strict=True):
            pixels = layer(pixels, keys, values)
        dense = F.linear(self.norm(pixels), self.head.weight[:, :, 0, 0], self.head.bias)
        out: Tensor = self.output_norm(dense).permute(0, 3, 1, 2)
        return out

    def _layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`channels`, from the norm of the features."""
        norm = cls.convert_state(state).get("feature_norm.weight")
        return {} if norm is None or norm.ndim != 1 else {"channels": len(norm)}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`; the packed input projections are split into query, key and value."""
        converted = {}
        for key, tensor in state.items():
            packed = _PACKED in key
            for official, ours in _OFFICIAL.items():
                key = key.replace(official, ours)
            if packed:
                layer, kind = key.split(_PACKED)
                converted.update(unpacked(f"{layer}.", kind, tensor))
            else:
                converted[key] = tensor
        return converted


class Layer(nn.Module):
    """Cross-attention from pixels to cells and a perceptron, both with a residual and a norm before."""

    def __init__(self, dim: int, hidden: int) -> None:
        """Args: dim: Channels of pixels and cells; hidden: Width of the perceptron."""
        super().__init__()
        self.query_norm = nn.LayerNorm(dim)
        self.key_norm = nn.LayerNorm(dim)
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def read(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, dim, h, w]` of cells `[B, h, w, dim]`."""
        normed = self.key_norm(cells)
        return self.key(normed).movedim(3, 1), self.value(normed).movedim(3, 1)

    def forward(self, pixels: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Pixels `[B, n, W, dim]` to the same shape."""
        queries = self.query(self.query_norm(pixels)).movedim(3, 1)
        attended = global_attention(queries, keys, values, heads=HEADS)
        pixels = pixels + self.output(attended.movedim(1, 3))
        updated: Tensor = pixels + self.mlp(pixels)
        return updated


def _strips(pixels: Tensor) -> Iterator[slice]:
    """Rows of pixels whose layers' intermediate maps (about six at a time) stay near the budget."""
    b, height, width, dim = map(int, pixels.shape)
    per_row = 6 * b * width * dim * pixels.element_size()
    step = max(1, _BUDGET.get(pixels.device.type, _BUDGET_ELSEWHERE) // per_row)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))
