"""CARAFE against its definition, written out; cost, checkpoints, what it begins with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.carafe import CARAFE
from upbench.ops.reassemble import reassemble
from upbench.testing import assert_close
from upbench.testing.closeness import allowed, relative_error
from upbench.weights.load import load_method


def at(x: Tensor, i: int, j: int) -> Tensor:
    """`[B, C]` of a place in `[B, C, h, w]`; zero outside."""
    inside = 0 <= i < x.shape[2] and 0 <= j < x.shape[3]
    return x[:, :, i, j] if inside else x.new_zeros(x.shape[:2])


def one_stage(state: dict[str, Tensor], x: Tensor, side: int) -> Tensor:
    """Section 3 of the paper: compressor, content encoder, normaliser, reassembly; pixel by pixel."""
    b, c, h, w = x.shape
    compress, encode = state["compress.weight"][:, :, 0, 0], state["encode.weight"]
    narrow = torch.stack([at(x, i, j) @ compress.T for i in range(h) for j in range(w)], 2)
    narrow = (narrow + state["compress.bias"][:, None]).view(b, -1, h, w)
    reach = encode.shape[-1] // 2
    out = torch.zeros(b, c, 2 * h, 2 * w)
    for i in range(2 * h):
        for j in range(2 * w):
            y, x_ = i // 2, j // 2
            logits = state["encode.bias"].expand(b, -1)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    logits = logits + at(narrow, y + dy, x_ + dx) @ encode[:, :, dy + reach, dx + reach].T
            own = logits[:, 2 * (i % 2) + j % 2 :: 4]  # the pixel shuffle
            weights = own.softmax(1)
            for tap in range(side * side):
                cell = at(x, y + tap // side - side // 2, x_ + tap % side - side // 2)
                out[:, :, i, j] += weights[:, tap, None] * cell
    return out


def randomised(**options: Any) -> CARAFE:
    method = CARAFE(channels=6, compressed=5, **options).eval()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.5)
    return method


@pytest.mark.parametrize(
    "options",
    [{}, {"up_kernel": 3, "encoder_kernel": 1}, {"share_stages": False}],
)
def test_against_loops(options: dict[str, Any]) -> None:
    method, features = randomised(**options), torch.randn(2, 6, 3, 4)
    expected = features
    for step in range(2):
        stage = method.stack.stages[0 if options.get("share_stages", True) else step]
        expected = one_stage(stage.state_dict(), expected, options.get("up_kernel", 5))
    with torch.no_grad():
        dense = method(torch.zeros(2, 3, 8, 8), features, (12, 16))
    assert_close(dense, expected)


def test_reassembly_against_mmcv() -> None:
    carafe = pytest.importorskip("mmcv.ops", reason="mmcv is not installed").carafe
    if not torch.cuda.is_available():
        pytest.skip("mmcv has no CARAFE for the CPU")
    values, kernels = torch.randn(2, 6, 7, 9).cuda(), torch.randn(2, 2, 25, 14, 18).softmax(2).cuda()
    expected = carafe(values, kernels.flatten(1, 2), 5, 2, 2)
    assert_close(reassemble(values, kernels, 2), expected)


def test_it_begins_close_to_bilinear_interpolation() -> None:
    method = load_method("carafe", "none", channels=32)
    image, features = torch.randn(1, 3, 32, 32), torch.randn(1, 32, 8, 8)
    dense = method(image, features, (32, 32))[..., 4:-4, 4:-4]
    bilinear = F.interpolate(features, (32, 32), mode="bilinear")[..., 4:-4, 4:-4]
    assert F.cosine_similarity(dense, bilinear, dim=1).mean() > 0.97


def test_the_border_is_darkened_unless_it_is_repeated() -> None:
    ones = torch.ones(1, 6, 5, 5)
    for padding, same in (("zeros", False), ("replicate", True), ("reflect", True)):
        dense = randomised(padding=padding)(torch.zeros(1, 3, 8, 8), ones, (10, 10))
        assert (relative_error(dense, torch.ones_like(dense)) <= allowed(torch.float32)) == same
        assert_close(dense[0, 0, 5, 5], torch.tensor(1.0))


@pytest.mark.parametrize(("share_stages", "count"), [(True, 1), (False, 4)])
def test_parameters_are_those_of_official_layers(share_stages: bool, count: int) -> None:
    """A compressor to 64 channels, and 3 x 3 convolutions to the 25 logits of four pixels."""
    method = CARAFE(channels=256, share_stages=share_stages)
    assert sum(p.numel() for p in method.parameters()) == count * (257 * 64 + (64 * 9 + 1) * 100)


@pytest.mark.parametrize(("size", "steps"), [((24, 20), 2), ((48, 40), 3), ((42, 35), 3)])
def test_macs_equal_a_hand_count(size: tuple[int, int], steps: int) -> None:
    cells, channels = 6 * 5, 12
    expected = 0
    for _ in range(steps):
        expected += cells * (channels * 64 + 9 * 64 * 100) + 4 * cells * 25 * channels
        cells *= 4
    if size == (42, 35):  # antialiased, two taps and a bit, rounded up, of an axis at a time
        expected += channels * (48 * 35 + 42 * 35) * 3
    counted = count_macs(
        _Bound(CARAFE(channels), size), torch.randn(1, 3, 28, 28), torch.randn(1, channels, 6, 5)
    )
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up_kernel": 4}, "up_kernel 4 is not odd"),
        ({"encoder_kernel": 0}, "encoder_kernel 0 is not odd"),
        ({"compressed": 0}, "compressed 0"),
        ({"padding": "zero"}, "did you mean 'zeros'"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        CARAFE.build(**options)
