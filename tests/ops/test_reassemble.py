"""Per-pixel kernels against loops; gradients; that neither strips nor layout matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.cost.macs import count_macs
from upbench.errors import UpbenchError
from upbench.ops.reassemble import affinity, reassemble
from upbench.testing import assert_close

CASES = [  # side, scale, padding, groups
    (5, 2, "zeros", 1),
    (3, 2, "replicate", 2),
    (7, 1, "reflect", 1),
    (3, 3, "zeros", 3),
    (1, 2, "zeros", 1),
]


def outside(size: int, at: int, padding: str) -> int | None:
    """The cell that stands for one outside an axis; None for zero."""
    if 0 <= at < size:
        return at
    if padding == "zeros":
        return None
    if padding == "replicate":
        return min(max(at, 0), size - 1)
    return -at if at < 0 else 2 * (size - 1) - at


def neighbours(size: tuple[int, int], i: int, j: int, side: int, padding: str) -> list[tuple[int, int, int]]:
    """(tap, row, column) of those around a cell that are there."""
    found = []
    for tap in range(side * side):
        y = outside(size[0], i + tap // side - side // 2, padding)
        x = outside(size[1], j + tap % side - side // 2, padding)
        if y is not None and x is not None:
            found.append((tap, y, x))
    return found


def loop_reassemble(values: Tensor, kernels: Tensor, scale: int, padding: str) -> Tensor:
    (b, c, h, w), groups = values.shape, kernels.shape[1]
    side = round(kernels.shape[2] ** 0.5)
    out = torch.zeros(b, c, scale * h, scale * w, dtype=values.dtype)
    for i in range(scale * h):
        for j in range(scale * w):
            for tap, y, x in neighbours((h, w), i // scale, j // scale, side, padding):
                for channel in range(c):
                    weight = kernels[:, channel // (c // groups), tap, i, j]
                    out[:, channel, i, j] += weight * values[:, channel, y, x]
    return out


def loop_affinity(queries: Tensor, keys: Tensor, side: int, scale: int, padding: str, groups: int) -> Tensor:
    b, c, h, w = keys.shape
    out = torch.zeros(b, groups, side * side, scale * h, scale * w, dtype=keys.dtype)
    for i in range(scale * h):
        for j in range(scale * w):
            for tap, y, x in neighbours((h, w), i // scale, j // scale, side, padding):
                for channel in range(c):
                    product = queries[:, channel, i, j] * keys[:, channel, y, x]
                    out[:, channel // (c // groups), tap, i, j] += product
    return out


def inputs(side: int, scale: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, kernels and queries in float64."""
    values = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    kernels = torch.randn(2, groups, side * side, 4 * scale, 5 * scale, dtype=torch.float64)
    return values, kernels, torch.randn(2, 6, 4 * scale, 5 * scale, dtype=torch.float64)


@pytest.mark.parametrize(("side", "scale", "padding", "groups"), CASES)
def test_reassemble_against_loops(side: int, scale: int, padding: str, groups: int) -> None:
    values, kernels, _ = inputs(side, scale, groups)
    expected = loop_reassemble(values, kernels, scale, padding)
    assert_close(reassemble(values, kernels, scale, padding), expected)


@pytest.mark.parametrize(("side", "scale", "padding", "groups"), CASES)
def test_affinity_against_loops(side: int, scale: int, padding: str, groups: int) -> None:
    keys, _, queries = inputs(side, scale, groups)
    expected = loop_affinity(queries, keys, side, scale, padding, groups)
    assert_close(affinity(queries, keys, side, scale, padding, groups), expected)


@pytest.mark.parametrize(("side", "scale", "padding", "groups"), CASES)
def test_gradients_are_those_of_finite_differences(side: int, scale: int, padding: str, groups: int) -> None:
    values, kernels, queries = (x[:1].requires_grad_() for x in inputs(side, scale, groups))
    assert torch.autograd.gradcheck(
        lambda v, k: reassemble(v, k, scale, padding, memory_budget=1), (values, kernels), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda q, k: affinity(q, k, side, scale, padding, groups, memory_budget=1),
        (queries, values),
        fast_mode=True,
    )


def test_strips_and_layout_make_no_difference() -> None:
    values, kernels, queries = inputs(5, 2, 2)
    expected = reassemble(values, kernels, 2), affinity(queries, values, 5, 2)
    layout = torch.channels_last
    for budget in (1, 1000, None):
        assert_close(reassemble(values, kernels, 2, memory_budget=budget), expected[0])
        assert_close(affinity(queries, values, 5, 2, memory_budget=budget), expected[1])
    last = values.contiguous(memory_format=layout)
    assert_close(reassemble(last, kernels, 2), expected[0])
    assert_close(affinity(queries.contiguous(memory_format=layout), last, 5, 2), expected[1])


def test_bfloat16_is_added_up_in_float32() -> None:
    values, kernels = torch.ones(1, 1, 8, 8).bfloat16(), torch.full((1, 1, 289, 8, 8), 1.0).bfloat16()
    out = reassemble(values, kernels, padding="replicate")
    assert out.dtype == torch.bfloat16
    assert out.unique().tolist() == [288]  # 289, rounded once; a sum in bfloat16 sticks at 256
    assert affinity(values, values, 3).dtype == torch.float32


def test_a_box_is_an_average_pooling() -> None:
    values = torch.randn(1, 3, 6, 7)
    box = torch.full((1, 1, 9, 6, 7), 1 / 9)
    assert_close(reassemble(values, box), F.avg_pool2d(values, 3, 1, padding=1))


def test_macs() -> None:
    class Both(torch.nn.Module):
        def forward(self, queries: Tensor, values: Tensor) -> Tensor:
            return reassemble(values, affinity(queries, values, 5, 2), 2)

    counted = count_macs(Both(), torch.randn(1, 6, 8, 10), torch.randn(1, 6, 4, 5))
    assert counted.uncounted == ()
    assert counted.total == 2 * 6 * 25 * 80


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: reassemble(v, torch.ones(1, 1, 16, 4, 5)), "odd k"),
        (lambda v: reassemble(v, torch.ones(1, 1, 9, 8, 5)), "do not fit"),
        (lambda v: reassemble(v, torch.ones(1, 4, 9, 4, 5)), "do not fit"),
        (
            lambda v: reassemble(v, torch.ones(1, 1, 9, 4, 5), padding="replicated"),
            "did you mean 'replicate'",
        ),
        (lambda v: reassemble(v, torch.ones(1, 1, 81, 4, 5), padding="reflect"), "cannot be reflected"),
        (lambda v: affinity(v, v, 2), "do not fit"),
        (lambda v: affinity(v, v, 3, scale=2), "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        call(torch.randn(1, 6, 4, 5))  # type: ignore[operator]
