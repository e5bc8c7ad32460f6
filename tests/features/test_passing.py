"""Features that are computed each time are those that a store keeps, and who decides which."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from storing import Pictures, Tokens, Toy, files, same_moments
from storing import own_cache as own_cache  # each test has one

from upbench.errors import UpbenchError
from upbench.features import passing
from upbench.features.passing import PassingFeatures, choose
from upbench.features.store import FeatureStore


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_they_are_those_of_a_store(cache: Path, dtype: str) -> None:
    given = {"dtype": dtype, "cls_token": True, "workers": 0}
    store = FeatureStore(Tokens(), Pictures(), **given)
    passing_by = PassingFeatures(Tokens(), Pictures(), **given)
    assert passing_by.on_disk() == len(passing_by) == 10
    assert files(cache) == []
    for some in ([0], [3, 1, 4], [4, 4, 2]):
        assert torch.equal(passing_by.batch(some), store.batch(some))
        for index in some:
            assert torch.equal(passing_by.token(index), store.token(index))
            assert passing_by.shape(index) == store.shape(index)
    assert same_moments(passing_by.moments(), store.moments())
    assert passing_by.nbytes == 0


def test_a_batch_and_its_tokens_are_one_pass() -> None:
    backbone = Tokens()
    features = PassingFeatures(backbone, images := Pictures(), cls_token=True, workers=0)
    features.batch([5, 2])
    features.token(2)
    features.token(5)
    assert len(backbone.batches) == 1
    assert images.read == [5, 2]
    features.batch([7])
    features.batch([5])
    assert images.read == [5, 2, 7, 5], "nothing is kept but the last batch"


def test_what_is_not_there_is_refused() -> None:
    features = PassingFeatures(Toy(), Pictures(ragged=True), workers=0)
    with pytest.raises(UpbenchError, match="several sizes"):
        features.batch(list(range(10)))
    with pytest.raises(UpbenchError, match="without class tokens"):
        features.token(0)


@pytest.mark.parametrize(
    ("images", "device", "free", "memory", "stored", "words"),
    [
        (1464, "cpu", 10**12, 10**12, True, "stored (4.6 GB, plain and mirrored)"),
        (1464, "cuda", 10**12, 10**12, True, "one pass of the backbone for each variant"),
        (20210, "cpu", 10**12, 10**10, True, "stored (63.6 GB"),
        (20210, "cuda", 10**12, 10**10, False, "more than the machine's memory serves"),
        (97702, "cpu", 10**11, 10**12, False, "do not fit the disk's 99.0 GB"),
    ],
)
def test_disk_memory_and_device_decide(
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    device: str,
    free: int,
    memory: int,
    stored: bool,
    words: str,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(passing, "_memory", lambda: memory)
    choice = choose(images, (384, 32, 32), "float32", device, flips=True)
    assert choice.stored == stored
    assert words in choice.why
    half = choose(images, (384, 32, 32), "float16", device, flips=False)
    assert ("plain and" in half.why) is False
