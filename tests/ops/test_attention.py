"""Global attention: against its definition, in runs, as an operator, differentiated, in low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops import attention as module
from upbench.ops.attention import GlobalOperator, global_attention, global_operator
from upbench.ops.basis import BasisOperator
from upbench.ops.operator import project
from upbench.testing import assert_close

fuzz = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, heads: int, average_heads: bool, scale: float | None = None
) -> Tensor:
    """One head and one image at a time, all weights at once."""
    b, c, height, width = q.shape
    scale = (c // heads) ** -0.5 if scale is None else scale
    images = []
    for image in range(b):
        parts = [x[image].flatten(1).chunk(heads) for x in (q, k)]
        weights = [torch.softmax(scale * queries.T @ keys, 1) for queries, keys in zip(*parts, strict=True)]
        values = v[image].flatten(1)
        if average_heads:
            out = values @ (sum(weights) / heads).T
        else:
            out = torch.cat([x @ w.T for x, w in zip(values.chunk(heads), weights, strict=True)])
        images.append(out.view(-1, height, width))
    return torch.stack(images)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `global_attention` in float64."""
    h, w, height, width = (draw(st.integers(1, n)) for n in (5, 5, 9, 9))
    heads, batch = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    average = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = draw(st.integers(1, 5)) if average else heads * draw(st.integers(1, 3))
    q = normal(batch, 2 * heads, height, width)
    if draw(st.booleans()):
        q = q.contiguous(memory_format=torch.channels_last)
    return {
        "q": q,
        "k": 3 * normal(batch, 2 * heads, h, w),
        "v": normal(batch, channels, h, w),
        "heads": heads,
        "average_heads": average,
        "scale": draw(st.sampled_from([None, 0.3])),
    }


def _operator(problem: dict[str, Any], **more: Any) -> Any:
    return global_operator(**{name: value for name, value in problem.items() if name != "v"}, **more)


@fuzz
@given(problems(), st.sampled_from([None, 1, 3_000]))
def test_equals_the_definition_whatever_the_budget(problem: dict[str, Any], budget: int | None) -> None:
    result = global_attention(**problem, memory_budget=budget)
    assert result.is_contiguous()
    assert_close(result, by_definition(**problem))


@fuzz
@given(problems(), st.sampled_from([None, 1, 3_000]))
def test_gradients_equal_those_of_the_definition(problem: dict[str, Any], budget: int | None) -> None:
    inputs = [problem[name].requires_grad_() for name in ("q", "k", "v")]
    outputs = [global_attention(**problem, memory_budget=budget), by_definition(**problem)]
    weight = torch.randn_like(outputs[0])
    ours, plain = (torch.autograd.grad(out, inputs, weight) for out in outputs)
    for a, b in zip(ours, plain, strict=True):
        assert_close(a, b)


@fuzz
@given(problems(), st.integers(1, 4), st.sampled_from([None, 1, 3_000]), st.data())
def test_a_probe_commutes_with_the_operator(
    problem: dict[str, Any], classes: int, budget: int | None, data: st.DataObject
) -> None:
    """Projected first, then upsampled: same values and same gradient of the probe; a crop is a slice."""
    operator = _operator(problem, memory_budget=budget)
    height, width = problem["q"].shape[2:]
    weight = torch.randn(classes, problem["v"].shape[1], dtype=torch.float64, requires_grad=True)
    dense = F.conv2d(by_definition(**problem), weight[:, :, None, None])
    values = project(weight, problem["v"], operator.groups)
    assert operator.output_size == (height, width)
    assert_close(operator(values), dense)

    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows = slice(top, data.draw(st.integers(top + 1, height)))
    cols = slice(left, data.draw(st.integers(left + 1, width)))
    crop = operator.crop(rows, cols)
    assert crop.output_size == (rows.stop - rows.start, cols.stop - cols.start)
    assert_close(crop(values), dense[:, :, rows, cols], scale=dense)
    inner = crop.crop(slice(0, 1), slice(crop.output_size[1] - 1, None))
    assert_close(inner(values), dense[:, :, rows, cols][:, :, :1, -1:], scale=dense)

    out = torch.randn_like(crop(values))
    (ours,) = torch.autograd.grad(crop(values), weight, out)
    (plain,) = torch.autograd.grad(dense[:, :, rows, cols], weight, out)
    assert_close(ours, plain, scale=dense)


def _example(average: bool, dtype: torch.dtype = torch.float32, channels: int = 8) -> dict[str, Any]:
    return {
        "q": torch.randn(1, 16, 12, 20, dtype=dtype),
        "k": torch.randn(1, 16, 6, 9, dtype=dtype),
        "v": torch.randn(1, channels, 6, 9, dtype=dtype),
        "heads": 4,
        "average_heads": average,
    }


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_runs_fit_the_budget(average: bool, tracked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation makes more than the budget at once, in the backward pass neither; without one, it does."""
    problem = _example(average)
    if tracked:
        problem["q"].requires_grad_()
    largest = _largest_weights(monkeypatch)
    whole = global_attention(**problem)
    assert max(largest) == 240 * 4 * 54 * 4
    largest.clear()
    parts = global_attention(**problem, memory_budget=50_000)
    assert 0 < max(largest) < 50_000
    assert_close(parts, whole)
    if tracked:
        forward = len(largest)
        grads = [torch.autograd.grad(out.square().sum(), problem["q"])[0] for out in (parts, whole)]
        assert len(largest) == 2 * forward, "each run is computed once more"
        assert_close(*grads)


def _largest_weights(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the weights of all heads, one entry for each run."""
    sizes: list[int] = []

    def watched(function: Any) -> Any:
        def run(queries: Tensor, keys: Tensor, *more: Any) -> Tensor:
            sizes.append(queries[..., 0].numel() * int(keys.shape[2]) * 4)
            return function(queries, keys, *more)

        return run

    for name in ("_averaged", "_by_head"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return sizes


def test_the_operator_keeps_queries_and_keys_alone() -> None:
    operator = _operator(_example(True))
    assert operator.nbytes() == 4 * 16 * (12 * 20 + 6 * 9)
    assert not operator.q.requires_grad
    crop = operator.crop(slice(2, 7), slice(3, 9))
    assert crop.q.untyped_storage().data_ptr() == operator.q.untyped_storage().data_ptr()
    assert crop.nbytes() < operator.nbytes()


def test_few_cells_have_their_weights_kept() -> None:
    """Weights up to twice the size of queries are worth keeping; heads that do not share them keep none."""
    q, k = torch.randn(1, 16, 12, 20), torch.randn(1, 16, 4, 8)
    kept = global_operator(q, k, heads=4, average_heads=True)
    assert isinstance(kept, BasisOperator)
    assert kept.nbytes() == 4 * 32 * 12 * 20
    assert_close(kept.weights.sum(1), torch.ones(1, 12, 20))
    assert isinstance(global_operator(q, k, heads=4), GlobalOperator)
    assert isinstance(
        global_operator(q, torch.randn(1, 16, 4, 9), heads=4, average_heads=True), GlobalOperator
    )


def test_half_precision_operator_is_half_as_large_and_close() -> None:
    operator = _operator(_example(True))
    half = operator.to(torch.float16)
    assert 2 * half.nbytes() == operator.nbytes()
    values = torch.randn(1, 1, 3, 6, 9)
    result = half(values)
    assert result.dtype == torch.float32
    assert_close(result, operator(values), terms=1, dtype=torch.float16)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, average: bool) -> None:
    problem = _example(average)
    low = {n: v.to(dtype) if n in "qkv" else v for n, v in problem.items()}
    exact = {n: v.double() if n in "qkv" else v for n, v in low.items()}
    for budget in (None, 20_000):
        result = global_attention(**low, memory_budget=budget)
        assert result.dtype == dtype
        assert_close(result, by_definition(**exact), terms=1)


@pytest.mark.parametrize("average", [False, True])
def test_mixed_precision_keeps_the_dtype_of_the_values(average: bool) -> None:
    problem = _example(average)
    problem["q"], problem["k"] = problem["q"].bfloat16(), problem["k"].bfloat16()
    assert global_attention(**problem).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem["v"].requires_grad_()
        assert global_attention(**problem).dtype == torch.float32


def test_constant_values_stay_constant() -> None:
    problem = _example(True)
    problem["v"] = torch.full_like(problem["v"], 2.5)
    assert_close(global_attention(**problem), torch.full((1, 8, 12, 20), 2.5))


def test_refusals() -> None:
    problem = _example(False)
    for change, message in (
        ({"heads": 3}, "cannot be split"),
        ({"v": torch.randn(1, 9, 6, 9)}, "9 value channels"),
        ({"v": torch.randn(1, 8, 6, 8)}, "do not lie on the grid"),
        ({"k": torch.randn(1, 12, 6, 9)}, "share batch and channels"),
        ({"memory_budget": 0}, "memory budget 0 is not positive"),
    ):
        with pytest.raises(UpbenchError, match=message):
            global_attention(**{**problem, **change})
    for shape in ((1, 2, 3, 6, 9), (1, 4, 3, 6, 8)):
        with pytest.raises(UpbenchError, match=r"operator takes \[B, 4, K, 6, 9\]"):
            _operator(problem)(torch.randn(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("average", [False, True])
def test_gpu(average: bool) -> None:
    problem = _example(average)
    there = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in problem.items()}
    for budget in (None, 20_000):
        result = global_attention(**there, memory_budget=budget).cpu()
        assert_close(result, by_definition(**problem), terms=1, dtype=torch.float16)  # TF32 has its digits
