"""Windowed attention: against a plain gather, as an operator, and its tables against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from windowing import problems

from upbench.errors import UpbenchError
from upbench.ops.operator import project
from upbench.ops.window import attention
from upbench.ops.window.attention import QueryRows, WindowOperator, window_attention, window_operator
from upbench.ops.window.tables import (
    fraction_table,
    nearest_exact,
    neighbourhood,
    neighbourhood_table,
    tiling,
)
from upbench.testing import assert_close

fuzz = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")


@fuzz
@given(problems(), st.sampled_from([None, 1, 20_000]))
def test_torch_backend_equals_a_plain_gather(problem: dict[str, Any], budget: int | None) -> None:
    result = window_attention(**problem, backend="torch", memory_budget=budget)
    expected = window_attention(**problem, backend="reference")
    assert result.is_contiguous()
    assert_close(result, expected)


class Stored(QueryRows):
    """Queries that are there already, handed out in strips."""

    def __init__(self, q: Tensor, heads: int) -> None:
        b, channels, height, width = q.shape
        super().__init__((b, channels, height, width), heads, q.dtype, q.device)
        self.q = q

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        b, heads, r, n, t, m, d = out.shape
        assert r * n == stop - start
        strip = self.q[:, :, start:stop].reshape(b, heads, d, r, n, t, m)
        out.copy_(strip.permute(0, 1, 3, 4, 5, 6, 2))


@fuzz
@given(problems(), st.booleans(), st.sampled_from([None, 1, 20_000]))
def test_queries_that_come_in_strips(problem: dict[str, Any], whole: bool, budget: int | None) -> None:
    """As tiles where they fit the tiling, as rows where tiles stand out or heads are counted otherwise."""
    rows = Stored(problem["q"], 1 if whole else problem["heads"])
    expected = window_attention(**problem, backend="torch")
    for backend in ("torch", "reference"):
        result = window_attention(**{**problem, "q": rows}, backend=backend, memory_budget=budget)
        assert_close(result, expected)
    operator = _operator({**problem, "q": rows})
    assert_close(operator.weights, _operator(problem).weights)


@fuzz
@given(problems())
def test_gradients_equal_those_of_a_plain_gather(problem: dict[str, Any]) -> None:
    inputs = [problem[name].requires_grad_() for name in ("q", "k", "v")]
    outputs = [window_attention(**problem, backend=backend) for backend in ("torch", "reference")]
    weight = torch.randn_like(outputs[0])
    ours, plain = (torch.autograd.grad(out, inputs, weight) for out in outputs)
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b)


def _operator(problem: dict[str, Any]) -> WindowOperator:
    return window_operator(**{name: value for name, value in problem.items() if name != "v"})


@fuzz
@given(problems(), st.integers(1, 5), st.data())
def test_a_probe_commutes_with_the_operator(
    problem: dict[str, Any], classes: int, data: st.DataObject
) -> None:
    """Projected first, then upsampled: same values and same gradient of the probe; a crop is a slice."""
    operator = _operator(problem)
    height, width = problem["q"].shape[2:]
    weight = torch.randn(classes, problem["v"].shape[1], dtype=torch.float64, requires_grad=True)
    dense = F.conv2d(window_attention(**problem), weight[:, :, None, None])
    values = project(weight, problem["v"], operator.groups)
    upsampled = operator(values)
    assert_close(upsampled, dense)

    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows = slice(top, data.draw(st.integers(top + 1, height)))
    cols = slice(left, data.draw(st.integers(left + 1, width)))
    crop = operator.crop(rows, cols)
    assert crop.output_size == (rows.stop - rows.start, cols.stop - cols.start)
    assert_close(crop(values), dense[:, :, rows, cols], scale=dense)
    inner = crop.crop(slice(0, 1), slice(crop.output_size[1] - 1, None))
    last = slice(cols.stop - 1, cols.stop)
    assert_close(inner(values), dense[:, :, rows, cols][:, :, :1, -1:], scale=dense)
    assert_close(inner(values), dense[:, :, top : top + 1, last], scale=dense)

    out = torch.randn_like(crop(values))
    (ours,) = torch.autograd.grad(crop(values), weight, out)
    (plain,) = torch.autograd.grad(dense[:, :, rows, cols], weight, out)
    assert_close(ours, plain, scale=dense)


def _example(dtype: torch.dtype = torch.float32, average: bool = False) -> dict[str, Any]:
    table = fraction_table if average else neighbourhood_table
    window = 0.1 if average else 6
    return {
        "q": torch.randn(1, 16, 28, 40, dtype=dtype),
        "k": torch.randn(1, 16, 7, 9, dtype=dtype),
        "v": torch.randn(1, 8, 7, 9, dtype=dtype),
        "rows": table(28, 7, window),
        "cols": table(40, 9, window),
        "heads": 4,
        "average_heads": average,
    }


def test_half_precision_operator_is_half_as_large_and_close() -> None:
    problem = _example()
    operator = _operator(problem)
    half = operator.to(dtype=torch.float16)
    assert 2 * half.nbytes() == operator.nbytes() == operator.weights.numel() * 4
    values = torch.randn(1, 4, 3, 7, 9)
    result = half(values)
    assert result.dtype == torch.float32
    assert_close(result, operator(values), terms=1, dtype=torch.float16)


def test_a_crop_shares_memory_with_the_whole() -> None:
    operator = _operator(_example())
    crop = operator.crop(slice(5, 20), slice(3, 30))
    assert crop.weights.untyped_storage().data_ptr() == operator.weights.untyped_storage().data_ptr()
    assert crop.nbytes() < operator.nbytes()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, average: bool) -> None:
    problem = _example(average=average)
    expected = window_attention(**problem).double()
    low = {n: v.to(dtype) if n in "qkv" else v for n, v in problem.items()}
    result = window_attention(**low)
    assert result.dtype == dtype
    assert_close(result, expected, terms=1)


def test_mixed_precision_keeps_the_dtype_of_the_values() -> None:
    problem = _example()
    problem["q"], problem["k"] = problem["q"].bfloat16(), problem["k"].bfloat16()
    assert window_attention(**problem).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem["v"].requires_grad_()
        assert window_attention(**problem).dtype == torch.float32


def test_constant_values_stay_constant() -> None:
    problem = _example(average=True)
    problem["v"] = torch.full_like(problem["v"], 2.5)
    assert_close(window_attention(**problem), torch.full((1, 8, 28, 40), 2.5))


def test_tables_cached_under_inference_mode_serve_training() -> None:
    problem = _example(average=True)
    with torch.inference_mode():
        window_attention(**problem)
    problem["q"].requires_grad_()
    window_attention(**problem).sum().backward()
    assert problem["q"].grad is not None


def _interval(size: int, kernel: int, dilation: int, i: int) -> list[int]:
    """NATTEN's neighbours of position i, from its definition by groups."""
    group = [j for j in range(size) if j % dilation == i % dilation]
    place = group.index(i)
    start = place - kernel // 2
    start = min(max(start, 0), len(group) - kernel)
    return group[start : start + kernel]


@fuzz
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8))
def test_neighbourhood_definition(size: int, kernel: int, dilation: int) -> None:
    if dilation > size:
        with pytest.raises(UpbenchError, match="dilation"):
            neighbourhood(size, kernel, dilation)
        return
    table = neighbourhood(size, kernel, dilation)
    shorter = min(kernel, size // dilation)
    assert table.tolist() == [_interval(size, shorter, dilation, i) for i in range(size)]


def test_nearest_exact_is_the_librarys_but_for_ties() -> None:
    """The library's own kernels disagree at ties; elsewhere they are one."""
    ties = 0
    for size in range(1, 70):
        for cells in range(1, 40):
            place = torch.arange(cells, dtype=torch.float32).view(1, 1, 1, -1)
            expected = F.interpolate(place, (1, size), mode="nearest-exact").view(-1).numpy()
            other = np.flatnonzero(nearest_exact(size, cells) != expected)
            assert ((2 * other + 1) * cells % (2 * size) == 0).all(), (size, cells)
            ties += len(other)
    assert ties < 50


def test_nearest_exact_rounds_in_float32() -> None:
    """Position 18 of 37 over 6 cells is 3 exactly; the float32 product falls below it, here and there."""
    place = torch.arange(6.0).view(1, 1, 1, -1).expand(1, 8, 2, 6).contiguous()
    assert F.interpolate(place, (2, 37), mode="nearest-exact")[0, 0, 0, 18] == 2
    assert nearest_exact(37, 6)[18] == 2


def test_fraction_table_rounds_in_float32() -> None:
    """The same cells as float32 tensor arithmetic, and others than float64 would give."""
    differs = False
    for size, cells in [(40, 16), (30, 12), (448, 32), (50, 9), (60, 30), (7, 20)]:
        table = fraction_table(size, cells, 0.1)
        bounds = []
        for dtype in (torch.float32, torch.float64):
            place = (torch.arange(size, dtype=dtype) + 0.5) / size
            low = ((place - 0.1).clamp(0, 1) * cells).floor().long()
            high = ((place + 0.1).clamp(0, 1) * cells).ceil().long()
            bounds.append([list(range(a, b)) for a, b in zip(low.tolist(), high.tolist(), strict=True)])
        assert [[c for c in row if c >= 0] for row in table.tolist()] == bounds[0]
        differs |= bounds[0] != bounds[1]
    assert differs


def test_tiles_follow_the_cells() -> None:
    """The cuts that the products' cost rests on: one tile per cell, no bias where the ratio is whole."""
    ray = tiling(neighbourhood_table(448, 32, 6), 32, CPU)
    assert (ray.size, ray.before, ray.window, ray.bias) == (14, 0, 6, None)
    any_up = tiling(fraction_table(448, 32, 0.1), 32, CPU)
    assert (any_up.size, any_up.window) == (14, 8)


def test_refusals() -> None:
    problem = _example()
    with pytest.raises(UpbenchError, match=r"did you mean 'reference'"):
        window_attention(**problem, backend="referense")
    for change, message in (
        ({"heads": 3}, "cannot be split"),
        ({"v": torch.randn(1, 9, 7, 9)}, "9 value channels"),
        ({"v": torch.randn(1, 8, 7, 8)}, "do not lie on the grid"),
        ({"k": torch.randn(1, 12, 7, 9)}, "share batch and channels"),
        ({"rows": problem["cols"]}, "row table"),
        ({"rows": problem["rows"] + 5}, "outside of its 7 cells"),
        ({"rows": torch.full((28, 2), -1)}, "position 0 sees no cell"),
    ):
        with pytest.raises(UpbenchError, match=message):
            window_attention(**{**problem, **change})
    with pytest.raises(UpbenchError, match=r"operator takes \[B, 4"):
        _operator(problem)(torch.randn(1, 2, 3, 7, 9))


def test_the_picture_of_the_module_is_true() -> None:
    rows, cols = (neighbourhood_table(size, cells, 3) for size, cells in ((6, 3), (8, 4)))
    assert f"rows[3] = {rows[3].tolist()}" in (attention.__doc__ or "")
    assert f"cols[5] = {cols[5].tolist()}" in (attention.__doc__ or "")
