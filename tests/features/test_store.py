"""The feature store: the same features however they came to disk, of the right key, in little memory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from storing import Pictures, Tokens, Toy, check_all, direct, files, open_store, same_moments
from storing import own_cache as own_cache  # each test has one
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.features import shards as shards_module
from upbench.features import store as feature_store
from upbench.features.backbones import load_backbone
from upbench.features.shards import Shard, ShardWriter
from upbench.features.store import FeatureStore
from upbench.testing import assert_close

# Round trips


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("memory", [0, 1e9])
def test_round_trip(cache: Path, ragged: bool, memory: float):
    images = Pictures(ragged=ragged)
    store = open_store(images, memory=memory)
    store.prepare()
    assert images.read == list(range(10))  # each once, the first one too
    assert len(store) == 10
    assert store.names[3] == "picture ü 3"
    shards = ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    assert files(cache) == [*shards, "lock", "moments.safetensors", "store.json"]
    check_all(store, images)
    check_all(store, images)  # from memory, where they are kept
    again = open_store(other := Pictures(ragged=ragged), memory=memory)
    check_all(again, other)
    assert again.nbytes == store.nbytes == sum(direct(images, i).nbytes for i in range(10))
    assert [again.shape(i) for i in range(10)] == [tuple(direct(images, i).shape) for i in range(10)]


def test_second_run_computes_nothing():
    open_store().prepare()
    store = open_store(images := Pictures(), backbone := Toy())
    store.prepare()
    store.batch([0, 9, 4])
    store.moments()
    assert images.read == []
    assert backbone.batches == []


def test_batches():
    store = open_store(images := Pictures())
    expected = torch.stack([direct(images, i) for i in (7, 0, 3)])
    batch = store.batch([7, 0, 3])
    assert batch.dtype == torch.float32
    assert torch.equal(batch, expected)
    with pytest.raises(UpbenchError, match="no images"):
        store.batch([])
    for index in (-1, 10):
        with pytest.raises(IndexError):
            store.features(index)


@pytest.mark.parametrize("memory", [0, 1e9])
def test_what_is_given_is_the_callers_own(memory: float):
    store = open_store(images := Pictures(), memory=memory)
    for _ in range(2):
        store.features(2).zero_()
        store.batch([2, 3]).zero_()
        store.moments().sum.zero_()
        assert torch.equal(store.features(2), direct(images, 2))


def test_batches_of_several_sizes():
    store = open_store(images := Pictures(ragged=True), backbone := Toy(), batch_size=2)
    store.prepare()
    assert [batch[0] for batch in backbone.batches] == [2, 1, 1, 2, 2, 1, 1]  # shards and sizes cut them
    assert torch.equal(store.batch([0, 9, 1]), torch.stack([direct(images, i) for i in (0, 9, 1)]))
    with pytest.raises(
        UpbenchError, match=r"several sizes: 'picture ü 3' \[9, 2, 3\], 'picture ü 0' \[9, 2, 2\]"
    ):
        store.batch([0, 3])


def test_float16():
    store = open_store(images := Pictures(), dtype="float16")
    half = direct(images, 5).half()
    assert store.features(5).dtype == torch.float32
    assert torch.equal(store.features(5), half.float())
    assert store.nbytes == 10 * half.nbytes
    stored = [direct(images, i).half().double().flatten(1) for i in range(10)]
    assert_close(store.moments().sum, sum(x.sum(1) for x in stored))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("memory", [0, 1e9])
def test_class_tokens(dtype: str, memory: float):
    images = Pictures(ragged=True)
    open_store(Pictures(5, ragged=True), Tokens(), dtype=dtype, cls_token=True).prepare()
    store = open_store(images, Tokens(), dtype=dtype, cls_token=True, memory=memory)
    for index in (9, 0, 4, 4):
        expected = direct(images, index)
        kind = shards_module.DTYPES[dtype]
        assert torch.equal(store.token(index), expected.mean(dim=(1, 2)).to(kind).float())
        assert torch.equal(store.features(index), expected.to(kind).float())
    plain = open_store(images)
    assert plain.folder != store.folder
    with pytest.raises(UpbenchError, match="stored without class tokens"):
        plain.token(0)
    with pytest.raises(UpbenchError, match="'toy' gives no class token"):
        open_store(cls_token=True)


def test_others_can_read_the_files():
    store = open_store(images := Pictures(5), Tokens(), cls_token=True)
    store.prepare()
    with safe_open(store.folder / "00001.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["000004", "000004.token"]
        assert torch.equal(file.get_tensor("000004"), direct(images, 4))
        metadata = file.metadata()
    assert metadata["backbone"] == "toy"
    assert metadata["fingerprint"] == "toy-1"
    assert metadata["images"] == "toy"
    assert json.loads(metadata["names"]) == ["picture ü 4"]


def test_a_real_backbone():
    """One of timm's, in batches."""
    backbone = load_backbone("test_vit", pretrained=False)

    class Squares(Pictures):
        def image(self, index: int) -> Tensor:
            return torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(index))

    images = Squares(6)
    store = FeatureStore(backbone, images, batch_size=4)
    with torch.no_grad():
        expected = backbone(backbone.fit(torch.stack([images.image(i) for i in range(6)])))
    assert_close(store.batch(range(6)), expected)
    summed = store.moments()
    store._moments_path.unlink()
    assert same_moments(FeatureStore(backbone, images).moments(), summed)


@pytest.mark.parametrize("ragged", [False, True])
def test_limited_then_whole_then_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ragged: bool):
    once = {}
    for count in (2, 6, 11):
        monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / f"once{count}"))
        once[count] = open_store(Pictures(count, ragged=ragged)).moments()
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "grown"))
    for count, read in ((2, [0, 1]), (6, [2, 3, 4, 5]), (11, [6, 7, 8, 9, 10]), (6, []), (2, [])):
        store = open_store(images := Pictures(count, ragged=ragged))
        store.prepare()
        assert images.read == read
        assert len(store) == len(store.names) == count
        assert same_moments(store.moments(), once[count])
        check_all(store, Pictures(count, ragged=ragged))
        assert store.nbytes == sum(direct(images, i).nbytes for i in range(count))
        with pytest.raises(IndexError):
            store.features(count)
    assert files(store.folder)[:3] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


# Keys


@pytest.mark.parametrize(
    "change", ["version", "dtype", "backbone", "weights", "stride", "images", "token", "torch", "timm", "old"]
)
def test_what_belongs_to_another_key_is_not_read(change: str, monkeypatch: pytest.MonkeyPatch, cache: Path):
    first = open_store(backbone=Tokens())
    first.prepare()
    backbone, images, options = Tokens(), Pictures(), {}
    if change == "version":
        monkeypatch.setattr(feature_store, "VERSION", 99)
    elif change == "dtype":
        options["dtype"] = "float16"
    elif change == "backbone":
        backbone.name = "toy2"
    elif change == "weights":
        backbone.fingerprint = "toy-2"
    elif change == "stride":
        backbone.stride = 2
    elif change == "images":
        images.key = "other"
    elif change == "token":
        options["cls_token"] = True
    elif change == "old":  # a file of the first edition's cache, in the place of a shard
        (first.folder / "00001.safetensors").unlink()
        features = torch.stack([direct(images, i) for i in range(4, 8)])
        save_file({"features": features, "crc32": torch.zeros(4)}, first.folder / "00001.safetensors")
        monkeypatch.setattr(feature_store, "say", lambda text: None)
    else:
        monkeypatch.setattr({"torch": torch, "timm": timm}[change], "__version__", "0.0")
    second = open_store(images, backbone, **options)
    second.prepare()
    if change == "old":
        assert images.read == [4, 5, 6, 7]
    else:
        assert second.folder != first.folder
        assert images.read == list(range(10))


def test_a_shard_from_elsewhere_is_not_read(capsys: pytest.CaptureFixture[str]):
    one, other = open_store(), open_store(Pictures(key="other"), Toy(factor=2))
    one.prepare()
    other.prepare()
    path = one.folder / "00001.safetensors"
    path.write_bytes((other.folder / path.name).read_bytes())
    images = Pictures()
    check_all(open_store(images), Pictures())
    assert images.read == [4, 5, 6, 7]
    assert f"{path} is damaged" in capsys.readouterr().err


def test_names_must_agree(capsys: pytest.CaptureFixture[str]):
    open_store().prepare()

    class Renamed(Pictures):
        def name(self, index: int) -> str:
            return "other" if index == 5 else super().name(index)

    images = Renamed()
    open_store(images).prepare()
    assert images.read == [4, 5, 6, 7]
    assert "it holds other images" in capsys.readouterr().err


def test_the_size_of_shards_never_changes(monkeypatch: pytest.MonkeyPatch):
    open_store(Pictures(5)).prepare()
    monkeypatch.setattr(shards_module, "SHARD_IMAGES", 256)
    store = open_store(images := Pictures())
    store.prepare()
    assert images.read == [5, 6, 7, 8, 9]
    assert len([name for name in files(store.folder) if name.startswith("0")]) == 3
    (store.folder / "store.json").write_text("{")
    check_all(open_store(images), Pictures())


def test_layout_of_a_new_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards_module, "SHARD_IMAGES", 256)
    assert shards_module.Layout.of(384 * 16 * 16 * 4).per_shard == 256
    assert shards_module.Layout.of(1024 * 37 * 37 * 4).per_shard == 16
    assert shards_module.Layout.of(500_000_000).per_shard == 1


# Scale


class Large(Toy):
    """Features of half a megabyte."""

    name, channels, stride = "large", 8, 1

    def forward(self, image01: Tensor) -> Tensor:
        return torch.cat([image01, image01 + 1, image01[:, :2]], dim=1)


class LargePictures(Pictures):
    def image(self, index: int) -> Tensor:
        return torch.full((3, 128, 128), index / 1000)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_store(monkeypatch: pytest.MonkeyPatch):
    """300 MB of features, written and read with a few of memory."""
    monkeypatch.setattr(shards_module, "SHARD_IMAGES", 128)
    warm = FeatureStore(Large(), LargePictures(20, key="warm"), memory=0)
    warm.prepare()
    warm.features(3)
    before = resident()
    store = FeatureStore(Large(), LargePictures(600), memory=0)
    store.prepare()
    written = resident()
    assert store.nbytes > 300e6
    for index in range(600):
        assert float(store.features(index)[0, 0, 0]) == pytest.approx(index / 1000)
    store.moments()
    assert written - before < 60e6
    assert resident() - before < 60e6


def test_prepare_of_a_large_store_is_quick(monkeypatch: pytest.MonkeyPatch):
    """20,000 images: headers only, in well under a second. (The data are holes in the files.)"""
    monkeypatch.setattr(shards_module, "SHARD_IMAGES", 256)
    images = Pictures(20_000)
    store = open_store(images)
    shards_module.Layout(256, 432).save(store._layout_path, store._format)
    features = torch.zeros(9, 4, 3)
    for first in range(0, 20_000, 256):
        with (store.folder / f"{first // 256:05d}.safetensors").open("wb") as file:
            writer = ShardWriter(file, store._format, first, store.names[first : first + 256])
            for _ in store.names[first : first + 256]:
                writer.add(features)
            monkeypatch.setattr(os, "fsync", lambda _: None)
            writer.finish()
    monkeypatch.setattr(Shard, "read", lambda *_: pytest.fail("read features"))
    monkeypatch.setattr(Shard, "verify", lambda *_: pytest.fail("read a shard"))
    start = time.process_time()
    store = open_store(images)
    store.prepare()
    assert time.process_time() - start < 2  # 0.2 s on an idle machine
    assert images.read == []
    assert store.nbytes == 20_000 * 432
