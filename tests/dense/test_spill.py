"""What is kept of a split: in memory, in half precision, in files."""

from __future__ import annotations

import os
import time

import pytest
import torch

from upbench.contracts.operator import SourcedOperator
from upbench.dense import spill
from upbench.dense.spill import Store, size_of
from upbench.ops.resample import interpolation_operator
from upbench.system.cache import cache_dir

SIDE = 8
BYTES = 4 * SIDE * SIDE


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "DISK_RESERVE", 0)


def a_map(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def test_everything_fits_as_it_is():
    store = Store(3 * BYTES, 3)
    maps = [a_map(i) for i in range(3)]
    for i, one in enumerate(maps):
        assert store.offer(i, one) is one
    assert all(store.get(i) is one for i, one in enumerate(maps))
    assert (store.used, store.spilled) == (3 * BYTES, 0)
    assert 1 in store
    assert 5 not in store
    assert store.get(5) is None


def test_half_of_it_fits_in_half_precision():
    store = Store(3 * BYTES // 2, 3)
    for i in range(3):
        kept = store.offer(i, a_map(i))
        assert kept.dtype == torch.float16
        assert torch.equal(kept, a_map(i).half())
    assert (store.used, store.spilled) == (3 * BYTES // 2, 0)


@pytest.mark.parametrize("with_files", [True, False])
def test_what_is_beyond_goes_to_files_or_nowhere_in_the_same_precision(with_files):
    store = Store(BYTES // 2, 3, spill=with_files)
    for i in range(3):
        assert torch.equal(store.offer(i, a_map(i)), a_map(i).half())
    assert store.used == BYTES // 2
    assert store.spilled == (BYTES if with_files else 0)
    assert [i in store for i in range(3)] == [True, with_files, with_files]
    if with_files:
        assert torch.equal(store.get(2), a_map(2).half())
    assert list(cache_dir("scratch").iterdir()) == []


def test_operators_come_back_from_files_whole():
    low = torch.randn(1, 4, 5, 6)
    operator = interpolation_operator(low, (16, 17), "bilinear")
    for item in (operator, SourcedOperator(torch.randn(1, 4, 5, 6), operator)):
        kept = Store(0, 1).offer(0, item)
        values = item.takes(low).unsqueeze(1)
        rough = float((kept(values) - item(values)).abs().max())
        assert rough < 1e-3 * float(item(values).abs().max())
        assert size_of(kept) == size_of(item) // 2


def test_what_half_precision_cannot_hold_stays_as_it_is():
    large = 1e6 * a_map()
    assert Store(0, 1, spill=False).offer(0, large) is large


def test_a_disk_that_fills_up_ends_the_files(monkeypatch):
    store = Store(0, 3)
    store.offer(0, a_map())
    monkeypatch.setattr(spill, "DISK_RESERVE", 1 << 62)
    assert torch.equal(store.offer(1, a_map(1)), a_map(1).half())
    monkeypatch.setattr(spill, "DISK_RESERVE", 0)
    store.offer(2, a_map(2))  # not tried again
    assert [i in store for i in range(3)] == [True, False, False]


def test_files_that_a_killed_process_left_a_day_ago_are_removed():
    old, young = (cache_dir("scratch") / name for name in ("old.pt", "young.pt"))
    for path in (old, young):
        path.write_bytes(b"left")
    os.utime(old, (time.time() - 90_000,) * 2)
    Store(0, 1).offer(0, a_map())
    assert not old.exists()
    assert young.exists()
    young.unlink()
