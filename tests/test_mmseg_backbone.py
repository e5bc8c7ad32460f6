"""`UpsampledBackbone`: a dense head of MMSegmentation trains on upsampled features."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniatures
import pytest
import torch

pytest.importorskip("mmengine", reason="extra 'mmseg' is not installed")

from upbench.errors import UpbenchError
from upbench.mmseg import UpsampledBackbone
from upbench.testing import assert_close

VIT = "vit_tiny_patch16_224"
CONFIG = """
custom_imports = dict(imports=['upbench.mmseg'])
default_scope = 'mmseg'
image, labels = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')
resize, pack = dict(type='Resize', scale=(64, 64)), dict(type='PackSegInputs')
dataset = dict(
    type='PascalVOCDataset', data_root='{root}/VOCdevkit/VOC2012',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, ann_file='ImageSets/Segmentation/train.txt',
        pipeline=[image, labels, resize, dict(type='RandomFlip', prob=0.5), pack]))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, ann_file='ImageSets/Segmentation/val.txt',
                 pipeline=[image, resize, labels, pack]))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor', size=(64, 64), bgr_to_rgb=True, pad_val=0, seg_pad_val=255,
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    backbone=dict(
        type='UpsampledBackbone', backbone='{vit}', pretrained=False, method='{method}', weights='none',
        stride=2, train_method={trained}),
    decode_head=dict(
        type='FCNHead', in_channels=192, in_index=0, channels=16, num_convs=1, concat_input=False,
        num_classes=21, norm_cfg=dict(type='BN'), align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=12)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
log_level = 'ERROR'
work_dir = '{root}/work'
randomness = dict(seed=0)
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    from mmengine.registry import DefaultScope

    before = logging.getLogger("mmengine").level
    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope("mmseg"):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("mmengine").setLevel(before)


def small(**options: Any) -> UpsampledBackbone:
    options = {"method": "bilinear", "pretrained": False, **options}
    return UpsampledBackbone(VIT, **options)


@pytest.mark.parametrize(("method", "trained"), [("bilinear", False), ("raysup", True)])
def test_a_head_trains(method: str, trained: bool, tmp_path: Path) -> None:
    from mmengine.config import Config
    from mmengine.runner import Runner

    miniatures.voc2012(tmp_path)
    text = CONFIG.format(root=tmp_path, vit=VIT, method=method, trained=trained)
    config = Config.fromstring(text, ".py")
    runner = Runner.from_cfg(config)
    model = runner.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses: list[float] = []
    step = model.train_step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        found = step(*args, **kwargs)
        losses.append(float(found["loss"]))
        return found

    model.train_step = recorded
    runner.train()
    assert len(losses) == 12
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4]), losses
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.startswith("decode_head") for name in changed)
    assert not any(name.startswith("backbone.foundation") for name in changed), "it is frozen"
    assert any(name.startswith("backbone.upsampler") for name in changed) == trained
    assert runner.test().keys() >= {"mIoU", "aAcc"}


def test_the_same_as_by_hand() -> None:
    """The data preprocessor's normalisation is undone: backbone and method have their own."""
    module = small(stride=4)
    image = torch.rand(2, 3, 64, 96)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    (found,) = module((255 * image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    assert found.shape == (2, 192, 16, 24)
    with torch.no_grad():
        expected = module.upsampler(module.upsampler.normalize(image), module.foundation(image), (16, 24))
    assert_close(found, expected, terms=768)


def test_any_size() -> None:
    """Sides that no patch divides: the foundation model's image is resized, the output is as asked for."""
    (found,) = small(stride=4)(torch.zeros(1, 3, 50, 70))
    assert found.shape == (1, 192, 13, 18)


def test_what_is_frozen_stays_so() -> None:
    module = small(method="raysup", weights="none", train_method=True)
    weight = next(module.foundation.parameters()).clone()
    module.train()
    module.init_weights()
    assert not module.foundation.training
    assert module.upsampler.training
    assert torch.equal(weight, next(module.foundation.parameters()))
    assert not any(parameter.requires_grad for parameter in module.foundation.parameters())
    assert not small(method="raysup", weights="none").train().upsampler.training


def test_the_page_shows_a_config_that_builds() -> None:
    from mmseg.registry import MODELS

    page = (Path(__file__).resolve().parents[1] / "docs/datasets.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    config: dict[str, Any] = {}
    exec(block, config)
    model = config["model"]
    model["backbone"] |= {"backbone": VIT, "pretrained": False, "weights": "none"}
    model["decode_head"] |= {"in_channels": 192}
    (found,) = MODELS.build(model).eval().extract_feat(torch.zeros(1, 3, 64, 64))
    assert found.shape == (1, 192, 16, 16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 0}, "stride must be at least 1"),
        ({"init_cfg": {"type": "Pretrained"}}, "takes no init_cfg"),
        ({"method": "bilinaer"}, "did you mean 'bilinear'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UpbenchError, match=words):
        small(**options)
