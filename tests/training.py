"""What tests of training train: a small method on a backbone that is one convolution, and three photos."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from upbench.contracts.upsampler import Upsampler
from upbench.train.loop import TrainConfig, ViewConfig

VIEWS = ViewConfig(view_size=32, guidance_size=16, crops_per_image=2, scales_per_view=2, precision="fp32")


class FakeBackbone(nn.Module):
    """Four features of 4x4 pixels: brightness, contrast and two edges, as a fixed convolution."""

    name = "fake"
    stride = 4

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.channels, self.fingerprint = channels, f"fake-{channels}"
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(channels, 3, 4, 4, generator=generator), requires_grad=False)
        self.calls = 0

    def forward(self, image01: Tensor) -> Tensor:
        self.calls += 1
        return F.conv2d(image01, self.weight, stride=4)


@pytest.fixture(scope="module")
def tiny_method() -> Iterator[str]:
    """A trainable method, registered for this file only: contract tests run over every registered one."""

    class Tiny(Upsampler):
        name = "tiny-trainable"
        trainable = True

        def __init__(self, channels: int = 4, *, broken: bool = False, width: int = 3) -> None:
            super().__init__(channels)
            self.guide = nn.Conv2d(3, channels, 1)
            self.smooth = nn.Conv2d(channels, channels, width, padding=width // 2)
            self.drop = nn.Dropout(0.1)
            self.broken = broken

        def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
            up = F.interpolate(features, output_size, mode="bilinear")
            guide = F.adaptive_avg_pool2d(self.guide(image), output_size)
            return up + self.smooth(self.drop(guide)) * (math.nan if self.broken else 1)

    yield Tiny.name
    del Upsampler.registered[Tiny.name]


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeBackbone:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    fake = FakeBackbone()
    monkeypatch.setattr("upbench.features.backbones.load_backbone", lambda name, device="cpu": fake)
    return fake


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        small = rng.integers(0, 256, (8, 10 + i, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60 + 7 * i, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(tiny_method: str, photos: Path, tmp_path: Path, backbone: FakeBackbone) -> TrainConfig:
    return TrainConfig(
        method=tiny_method,
        images=(str(photos),),
        out=str(tmp_path / "out" / "tiny.safetensors"),
        backbone=("fake",),
        steps=6,
        batch=2,
        views=VIEWS,
        warmup=2,
        lr=1e-2,
        log_every=2,
        device="cpu",
    )


def change(config: TrainConfig, **fields: object) -> TrainConfig:
    from dataclasses import replace

    return replace(config, **fields)
