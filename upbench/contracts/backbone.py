"""The contract of a backbone: an image in, the feature map of the last block out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from upbench.contracts.image import normalize_image
from upbench.contracts.weights import weights_fingerprint
from upbench.errors import UpbenchError


@dataclass(frozen=True)
class BackboneInfo:
    """What a reader of a table wants to know about a backbone.

    Attributes:
        name: Name on the command line and in records.
        channels: C of its features.
        stride: Pixels per feature, on both axes.
        source: Where the weights come from: a package, a model hub, "random".
        license: Of the weights; "" where timm names none.
        notes: What it is, in a few words.
    """

    name: str
    channels: int
    stride: int
    source: str
    license: str = ""
    notes: str = ""
    licence: InitVar[str] = ""  # as the first edition spelt it

    def __post_init__(self, licence: str) -> None:
        if licence and not self.license:
            object.__setattr__(self, "license", licence)


BackboneInfo.licence = property(lambda self: self.license)  # type: ignore[attr-defined]


class Backbone(nn.Module):
    """A frozen model: always in eval mode, no gradient for its parameters.

    Attributes:
        name: Name on the command line and in records.
        channels: C of the features.
        stride: Pixels per feature; the sides of the input must be multiples of it.
        mean, std: Statistics that the image is normalised with.
        layers: How many blocks give features (`with_layers`).
        final_norm: Whether the model's last normalisation is applied to them.
        info: Source and license.
    """

    layers: int = 1
    final_norm: bool = True

    def __init__(self, model: nn.Module, info: BackboneInfo) -> None:
        """Args: model: A timm model with `forward_intermediates`; info: What it is."""
        super().__init__()
        config: Any = model.pretrained_cfg
        self.model: Any = model.requires_grad_(False)
        self.info = info
        self.name = info.name
        self.channels = info.channels
        self.stride = info.stride
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Does nothing: a frozen model inside a model in training must not start to drop or to count."""
        return super().train(False)

    def normalize(self, image01: Tensor) -> Tensor:
        """`[B, 3, H, W]` RGB in 0..1, normalised with this backbone's statistics."""
        return normalize_image(image01, self.mean, self.std)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to (height, width) whose sides are multiples of the stride."""
        s = self.stride
        return max(s, round(height / s) * s), max(s, round(width / s) * s)

    def fit(self, image01: Tensor) -> Tensor:
        """The image at `input_size` of its own size: unchanged if equal, else bicubic, antialiased."""
        height, width = image01.shape[-2:]
        return self.resized(image01, self.input_size(height, width))

    @staticmethod
    def resized(image01: Tensor, size: tuple[int, int]) -> Tensor:
        """`[B, 3, H, W]` in 0..1 at another size: unchanged if equal, else bicubic, antialiased."""
        if size == tuple(image01.shape[-2:]):
            return image01
        return F.interpolate(image01, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)

    @property
    def patch_size(self) -> int | None:
        """Side of the patches of a plain ViT: every feature is a token, and the model takes any grid of
        them. None for any other model (convolutional, hierarchical, of a fixed size)."""
        model = self.model
        if not isinstance(model, (VisionTransformer, Eva)) or not model.dynamic_img_size:
            return None
        embedding: Any = model.patch_embed
        plain = isinstance(embedding, timm.layers.PatchEmbed)
        return self.stride if plain and tuple(embedding.patch_size) == (self.stride, self.stride) else None

    def forward(self, image01: Tensor) -> Tensor:
        """Computes the features.

        Args:
            image01: `[B, 3, H, W]` RGB in 0..1; H and W are multiples of `stride` (`fit` makes them so).

        Returns:
            `[B, channels, H / stride, W / stride]`.

        Raises:
            UpbenchError: Another shape, sides that the stride does not divide, or that the model refuses.
        """
        features, _ = self._run(image01)
        return features

    def with_token(self, image01: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the class token of each image (`[B, C]`, after the final norm).

        Args: image01: As for `forward`.

        Raises:
            UpbenchError: As `forward`, or a model that has no class token.
        """
        if getattr(self.model, "cls_token", None) is None:
            raise UpbenchError(f"backbone '{self.name}' has no class token")
        features, prefix = self._run(image01, return_prefix_tokens=True)
        assert prefix is not None
        return features, prefix[:, 0]

    def _run(self, image01: Tensor, **more: Any) -> tuple[Tensor, Tensor | None]:
        """The features, and the tokens before the patches where these are asked for."""
        if image01.ndim != 4 or image01.shape[1] != 3 or not image01.is_floating_point():
            raise UpbenchError(
                f"backbone '{self.name}' takes floats [B, 3, H, W] in 0..1, "
                f"got {image01.dtype} {list(image01.shape)}"
            )
        height, width = image01.shape[-2:]
        if height % self.stride or width % self.stride or not height or not width:
            near = "x".join(str(side) for side in self.input_size(height, width))
            raise UpbenchError(
                f"backbone '{self.name}' needs sides that {self.stride} divides, got {height}x{width}; "
                f"the nearest is {near}"
            )
        which: Any = 1 if self.layers == 1 else self._blocks()
        options = {"indices": which, "norm": self.final_norm, "output_fmt": "NCHW", **more}
        options["intermediates_only"] = True
        try:
            maps = self.model.forward_intermediates(self.normalize(image01), **options)
        except (AssertionError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            text = " ".join(str(error).split())[:200]
            raise UpbenchError(
                f"backbone '{self.name}' refuses images of {height}x{width}: {text}"
            ) from error
        maps = maps if more else [(one, None) for one in maps]
        features, prefix = maps[-1]
        if self.layers > 1:
            features = torch.cat([one for one, _ in maps], 1)
            prefix = torch.cat([one for _, one in maps], -1) if more else None
        expected = (image01.shape[0], self.channels, height // self.stride, width // self.stride)
        if tuple(features.shape) != expected:
            raise UpbenchError(
                f"backbone '{self.name}' gave features {list(features.shape)}, expected {list(expected)}"
            )
        return features, prefix

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> Backbone:
        """The same model, whose images are normalised with other statistics; the weights are shared."""
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)  # it depends on the statistics
        other.mean, other.std = tuple(mean), tuple(std)
        return other

    def with_layers(self, count: int, final_norm: bool = True) -> Backbone:
        """The same model, whose features are those of several blocks: `[B, count * channels, h, w]`, the
        earliest block's first; class tokens likewise. The weights are shared.

        Args:
            count: How many blocks, evenly spaced; the last is always among them.
            final_norm: Whether the model's last normalisation is applied.

        Raises:
            UpbenchError: The model has not so many blocks of one size.
        """
        if (count, final_norm) == (self.layers, self.final_norm):
            return self
        if count > max(1, len(getattr(self.model, "blocks", ()))):
            raise UpbenchError(
                f"backbone '{self.name}' has no {count} blocks of one size to take features of"
            )
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        other.layers, other.final_norm = count, final_norm
        other.channels = count * self.info.channels
        return other

    def _blocks(self) -> list[int]:
        """Which blocks give features: of twelve, four are the third, sixth, ninth and twelfth."""
        total = len(self.model.blocks)
        return [(number + 1) * total // self.layers - 1 for number in range(self.layers)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, of how the image is normalised and of which features are given; caches of
        features are keyed by it."""
        about = {"mean": torch.tensor(self.mean), "std": torch.tensor(self.std)}
        if (self.layers, self.final_norm) != (1, True):
            about["features"] = torch.tensor([self.layers, int(self.final_norm)])
        return weights_fingerprint({**self.model.state_dict(), **about})
