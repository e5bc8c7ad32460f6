"""A backbone that is small enough for tests, of methods that run one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone


def tiny_backbone(channels: int = 16, stride: int = 4, grid: int = 8, depth: int = 1) -> Backbone:
    """A plain ViT with random weights, always the same; any C, any number of patches.

    Args:
        channels: C of its features.
        stride: Side of its patches in pixels.
        grid: Patches per side that its learned positions are for; on other grids they are interpolated.
        depth: How many blocks it has.
    """
    from timm.models.vision_transformer import VisionTransformer

    from upbench.contracts.backbone import Backbone, BackboneInfo

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = VisionTransformer(
            img_size=grid * stride,
            patch_size=stride,
            embed_dim=channels,
            depth=depth,
            num_heads=1,
            num_classes=0,
            dynamic_img_size=True,
        )
        for parameter in (model.pos_embed, model.cls_token):  # begin next to zero, which would hide faults
            torch.nn.init.normal_(parameter, std=0.5)  # type: ignore[arg-type]
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    return Backbone(model, BackboneInfo(f"tiny-vit-{channels}-{stride}", channels, stride, "random"))
