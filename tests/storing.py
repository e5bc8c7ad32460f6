"""A small backbone, random pictures, their store and a cache of its own, for tests of the feature store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.features import shards as shards_module
from upbench.features.moments import Moments
from upbench.features.store import FeatureStore


class Toy(nn.Module):
    """Colours of 4x4 patches, their squares and their sines; channels come last in memory, as a ViT's do."""

    name, channels, stride, fingerprint = "toy", 9, 4, "toy-1"

    def __init__(self, factor: float = 1.0, poison: float | None = None) -> None:
        super().__init__()
        self.factor, self.poison, self.batches = factor, poison, []

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return max(4, height // 4 * 4), max(4, width // 4 * 4)

    def fit(self, image01: Tensor) -> Tensor:
        height, width = self.input_size(*image01.shape[-2:])
        return image01[..., :height, :width]

    def forward(self, image01: Tensor) -> Tensor:
        self.batches.append(tuple(image01.shape))
        mean = F.avg_pool2d(image01, 4) * self.factor
        features = torch.cat([mean, mean.square(), (9 * mean).sin()], dim=1)
        if self.poison is not None and len(image01) == 1:
            features[0, 3, 1, 1] = self.poison
        return features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class Tokens(Toy):
    """With a class token."""

    def with_token(self, image01: Tensor) -> tuple[Tensor, Tensor]:
        features = self(image01)
        return features, features.mean(dim=(2, 3))


class Pictures:
    """Random images of a split; remembers which were read."""

    title = "toy/train"

    def __init__(
        self,
        count: int = 10,
        *,
        ragged: bool = False,
        key: str = "toy",
        seconds: float = 0.0,
        log: Path | None = None,
    ) -> None:
        self.count, self.ragged, self.key, self.seconds, self.log = count, ragged, key, seconds, log
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"picture ü {index}"

    def image(self, index: int) -> Tensor:
        self.read.append(index)
        time.sleep(self.seconds)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{index}\n")
        return picture(index, self.ragged)


def picture(index: int, ragged: bool = False) -> Tensor:
    height, width = (8, 8 + 4 * (index // 3 % 3)) if ragged else (16, 12)
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(index))


@pytest.fixture(name="cache", autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and shards of four images, for every test of a module that imports it."""
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "SHARD_IMAGES", 4)
    return tmp_path / "cache" / "features"


def open_store(
    images: Pictures | None = None, backbone: Toy | None = None, **options: object
) -> FeatureStore:
    options = {"workers": 0, "batch_size": 3, **options}
    images = Pictures() if images is None else images
    return FeatureStore(backbone or Toy(), images, **options)  # type: ignore[arg-type]


def direct(images: Pictures, index: int) -> Tensor:
    backbone = Toy()
    return backbone(backbone.fit(picture(index, images.ragged)[None]))[0]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def same_moments(first: Moments, second: Moments) -> bool:
    """To the bit."""
    return (
        first.count == second.count
        and torch.equal(first.sum, second.sum)
        and torch.equal(first.outer, second.outer)
    )


def check_all(store: FeatureStore, images: Pictures) -> None:
    for index in range(len(images)):
        assert torch.equal(store.features(index), direct(images, index)), index
