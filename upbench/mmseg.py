"""`UpsampledBackbone`, for MMSegmentation: upsampled features of a frozen foundation model.

In a config of MMSegmentation:

    custom_imports = dict(imports=["upbench.mmseg"])
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor", bgr_to_rgb=True, size=(448, 448), pad_val=0, seg_pad_val=255,
            mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
        backbone=dict(
            type="UpsampledBackbone", backbone="vit_small_patch14_dinov2.lvd142m", method="raysup",
            stride=4),
        decode_head=dict(type="FCNHead", in_channels=384, in_index=0, channels=256, num_classes=150),
    )

A method of your own is known once its file is imported, too. It needs the extra `mmseg`
(`onedl-mmsegmentation`).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch
from torch import Tensor

from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD
from upbench.contracts.upsampler import extras
from upbench.errors import UpbenchError
from upbench.features.backbones import load_backbone
from upbench.weights.load import load_method

try:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints what else could be installed
        warnings.simplefilter("ignore")
        from mmengine.model import BaseModule
        from mmseg.registry import MODELS
except ImportError as error:
    raise UpbenchError("upbench.mmseg needs MMSegmentation: pip install 'upbench[mmseg]'") from error

MEAN = tuple(255 * value for value in IMAGENET_MEAN)
STD = tuple(255 * value for value in IMAGENET_STD)
"""What MMSegmentation's configs normalise with, as a rule."""


@MODELS.register_module()
class UpsampledBackbone(BaseModule):
    """Image in, one dense feature map out; heads take it with `in_index=0`.

    The foundation model stays frozen. So does the upsampler, unless it is to be trained with the head.

    Args:
        backbone: Name of the foundation model, as in `upbench list backbones`, or any timm model.
        method: Name of the upsampler, as in `upbench list methods`.
        weights: Of the upsampler ("default", "none", a name, a path).
        options: Options of the upsampler's constructor.
        stride: Pixels of the image per feature of the output, on both axes.
        train_method: Whether the upsampler is trained, too.
        mean, std: What the data preprocessor normalises with, in 0..255, so that it can be undone: backbone
            and upsampler normalise with statistics of their own.
        pretrained: False for a foundation model with random weights, for tests.
        init_cfg: Must be None: weights come from `backbone` and `weights`.

    Attributes:
        channels: C of the output, which `in_channels` of a head must be.

    Raises:
        UpbenchError: An unknown name, or weights that are not there; a stride below 1, an `init_cfg`.
    """

    def __init__(
        self,
        backbone: str,
        method: str = "raysup",
        weights: str = "default",
        options: Mapping[str, Any] | None = None,
        stride: int = 4,
        train_method: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        pretrained: bool = True,
        init_cfg: None = None,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise UpbenchError(
                "UpsampledBackbone takes no init_cfg: weights come from 'backbone' and 'weights'"
            )
        if stride < 1:
            raise UpbenchError(f"UpsampledBackbone: stride must be at least 1, got {stride}")
        self.foundation = load_backbone(backbone, pretrained=pretrained)
        self.upsampler = load_method(method, weights, backbone=self.foundation, **dict(options or {}))
        self.upsampler.requires_grad_(train_method)
        self.channels, self.stride, self.train_method = self.foundation.channels, stride, train_method
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) / 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) / 255, persistent=False)
        self.train()

    def init_weights(self) -> None:
        """Nothing: the weights are there. (MMEngine would initialise what has a method of that name anew.)"""

    def train(self, mode: bool = True) -> UpsampledBackbone:
        """As of any module; what is frozen stays in eval mode."""
        super().train(mode)
        self.upsampler.train(mode and self.train_method)
        return self

    def forward(self, inputs: Tensor) -> tuple[Tensor]:
        """Computes the features.

        Args:
            inputs: `[B, 3, H, W]` RGB, normalised by the data preprocessor.

        Returns:
            `[B, channels, ceil(H / stride), ceil(W / stride)]`, alone in a tuple.
        """
        image = (inputs * self.std + self.mean).clamp(0, 1)
        height, width = inputs.shape[-2:]
        size = -(-height // self.stride), -(-width // self.stride)
        with torch.no_grad():
            fitted = self.foundation.fit(image)
            features = self.foundation(fitted)
        given = extras(self.upsampler, backbone=self.foundation)
        with nullcontext() if self.train_method else torch.no_grad():
            return (self.upsampler(self.upsampler.normalize(fitted), features, size, **given),)
