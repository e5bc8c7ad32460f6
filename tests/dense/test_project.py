"""Probes through operators: values and gradients against C channels in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from upbench.contracts.operator import Operator, SourcedOperator
from upbench.dense.project import Part, project_each, project_parts
from upbench.ops.operator import project
from upbench.ops.resample import interpolation_operator
from upbench.ops.window.attention import window_operator
from upbench.ops.window.tables import neighbourhood_table
from upbench.testing import assert_close

C, K = 8, 3
SIZES = [(12, 12), (9, 12), (12, 7)]


def attention(heads: int, size: tuple[int, int]) -> Operator:
    tables = (neighbourhood_table(n, 4, 3) for n in size)
    return window_operator(torch.randn(1, 6, *size), torch.randn(1, 6, 4, 4), *tables, heads=heads)


def parts(ragged: bool) -> list[Part]:
    """Every kind of view, two frames in one of them, places in no order."""
    sizes = SIZES if ragged else [SIZES[0]] * 3
    low = [torch.randn(n, C, 4, 4) for n in (1, 2, 1, 1, 1)]
    sources = torch.randn(1, C, 5, 6)
    return [
        Part([2], attention(1, sizes[0]), low[0]),
        Part([4, 0], interpolation_operator(low[1], sizes[1], "bicubic"), low[1]),
        Part([1], torch.randn(1, C, *sizes[2]), low[2]),
        Part([5], SourcedOperator(sources, interpolation_operator(sources, sizes[0], "bilinear")), low[3]),
        Part([3], attention(2, sizes[2]), low[4]),
    ]


def plain(some: list[Part], count: int, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """`[K, H, W]` of each frame, from all C channels in float64."""
    found: dict[int, Tensor] = {}
    for part in some:
        view = part.view
        dense = view.dense(view.takes(part.features)) if isinstance(view, Operator) else view
        for row, place in enumerate(part.places):
            own = weight if weight.ndim == 2 else weight[place]
            made = torch.einsum("kc,chw->khw", own, dense[row].double())
            if bias is not None:
                made = made + (bias if bias.ndim == 1 else bias[place])[:, None, None]
            found[place] = made
    return [found[place] for place in range(count)]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("weights", ["one", "each"])
@pytest.mark.parametrize("biases", ["none", "one", "each"])
def test_values_and_gradients(ragged, weights, biases):
    some = parts(ragged)
    weight = torch.randn((K, C) if weights == "one" else (6, K, C), requires_grad=True)
    bias = None
    if biases != "none":
        bias = torch.randn(K if biases == "one" else (6, K), requires_grad=True)
    found = project_parts(some, 6, weight, bias)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in (weight, bias)]
    expected = plain(some, 6, *wide)
    assert found.shape == (6, K, 12, 12)
    upstream = torch.randn_like(found)
    total: Tensor | float = 0.0
    for place, one in enumerate(expected):
        h, w = one.shape[1:]
        assert_close(found[place, :, :h, :w], one, terms=1024)
        beyond = found[place].clone()
        beyond[:, :h, :w] = 0
        assert not beyond.any()
        total = total + (one * upstream[place, :, :h, :w]).sum()
    leaves = [x for x in (weight, bias) if x is not None]
    got = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(total, [x for x in wide if x is not None])
    for one, two in zip(got, wanted, strict=True):
        assert_close(one, two, terms=2048)
    with torch.no_grad():
        assert torch.equal(project_parts(some, 6, weight, bias), found)


def test_only_what_asks_for_a_gradient_gets_one():
    some, weight, bias = parts(False), torch.randn(K, C), torch.randn(K, requires_grad=True)
    (found,) = torch.autograd.grad(project_parts(some, 6, weight, bias).sum(), bias)
    assert_close(found, torch.full((K,), 6.0 * 144))
    assert not project_parts(some, 6, weight, bias.detach()).requires_grad


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_probe_for_each_frame_is_projected_group_by_group(groups):
    weight, features = torch.randn(3, K, C), torch.randn(3, C, 4, 5)
    each = [project(weight[b], features[b : b + 1], groups) for b in range(3)]
    assert_close(project_each(weight, features, groups), torch.cat(each))
    assert torch.equal(project_each(weight[0], features, groups), project(weight[0], features, groups))
