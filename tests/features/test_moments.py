"""Moments of stored features: right, summed once, and those of what is on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from storing import Pictures, Toy, direct, open_store, same_moments
from storing import own_cache as own_cache  # each test has one

from upbench.features.moments import RunningMoments
from upbench.features.shards import Shard
from upbench.testing import assert_close


def test_moments_against_numpy():
    images = Pictures(ragged=True)
    vectors = np.concatenate(
        [direct(images, i).numpy().astype(np.float64).reshape(9, -1) for i in range(10)], 1
    )
    got = open_store(images).moments()
    assert got.count == vectors.shape[1]
    assert got.sum.dtype == got.outer.dtype == torch.float64
    assert_close(got.sum, vectors.sum(1))
    assert_close(got.outer, vectors @ vectors.T)
    assert_close(got.mean, vectors.mean(1))
    assert_close(got.covariance, np.cov(vectors, bias=True), terms=1e6)


def test_moments_read_no_features(monkeypatch: pytest.MonkeyPatch):
    open_store().prepare()
    monkeypatch.setattr(Shard, "read", lambda *_: pytest.fail("read features"))
    monkeypatch.setattr(Shard, "verify", lambda *_: pytest.fail("read a shard"))
    store = open_store()
    store.prepare()
    assert store.moments().count == 120
    assert [store.shape(i) for i in range(10)] == [(9, 4, 3)] * 10


def test_moments_of_a_prefix_are_read_once(monkeypatch: pytest.MonkeyPatch):
    open_store().prepare()
    store, reads, read = open_store(Pictures(6)), [], Shard.read
    monkeypatch.setattr(Shard, "read", lambda shard, *a: (reads.append(1), read(shard, *a))[1])
    first = store.moments()
    first.sum.zero_()  # each is its own
    again = store.moments()
    assert again.sum.any()
    assert torch.equal(again.outer, first.outer)
    assert len(reads) == 6


@pytest.mark.parametrize("damage", ["gone", "flipped", "text", "another store's"])
def test_damaged_moments_are_summed_again(damage: str):
    store = open_store()
    expected, path = store.moments(), store._moments_path
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)
    elif damage == "text":
        path.write_text("nothing")
    else:
        other = open_store(Pictures(key="other"))
        other.prepare()
        path.write_bytes(other._moments_path.read_bytes())
    good = RunningMoments.load(path, store._format.store, 9, torch.device("cpu"))
    assert good is None
    store = open_store(images := Pictures())
    assert same_moments(store.moments(), expected)
    assert images.read == []
    assert RunningMoments.load(path, store._format.store, 9, torch.device("cpu")) is not None


def test_moments_of_other_features_are_not_used():
    """A shard was computed again and came out otherwise: the sums are those of what is on disk."""
    store = open_store()
    store.moments()
    (store.folder / "00001.safetensors").unlink()
    changed = open_store(backbone=Toy(factor=0.5))
    changed.prepare()
    expected = sum(changed.features(i).double().sum(dim=(1, 2)) for i in range(10))
    assert_close(changed.moments().sum, expected)
    assert_close(open_store().moments().sum, expected)
