"""Room for tensors that stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from upbench.features import arena
from upbench.features.arena import Arena


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (3, 5, 7), generator=generator, dtype=torch.uint8),
        torch.rand(5, 7, generator=generator) > 0.5,
        torch.randn(5, 7, generator=generator),
        torch.randn(2, 0, 7, generator=generator),
        torch.randn(3, generator=generator).half(),
    ]


@pytest.mark.parametrize("block", [1, 1000, 10**6])
def test_copies_are_equal_and_their_own(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(arena, "BLOCK", block)
    room, given = Arena(10**6), [tensors(seed) for seed in range(20)]
    copies = [room.keep(each) for each in given]
    for each in given:
        for tensor in each:
            tensor.zero_()
    for seed, kept in enumerate(copies):
        assert kept is not None
        for copy, expected in zip(kept, tensors(seed), strict=True):
            assert copy.dtype == expected.dtype
            assert torch.equal(copy, expected)


def test_they_lie_side_by_side_in_few_blocks() -> None:
    room = Arena(10**6)
    kept = [copy for seed in range(50) for copy in room.keep(tensors(seed)) or () if copy.numel()]
    assert len({copy.untyped_storage().data_ptr() for copy in kept}) == 1
    places = [copy.data_ptr() for copy in kept]
    assert places == sorted(set(places))
    assert all(after - before < 256 for before, after in itertools.pairwise(places))


def test_the_budget_holds_for_all_together() -> None:
    room = Arena(1000)
    assert room.keep([torch.zeros(200)]) is not None
    assert room.keep([torch.zeros(20), torch.zeros(40)]) is None  # all or none
    left = room.budget
    assert 0 < left < 200
    assert room.keep([torch.zeros(20)]) is not None
    assert room.budget < left
