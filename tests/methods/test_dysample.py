"""DySample against its definition, written out; points and their crops, cost, checkpoints."""

from __future__ import annotations

import itertools
from math import floor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.dysample import DySample, PointMap
from upbench.testing import assert_close
from upbench.testing.closeness import relative_error
from upbench.weights.load import load_method


def sample(x: Tensor, y: float, z: float) -> Tensor:
    """Bilinear sample of `[C, h, w]` with cells' centres at whole numbers; points are drawn to the border."""
    h, w = x.shape[1:]
    y, z = min(max(y, 0), h - 1), min(max(z, 0), w - 1)
    i, j = min(floor(y), h - 2), min(floor(z), w - 2)
    a, b = y - i, z - j
    top = (1 - b) * x[:, i, j] + b * x[:, i, j + 1]
    return (1 - a) * top + a * ((1 - b) * x[:, i + 1, j] + b * x[:, i + 1, j + 1])


def one_stage(state: dict[str, Tensor], x: Tensor, groups: int, style: str) -> Tensor:
    """Section 3 of the paper; group by group, pixel by pixel."""
    b, c, h, w = x.shape

    def predicted(name: str, n: int, i: int, j: int, axis: int, group: int) -> Tensor:
        """Of an output pixel; axis 0 is x, as in the official code."""
        weight, bias = state[f"{name}.weight"][:, :, 0, 0], state[f"{name}.bias"]
        phase = 2 * (i % 2) + j % 2
        if style == "lp":
            row = (axis * groups + group) * 4 + phase
            return weight[row] @ x[n, :, i // 2, j // 2] + bias[row]
        row = axis * groups + group
        return weight[row] @ x[n, phase::4, i // 2, j // 2] + bias[row]

    out = torch.zeros(b, c, 2 * h, 2 * w)
    for n, i, j, group in itertools.product(range(b), range(2 * h), range(2 * w), range(groups)):
        point = []
        for axis, place in ((1, i), (0, j)):
            offset = float(predicted("offset", n, i, j, axis, group))
            reach = 0.25
            if "scope.weight" in state:
                reach = 0.5 * float(predicted("scope", n, i, j, axis, group).sigmoid())
            point.append(place // 2 + (0.25 if place % 2 else -0.25) + reach * offset)
        part = slice(group * c // groups, (group + 1) * c // groups)
        out[n, part, i, j] = sample(x[n, part], *point)
    return out


def randomised(std: float = 1.0, **options: Any) -> DySample:
    method = DySample(channels=8, **options).eval()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=std)
    return method


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"style": "pl", "groups": 2},
        {"dynamic_scope": True, "groups": 1},
        {"style": "pl", "dynamic_scope": True},
        {"share_stages": False},
    ],
)
def test_against_loops(options: dict[str, Any]) -> None:
    method, features = randomised(**options), torch.randn(2, 8, 3, 4)
    expected = features
    for step in range(2):
        stage = method.stack.stages[0 if options.get("share_stages", True) else step]
        expected = one_stage(
            stage.state_dict(), expected, options.get("groups", 4), options.get("style", "lp")
        )
    with torch.no_grad():
        dense = method(torch.zeros(2, 3, 8, 8), features, (12, 16))
    assert_close(dense, expected)


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("dynamic_scope", [False, True])
def test_it_begins_as_bilinear_interpolation(style: str, dynamic_scope: bool) -> None:
    method = load_method("dysample", "none", channels=8, style=style, dynamic_scope=dynamic_scope)
    features = torch.randn(1, 8, 6, 7)
    dense = method(torch.zeros(1, 3, 8, 8), features, (12, 14))
    assert relative_error(dense, F.interpolate(features, (12, 14), mode="bilinear")) < 0.01


def test_crops_of_points_need_few_cells() -> None:
    offsets, values = torch.rand(2, 2, 3, 12, 14) * 3 - 1.5, torch.randn(2, 6, 6, 7)
    whole = PointMap(offsets, (6, 7))
    dense = whole(values)
    windows = [slice(0, 3), slice(5, 6), slice(7, 12), slice(0, 12)]
    for rows, cols in itertools.product(windows, windows):
        part, row_cells, col_cells = whole.crop(rows, cols)
        cells = values[..., row_cells, col_cells]
        assert_close(part(cells), dense[..., rows, cols])
        again, inner_rows, inner_cols = part.crop(slice(-1, None), slice(0, 1))
        inner = cells[..., inner_rows, inner_cols]
        assert_close(again(inner), dense[..., rows, cols][..., -1:, :1])
    assert whole.crop(slice(0, 1), slice(0, 1))[1].stop <= 3


def test_operator_of_groups_in_half_precision() -> None:
    method, features = randomised(0.1), torch.randn(1, 8, 5, 6)
    operator = method.operator(torch.zeros(1, 3, 8, 8), features, (70, 84))
    assert operator.groups == 4
    values = torch.randn(1, 4, 3, 5, 6)
    half = operator.to(torch.float16).to(torch.float32)
    assert (half(values) - operator(values)).abs().max() < 0.02


@pytest.mark.parametrize(("size", "steps"), [((24, 20), 2), ((48, 40), 3)])
@pytest.mark.parametrize("style", ["lp", "pl"])
def test_macs_equal_a_hand_count(size: tuple[int, int], steps: int, style: str) -> None:
    cells, channels, groups = 6 * 5, 12, 4
    expected = 0
    for _ in range(steps):
        offsets = channels * 8 * groups if style == "lp" else 4 * (channels // 4) * 2 * groups
        expected += cells * offsets + 4 * cells * 4 * channels
        cells *= 4
    method = DySample(channels, style=style, groups=groups)
    counted = count_macs(_Bound(method, size), torch.randn(1, 3, 28, 28), torch.randn(1, channels, 6, 5))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "pp"}, "unknown dysample: style 'pp'"),
        ({"groups": 5}, "384 channels cannot be split into 5 groups"),
        ({"style": "pl", "channels": 6, "groups": 2}, "multiple of 4 channels, got 6"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        DySample.build(**options)
