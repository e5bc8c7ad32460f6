"""Extraction of features: bad ones and bad images are named, and workers change nothing."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from storing import Pictures, Toy, files, open_store
from storing import own_cache as own_cache  # each test has one
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.features import shards as shards_module
from upbench.system.ahead import ahead

# Bad features and bad images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_that_are_not_finite(value: float, dtype: str, cache: Path):
    """Batches of three in shards of four: the single ones are poisoned."""
    with pytest.raises(
        UpbenchError, match="'toy' gives features that are not finite for image 'picture ü 3' of toy/train"
    ):
        open_store(backbone=Toy(poison=value), dtype=dtype).prepare()
    assert not [name for name in files(cache) if name.endswith((".safetensors", ".tmp"))]


def test_too_large_for_float16():
    backbone = Toy(poison=1e5)
    with pytest.raises(UpbenchError, match=r"'toy' .* beyond 65504 for image 'picture ü 3'.*; use float32"):
        open_store(backbone=backbone, dtype="float16").prepare()
    assert open_store(backbone=backbone).features(3).max() == 1e5


def test_bad_arguments(cache: Path):
    with pytest.raises(UpbenchError, match=r"unknown dtype 'float61'; did you mean 'float16'\?"):
        open_store(dtype="float61")
    with pytest.raises(UpbenchError, match="toy/train has no images"):
        open_store(Pictures(0))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(
    "error",
    [UpbenchError("cannot read image 5.png"), ValueError("bad"), OSError(errno.EACCES, "Permission denied")],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_reader_come_as_they_are(workers: int, error: Exception, cache: Path):
    class Broken(Pictures):
        def image(self, index: int) -> Tensor:
            if index == 5:
                raise error
            return super().image(index)

    with pytest.raises(type(error)) as info:
        open_store(Broken(), workers=workers).prepare()
    assert info.value is error
    assert "5" in str(error) or isinstance(error, ValueError)
    assert [name for name in files(cache) if name.startswith(("0", "."))] == ["00000.safetensors"]
    store = open_store(images := Pictures())
    store.prepare()
    assert images.read == [4, 5, 6, 7, 8, 9]


def test_images_of_another_form():
    class Bytes(Pictures):
        def image(self, index: int) -> Tensor:
            return (super().image(index) * 255).to(torch.uint8)

    with pytest.raises(
        UpbenchError, match=r"'picture ü 0' of toy/train must be float32 \[3, h, w\], got torch.uint8"
    ):
        open_store(Bytes()).prepare()


# Workers and batches


@pytest.mark.parametrize("ragged", [False, True])
def test_results_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ragged: bool):
    found = []
    for workers in (0, 1, 3):
        monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / str(workers)))
        store = open_store(Pictures(23, ragged=ragged, seconds=0.002), backbone := Toy(), workers=workers)
        store.prepare()
        shards = [path.read_bytes() for path in sorted(store.folder.glob("*.safetensors"))]
        found.append((shards, backbone.batches, store.moments().outer.tolist()))
    assert found[0] == found[1] == found[2]


def test_reading_ahead_is_bounded():
    loaded = []

    def load(index: int) -> Tensor:
        loaded.append(index)
        return torch.tensor(index)

    images = ahead(load, range(100), workers=3, window=5)
    got = [int(next(images)) for _ in range(4)]
    time.sleep(0.1)
    assert got == [0, 1, 2, 3]
    assert len(loaded) <= 4 + 5
    images.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "upbench-images" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [int(image) for image in ahead(load, range(20), workers=3, window=1)] == list(range(20))


def test_no_synchronisation_per_image(monkeypatch: pytest.MonkeyPatch):
    """Copies to the CPU, truth values and `.item()` of features: a few a batch, however many images."""

    def syncs(size: int) -> int:
        calls: list[int] = []

        def counted(original: Callable) -> Callable:
            return lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]

        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "cpu", "tolist", "__int__", "__float__"):
                patch.setattr(Tensor, name, counted(getattr(Tensor, name)))
            patch.setattr(shards_module, "SHARD_IMAGES", 8)
            open_store(Pictures(8, key=str(size)), batch_size=size).prepare()
        return len(calls)

    assert syncs(2) - syncs(8) == 3 * 2  # three batches more: a check and a copy each
