"""Cached features: the right ones, from disk the second time, and never half or damaged ones."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

import upbench.features.store as features_module
from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.errors import UpbenchError
from upbench.features.backbones import load_backbone
from upbench.features.store import cached_features


class Toy(Dataset):
    """Random images; without a `name` in its body it is not registered."""

    def __init__(self, count: int = 5, version: str = "1", slow: float = 0.0) -> None:
        super().__init__()
        self.count, self.version, self.slow = count, version, slow
        self.loads: list[int] = []

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(self.count)]

    def load(self, split: str, index: int, size: int) -> Sample:
        self.loads.append(index)
        time.sleep(self.slow)
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, size, size, generator=generator)
        return Sample(f"{split}{index}", image, torch.ones(size, size, dtype=torch.bool))

    def fingerprint(self, split: str) -> str:
        return self.version


Toy.name = "toy"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("test_vit", pretrained=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def files(cache: Path) -> list[str]:
    """Files in the cache, temporary ones included."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def direct(backbone: Backbone, dataset: Toy, size: int) -> Tensor:
    images = torch.stack([dataset.load("train", i, size).image for i in range(dataset.count)])
    with torch.no_grad():
        return backbone(backbone.fit(images))


@pytest.mark.parametrize("size", [48, 40])  # 40 is brought to 32, a multiple of the stride
def test_values(backbone: Backbone, size: int):
    got = cached_features(backbone, Toy(), "train", size, batch_size=2)
    expected = direct(backbone, Toy(), size)
    assert got.features.dtype == torch.float32
    assert got.names == tuple(f"train{i}" for i in range(5))
    assert len(got) == 5
    torch.testing.assert_close(got.features, expected, rtol=1e-4, atol=1e-5)


def test_second_time_from_disk(backbone: Backbone):
    first = cached_features(backbone, Toy(), "train", 32)
    again = Toy()
    second = cached_features(backbone, again, "train", 32)
    assert again.loads == []
    assert torch.equal(first.features, second.features)


def test_features_are_mapped_not_read(backbone: Backbone):
    """What is written to the file shows up in the tensor: it is the file's own memory."""
    got = cached_features(backbone, Toy(), "train", 32)
    start = 8 + int.from_bytes(got.path.read_bytes()[:8], "little")
    with got.path.open("r+b") as file:
        file.seek(start)
        file.write(b"\0\0\0\0")
    assert got.features.view(-1)[0] == 0


@pytest.mark.parametrize("change", ["weights", "statistics", "images", "size", "split", "name", "timm"])
def test_everything_that_matters_is_in_the_key(
    backbone: Backbone, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
):
    cached_features(backbone, Toy(), "train", 32)
    other, dataset, split, size = load_backbone("test_vit", pretrained=False), Toy(), "train", 32
    if change == "weights":
        with torch.no_grad():
            next(other.parameters()).view(-1)[0] += 1
    elif change == "statistics":
        other.mean = (0.1, 0.2, 0.3)
    elif change == "images":
        dataset = Toy(version="2")
    elif change == "size":
        size = 33  # the same input size of the backbone, other images
    elif change == "split":
        split = "val"
    elif change == "name":
        dataset.name = "other"  # type: ignore[misc]
    else:
        monkeypatch.setattr(timm, "__version__", "0.0")
    cached_features(other, dataset, split, size)
    assert dataset.loads == [0, 1, 2, 3, 4]
    assert files(cache) == ["5.safetensors"] * 2


def test_a_limit_never_passes_for_the_whole(backbone: Backbone, cache: Path):
    few = cached_features(backbone, Toy(), "train", 32, limit=2)
    assert few.names == ("train0", "train1")
    assert files(cache) == ["2.safetensors"]
    whole = cached_features(backbone, Toy(), "train", 32)
    assert len(whole) == len(whole.features) == 5
    torch.testing.assert_close(whole.features[:2], few.features, rtol=1e-4, atol=1e-5)
    assert files(cache) == ["5.safetensors"]  # what it replaces is gone
    again = Toy()
    served = cached_features(backbone, again, "train", 32, limit=3)
    assert again.loads == []
    assert torch.equal(served.features, whole.features[:3])
    assert served.names == whole.names[:3]
    assert len(cached_features(backbone, again, "train", 32, limit=50)) == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "other images"])
def test_damaged_files_are_noticed_and_made_anew(
    backbone: Backbone, damage: str, capsys: pytest.CaptureFixture[str]
):
    good = cached_features(backbone, Toy(), "train", 32)
    path, expected = good.path, good.features.clone()
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-100]
    elif damage == "flipped":
        data[-5000] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "text":
        data = bytearray(b"not features")
    else:
        data = data.replace(b"train3", b"train7")
    path.unlink()
    path.write_bytes(data)
    again = Toy()
    got = cached_features(backbone, again, "train", 32)
    assert again.loads == [0, 1, 2, 3, 4]
    torch.testing.assert_close(got.features, expected)
    assert "are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(cache: Path, monkeypatch: pytest.MonkeyPatch, value: float):
    backbone = load_backbone("test_vit", pretrained=False)
    forward = backbone.model.forward_intermediates

    def poisoned(images: Tensor, **options: object) -> list[Tensor]:
        maps: list[Tensor] = forward(images, **options)
        if len(images) == 1:  # the last batch of 5 images by 2
            maps[-1][0, 3, 1, 1] = value
        return maps

    monkeypatch.setattr(backbone.model, "forward_intermediates", poisoned)
    with pytest.raises(
        UpbenchError, match="'test_vit' gives features that are not finite for image 'train4'"
    ):
        cached_features(backbone, Toy(), "train", 32, batch_size=2)
    assert files(cache) == []


def test_full_disk(backbone: Backbone, cache: Path):
    """The kernel refuses to write past the limit, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UpbenchError, match="disk full: cannot write") as info:
            cached_features(backbone, Toy(), "train", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(info.value)
    assert files(cache) == []


def test_error_while_reading_images_leaves_nothing(backbone: Backbone, cache: Path):
    class Broken(Toy):
        def load(self, split: str, index: int, size: int) -> Sample:
            raise UpbenchError("cannot read image x.png")

    with pytest.raises(UpbenchError, match=r"cannot read image x\.png"):
        cached_features(backbone, Broken(), "train", 32)
    assert files(cache) == []


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(backbone: Backbone, limit: int):
    with pytest.raises(UpbenchError, match="limit must be at least 1"):
        cached_features(backbone, Toy(), "train", 32, limit=limit)


def test_no_images(backbone: Backbone):
    with pytest.raises(UpbenchError, match="split 'train' of dataset 'toy' has no images"):
        cached_features(backbone, Toy(0), "train", 32)


def _work(slow: float) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone("test_vit", pretrained=False)
    cached_features(backbone, Toy(slow=slow), "train", 32, batch_size=1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_and_concurrent_processes(backbone: Backbone, cache: Path):
    """`kill -9` leaves no cache file; two processes at once leave one good one, and no temporary file."""
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=_work, args=(30.0,))
    victim.start()
    deadline = time.monotonic() + 60
    while not list(cache.rglob("*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert [name for name in files(cache) if name.endswith(".safetensors")] == []

    both = [context.Process(target=_work, args=(0.05,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
    assert [process.exitcode for process in both] == [0, 0]
    assert files(cache) == ["5.safetensors"]
    again = Toy()
    got = cached_features(backbone, again, "train", 32)
    assert again.loads == []
    torch.testing.assert_close(got.features, direct(backbone, Toy(), 32), rtol=1e-4, atol=1e-5)


def test_the_file_says_what_it_is(backbone: Backbone):
    got = cached_features(backbone, Toy(), "train", 32)
    with safe_open(got.path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["backbone"] == "test_vit"
    assert metadata["fingerprint"] == backbone.fingerprint
    assert metadata["dataset"] == "toy/train"
    assert features_module.VERSION >= 1
