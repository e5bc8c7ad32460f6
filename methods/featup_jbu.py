"""FeatUp's learned joint bilateral upsampler: four doublings, filtered with kernels made of the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.operator import Operator, SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.layers.convolutions import grid_of
from upbench.ops.chain import ChainOperator, LinearMap, resizing
from upbench.ops.reassemble import Padding, affinity
from upbench.ops.resample import to_size
from upbench.ops.window.doubling import DoublingMap, doubling

STAGES = ("up1", "up2", "up3", "up4")
RATIO = 2 ** len(STAGES)
RADIUS = 3
TAPS = (2 * RADIUS + 1) ** 2
_BUDGET = 64 * 2**20  # bytes of a few channels' dense map, which are upsampled at a time
_FOREIGN = ("model.", "downsampler.", "scale_net.")  # what else a checkpoint of the training holds
_RELEASES = "https://marhamilresearch4.blob.core.windows.net/feature-upsampling-public/pretrained"
_BACKBONES = {
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", 384),
    "dino16": ("vit_small_patch16_224.dino", 384),
    "vit": ("vit_small_patch16_224.augreg_in21k_ft_in1k", 384),
    "clip": ("vit_base_patch16_clip_224.openai", 512),
    "maskclip": ("vit_base_patch16_clip_224.openai", 512),
    "resnet50": ("resnet50.tv_in1k", 2048),
}


def _released(name: str, norm: bool) -> Weights:
    backbone, channels = _BACKBONES[name]
    folder = _RELEASES if norm else f"{_RELEASES}/no_norm"
    return Weights(
        f"{folder}/{name}_jbu_stack_cocostuff.ckpt",
        filename=f"featup_{name}{'_norm' if norm else ''}_jbu_stack_cocostuff.ckpt",
        license="MIT",
        backbone=backbone,
        channels=channels,
        notes=f"official release, COCO-Stuff, {'with' if norm else 'without'} channel norm",
    )


class FeatUpJBU(Upsampler):
    """FeatUp's stack of learned joint bilateral upsamplers (see `paper`), native.

    Four stages double the features; each interpolates them bicubically and gives every pixel a 7 x 7 kernel
    made of the image alone (`JBUStage`). Then x + 0.1 (W x + b) mixes channels, with the same W everywhere:
    as kernels treat all channels alike, W is applied to the low-resolution features first, which is the same
    and 256 times cheaper.

    The ratio is 16 whatever the image's size; other sizes are resized bilinearly from that
    (`upbench.ops.resample.to_size`). Interpolation and kernels are one operation
    (`upbench.ops.window.doubling`): neither the interpolated map nor its 49 shifted copies exist.

    Maps of a single row or column, too small to be reflected, repeat their border; the official code fails
    there. The image is averaged over the pixels of a grid as there (adaptive average pooling).
    """

    name = "featup_jbu"
    title = "FeatUp (JBU)"
    paper = (
        "Fu et al., FeatUp: A Model-Agnostic Framework for Features at Any Resolution, ICLR 2024, "
        "arXiv 2403.10516"
    )
    year = 2024
    license = "MIT"
    trainable = True
    native_ratio = RATIO
    weights = {
        "dinov2_vits14_focus": Weights.shipped(
            "featup_jbu", "19fa21b99d46c26523541f74d1aedf0c47b632ecbcbd3d8e782e3cb25664b221", channels=384
        ),
        **{name: _released(name, norm=False) for name in _BACKBONES},
        **{f"{name}_norm": _released(name, norm=True) for name in _BACKBONES if name != "maskclip"},
    }
    default_weights = "dinov2_vits14_focus"

    def __init__(self, channels: int = 384, *, dim: int = 32, norm: bool = False) -> None:
        """Builds the method with random weights.

        Args:
            channels: C of the features.
            dim: Channels that colours are compared in.
            norm: Whether the features go through a layer norm over channels first, as those that some of the
                official checkpoints were trained on; the output is then in that space.
        """
        super().__init__(channels)
        if dim < 1:
            raise UpbenchError(f"featup_jbu: dim {dim} is not positive")
        if norm:
            self.norm = nn.LayerNorm(channels)
        for stage in STAGES:
            self.add_module(stage, JBUStage(dim))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        mixed, shift = self._mix(features), self._shift()
        filters = ChainOperator(self._maps(image, grid_of(features)))
        height, width = filters.output_size
        step = max(1, _BUDGET // (len(mixed) * height * width * mixed.element_size()))
        parts = (
            to_size(filters(some.unsqueeze(1)), output_size) + bias
            for some, bias in zip(mixed.split(step, 1), shift.split(step), strict=True)
        )
        # Written in place, a graph that is exported with torch 2.9 runs without gradients only.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat(list(parts), 1)
        out = features.new_empty(*features.shape[:2], *output_size)
        for part, place in zip(parts, out.split(step, 1), strict=True):
            place.copy_(part)
        return out

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SourcedOperator:
        """The kernels of all stages, on features that W was applied to (see `Upsampler.operator`).

        0.1 b, which every pixel gets, is one more row of these features.
        """
        with torch.no_grad():
            mixed = self._mix(features)
            row = self._shift().expand(len(mixed), -1, 1, mixed.shape[3])
            maps = self._maps(image, grid_of(features))
        resize = resizing(maps[-1].output_size, output_size, features)
        return SourcedOperator(torch.cat([mixed, row], 2), _Shifted(ChainOperator(maps, resize)))

    def _mix(self, features: Tensor) -> Tensor:
        """x + 0.1 W x; the dropout is by whole channels, with which kernels commute as well."""
        if hasattr(self, "norm"):
            features = self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        dropped = self.fixup_proj[0](features)
        weight: Tensor = self.fixup_proj[1].weight  # type: ignore[assignment]
        return features + 0.1 * F.conv2d(dropped, weight)

    def _shift(self) -> Tensor:
        """`[C, 1, 1]` 0.1 b, which every pixel gets."""
        bias: Tensor = self.fixup_proj[1].bias  # type: ignore[assignment]
        return 0.1 * bias.view(-1, 1, 1)

    def _maps(self, image: Tensor, grid: tuple[int, int]) -> list[LinearMap]:
        """The stages for an image, which double features of this size."""
        maps: list[LinearMap] = []
        for name in STAGES:
            grid = (2 * grid[0], 2 * grid[1])
            maps.append(getattr(self, name)(F.adaptive_avg_pool2d(image, grid)))
        return maps

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """`channels`, `dim` and `norm`."""
        mix, compare = state.get("fixup_proj.1.weight"), state.get("up1.range_proj.0.weight")
        if mix is None or compare is None or not mix.ndim or not compare.ndim:
            return {}
        return {
            "channels": int(mix.shape[0]),
            "dim": int(compare.shape[0]),
            "norm": "norm.weight" in state,
        }

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Upsampler.convert_state`; of a checkpoint of the whole training only the upsampler is taken,
        and the norm of its features where it has one."""
        if not any(key.startswith("upsampler.") for key in state):
            return dict(state)
        converted = {}
        for key, tensor in state.items():
            if key.startswith("upsampler."):
                converted[key.removeprefix("upsampler.")] = tensor
            elif key.startswith("model.1.norm."):
                converted[key.removeprefix("model.1.")] = tensor
            elif not key.startswith(_FOREIGN):
                converted[key] = tensor  # left over: loading names it
        return converted


class JBUStage(nn.Module):
    """One doubling, with kernels of nearness in learned colours times a Gaussian in space, then corrected.

    State keys are the official ones.
    """

    def __init__(self, dim: int) -> None:
        """Args: dim: Channels that colours are compared in."""
        super().__init__()
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = _perceptron(3, dim)
        self.fixup_proj = _perceptron(TAPS + 3, TAPS)

    def forward(self, guidance: Tensor) -> DoublingMap:
        """The stage for an image: doubles a map and filters it.

        Args: guidance: `[B, 3, 2 h, 2 w]`, the image on the grid of the output.
        """
        height, width = grid_of(guidance)
        colours = self.range_proj(guidance)

        def kernels(rows: slice) -> Tensor:
            """Those of a strip, from the rows that its taps see; at the border they are reflected."""
            first, last = max(0, rows.start - RADIUS), min(height, rows.stop + RADIUS)
            own = slice(rows.start - first, rows.stop - first)
            return self.kernels(colours[:, :, first:last], guidance[:, :, rows], own)

        return doubling(kernels, (height // 2, width // 2), 2 * RADIUS + 1, guidance)

    def kernels(self, colours: Tensor, guidance: Tensor, rows: slice) -> Tensor:
        """Every pixel's kernel.

        Their range part is a softmax over taps of t p(neighbour) . p(centre), with p the projected colours
        and t = clamp(exp(range_temp), 1e-4, 1e4); distances of the spatial part run from -1 to 1 over a
        kernel, whatever its size. The product is normalised; a tenth of a projection of it and of the colour
        is added, not normalised anew: weights may be negative.

        Args:
            colours: `[B, dim, H, W]`, projected.
            guidance: `[B, 3, N, W]`, the colours of the rows that are asked for, not projected.
            rows: Which of the H rows those are.

        Returns:
            `[B, 49, N, W]` in the dtype of `guidance`.
        """
        padding: Padding = "reflect" if min(grid_of(colours)) > RADIUS else "replicate"
        logits = affinity(colours, colours, 2 * RADIUS + 1, padding=padding)[:, 0, :, rows]
        temperature = self.range_temp.to(logits.dtype).exp().clamp(1e-4, 1e4)
        near = torch.softmax(temperature * logits, 1) * self._spatial().to(logits.dtype)
        near = (near / near.sum(1, keepdim=True).clamp(min=1e-7)).to(guidance.dtype)
        fixed: Tensor = self.fixup_proj(torch.cat([near, guidance], 1))
        return near + 0.1 * fixed

    def _spatial(self) -> Tensor:
        """`[49, 1, 1]`, the Gaussian in space."""
        place = torch.linspace(-1, 1, 2 * RADIUS + 1, device=self.sigma_spatial.device)
        square = place.square()[:, None] + place.square()
        return torch.exp(-square / (2 * self.sigma_spatial.float() ** 2)).reshape(-1, 1, 1)


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """A perceptron of two layers at every pixel."""
    first, second = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 1)
    return nn.Sequential(first, nn.GELU(), nn.Dropout2d(0.1), second)


class _Shifted(Operator):
    """An operator on values with one more row, which is no part of the map: its first entry is added to every
    pixel."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.output_size = operator.output_size
        self.groups = operator.groups

    def __call__(self, values: Tensor) -> Tensor:
        """See `Operator`."""
        return self.operator(values[..., :-1, :]) + values[..., -1, 0].sum(1)[..., None, None]

    def crop(self, rows: slice, cols: slice) -> _Shifted:
        """See `Operator`."""
        return _Shifted(self.operator.crop(rows, cols))

    def to(self, *args: Any, **kwargs: Any) -> _Shifted:
        """See `Operator`."""
        return _Shifted(self.operator.to(*args, **kwargs))

    def nbytes(self) -> int:
        """See `Operator`."""
        return self.operator.nbytes()
