"""Frozen backbones: an image in, the feature map of the last block out.

A backbone is any timm model by its timm name, or one of the models whose weights come inside a package
(`upbench.features.packaged`). Both go through the same `Backbone`, so that features mean the same
everywhere: the last block's output with the final norm applied where the model has one, class and register
tokens dropped.
"""

from __future__ import annotations

import inspect
import ssl
import sys
import urllib.error
import urllib.request
from typing import Any

import timm
import torch
from torch import nn

from upbench.contracts.backbone import Backbone, BackboneInfo
from upbench.errors import UpbenchError, nearest
from upbench.features.packaged import PACKAGED, Packaged


def load_backbone(name: str, device: str | torch.device = "cpu", pretrained: bool = True) -> Backbone:
    """Loads a frozen backbone.

    Args:
        name: A name from `upbench list backbones`, or any timm model, with or without a tag
            ("vit_base_patch14_dinov2.lvd142m"). timm's weights are downloaded and cached as timm does.
        device: Where to put it.
        pretrained: False for random weights (always the same), as tests of shapes and costs need.

    Raises:
        UpbenchError: Unknown name, a missing package, weights that cannot be downloaded or do not exist, or a
            model without a feature map.
    """
    packaged = PACKAGED.get(name)
    if packaged is not None:
        model = _packaged_model(packaged) if pretrained else _create(packaged.architecture, pretrained=False)
        source, license = f"package {packaged.package}", packaged.license
    else:
        _check_name(name)
        config = timm.models.get_pretrained_cfg(name)
        if pretrained:
            model = _download(name, config)
        else:
            model = _create(name, pretrained=False)
        source, license = _source(config), (config.license if config else None) or ""
    if not pretrained:
        source = "random"
    if not hasattr(model, "forward_intermediates"):
        raise UpbenchError(f"backbone '{name}' gives no feature map in timm {timm.__version__}")
    last: Any = model.feature_info[-1]  # type: ignore[index]
    info = BackboneInfo(name, int(last["num_chs"]), int(last["reduction"]), source, license)
    return Backbone(model, info).to(device)


def list_backbones() -> list[BackboneInfo]:
    """The backbones that are documented: those that come in packages, then a choice of timm's."""
    return [*_packaged_infos(), *RECOMMENDED]


def _packaged_model(packaged: Packaged) -> nn.Module:
    with torch.device("meta"):  # nothing to initialise: every tensor comes from the package
        model = _create(packaged.architecture, pretrained=False)
    packaged.fill(model)
    return model


def _packaged_infos() -> list[BackboneInfo]:
    sizes = {
        "dinov2_vits14_focus": (384, 14, "DINOv2 ViT-S/14, fine-tuned for saliency"),
        "efficientnet_lite0": (320, 32, "EfficientNet-Lite0, ImageNet-1k"),
    }
    return [
        BackboneInfo(
            name, sizes[name][0], sizes[name][1], _package_source(item), item.license, sizes[name][2]
        )
        for name, item in PACKAGED.items()
    ]


def _package_source(item: Packaged) -> str:
    return f"package {item.package}" + ("" if item.installed else " (not installed)")


def _check_name(name: str) -> None:
    architectures = timm.list_models()
    architecture, _, tag = name.partition(".")
    if architecture in architectures:
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        if not tag or name in known:
            return
        guess = nearest(name, known)
        hint = f"did you mean '{guess}'?" if guess else f"known: {', '.join(known) or architecture}"
        raise UpbenchError(f"unknown backbone '{name}'; {hint}")
    guess = nearest(name, [*PACKAGED, *architectures, *timm.list_pretrained()])
    hint = f"did you mean '{guess}'? " if guess else ""
    raise UpbenchError(f"unknown backbone '{name}'; {hint}see 'upbench list backbones', or any timm model")


def _source(config: Any) -> str:
    if config is None or not config.has_weights:
        return "timm"
    return f"timm, hf-hub:{config.hf_hub_id}" if config.hf_hub_id else f"timm, {config.url}"


def _create(name: str, pretrained: bool) -> nn.Module:
    """A timm model without a classifier that takes any image size where timm can do that."""
    entry = timm.models.model_entrypoint(timm.models.split_model_name_tag(name)[0])
    options: dict[str, Any] = {"num_classes": 0}
    if _resizes_positions(sys.modules[entry.__module__]):
        options["dynamic_img_size"] = True
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    return model


def _resizes_positions(module: Any) -> bool:
    """Whether the models of a timm module know the option `dynamic_img_size`."""
    classes = [
        item for item in vars(module).values() if inspect.isclass(item) and issubclass(item, nn.Module)
    ]
    return any("dynamic_img_size" in inspect.signature(cls.__init__).parameters for cls in classes)


def _download(name: str, config: Any) -> nn.Module:
    if config is None or not config.has_weights:
        raise UpbenchError(f"timm has no pretrained weights for backbone '{name}'")
    if config.hf_hub_id:
        _check_hub(name, config)
    try:
        return _create(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise _no_weights(name, config, error) from error


def _no_weights(name: str, config: Any, error: BaseException) -> UpbenchError:
    while isinstance(error, BaseException) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    reason = getattr(error, "reason", error)
    text = " ".join(str(reason).split())[:200] or type(error).__name__
    return UpbenchError(
        f"could not download the weights of backbone '{name}' ({_source(config)}): {text}; "
        f"{' and '.join(PACKAGED)} come in packages"
    )


def _check_hub(name: str, config: Any) -> None:
    """Fails at once where the hub cannot be reached; its own client tries for most of a minute."""
    import huggingface_hub
    from huggingface_hub import constants

    files = (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
    cached = (huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file) for file in files if file)
    if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in cached):
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "upbench"})
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answers
    except OSError as error:
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # the client has other certificates
            raise _no_weights(name, config, error) from error


_DINOV3 = "DINOv3 licence"
_HUB = "timm, hf-hub"

RECOMMENDED: tuple[BackboneInfo, ...] = tuple(
    BackboneInfo(name, channels, stride, _HUB, license, notes)
    for name, channels, stride, license, notes in (
        ("vit_small_patch14_dinov2.lvd142m", 384, 14, "Apache-2.0", "DINOv2 S"),
        ("vit_base_patch14_dinov2.lvd142m", 768, 14, "Apache-2.0", "DINOv2 B"),
        ("vit_large_patch14_dinov2.lvd142m", 1024, 14, "Apache-2.0", "DINOv2 L"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 384, 14, "Apache-2.0", "DINOv2 S with registers"),
        ("vit_base_patch14_reg4_dinov2.lvd142m", 768, 14, "Apache-2.0", "DINOv2 B with registers"),
        ("vit_large_patch14_reg4_dinov2.lvd142m", 1024, 14, "Apache-2.0", "DINOv2 L with registers"),
        ("vit_small_patch16_dinov3.lvd1689m", 384, 16, _DINOV3, "DINOv3 S"),
        ("vit_base_patch16_dinov3.lvd1689m", 768, 16, _DINOV3, "DINOv3 B"),
        ("vit_large_patch16_dinov3.lvd1689m", 1024, 16, _DINOV3, "DINOv3 L"),
        ("convnext_tiny.dinov3_lvd1689m", 768, 32, _DINOV3, "DINOv3 ConvNeXt-T"),
        ("vit_base_patch16_siglip_512.v2_webli", 768, 16, "Apache-2.0", "SigLIP 2 B"),
        ("vit_base_patch16_clip_224.openai", 768, 16, "MIT", "CLIP B"),
        ("vit_base_patch16_radio_v3.c_radio", 768, 16, "NVIDIA Open Model", "C-RADIO v3 B"),
        ("vit_base_patch16_224.mae", 768, 16, "CC-BY-NC-4.0", "MAE B"),
        ("vit_small_patch16_224.dino", 384, 16, "Apache-2.0", "DINO S"),
        ("vit_base_patch16_224.dino", 768, 16, "Apache-2.0", "DINO B"),
        ("resnet50.a1_in1k", 2048, 32, "Apache-2.0", "ResNet-50, ImageNet-1k"),
    )
)
"""A choice of timm's vision foundation models, and one plain CNN."""
