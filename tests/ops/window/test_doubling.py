"""Doubling and kernels in one product, against the two steps one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.ops.resample import doublings, resize, to_size
from upbench.ops.window.doubling import doubling
from upbench.testing import assert_close


def reference(values: Tensor, kernels: Tensor, side: int) -> Tensor:
    """Bicubic interpolation, then every pixel's kernel on the reflected result, tap by tap."""
    high = F.interpolate(values, scale_factor=2, mode="bicubic")
    (height, width), reach = high.shape[2:], side // 2
    rows, cols = (
        torch.from_numpy(np.pad(np.arange(n), reach, mode="reflect" if n > reach else "edge"))
        for n in (height, width)
    )
    padded = high[:, :, rows][:, :, :, cols]
    out = torch.zeros_like(high)
    for i in range(side):
        for j in range(side):
            out += kernels[:, i * side + j, None] * padded[:, :, i : i + height, j : j + width]
    return out


@pytest.mark.parametrize("side", [3, 5, 7, 9])
@pytest.mark.parametrize("grid", [(9, 10), (7, 3), (2, 2), (1, 5), (3, 1), (1, 1)])
def test_equals_the_two_steps(grid: tuple[int, int], side: int) -> None:
    """Also on maps smaller than a kernel's reach, in strips and in one piece."""
    kernels = torch.randn(2, side * side, 2 * grid[0], 2 * grid[1])
    values = torch.randn(2, 5, *grid)
    expected = reference(values, kernels, side)
    whole = doubling(lambda rows: kernels[:, :, rows], grid, side, values)
    assert_close(whole(values), expected)
    asked = []

    def strip(rows: slice) -> Tensor:
        asked.append(rows)
        return kernels[:, :, rows]

    with torch.no_grad():
        strips = doubling(strip, grid, side, values, memory_budget=1)
        assert_close(strips(values), expected)
    assert_close(strips.operator.weights, whole.operator.weights)
    assert [(r.start, r.stop) for r in asked] == [
        (top, min(top + 4, 2 * grid[0])) for top in range(0, 2 * grid[0], 4)
    ]


def test_a_crop_needs_only_the_cells_around_it() -> None:
    kernels, values = torch.randn(1, 49, 40, 48), torch.randn(1, 3, 20, 24)
    whole = doubling(lambda rows: kernels[:, :, rows], (20, 24), 7, values)
    part, rows, cols = whole.crop(slice(13, 18), slice(44, 48))
    assert (part.output_size, rows, cols) == ((5, 4), slice(3, 13), slice(16, 24))
    assert_close(part(values[:, :, rows, cols]), whole(values)[:, :, 13:18, 44:])
    again, more_rows, more_cols = part.crop(slice(1, 3), slice(0, 2))
    inner = values[:, :, rows, cols][:, :, more_rows, more_cols]
    assert_close(again(inner), whole(values)[:, :, 14:16, 44:46])
    assert part.nbytes() < whole.nbytes() / 10
    assert whole.to(torch.float16).operator.weights.dtype == torch.float16


def test_gradients() -> None:
    kernels = torch.randn(1, 9, 6, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(kernels: Tensor, values: Tensor) -> Tensor:
        return doubling(lambda rows: kernels[:, :, rows], (3, 4), 3, values)(values)

    assert torch.autograd.gradcheck(run, (kernels, values))


class TestToSize:
    def test_nothing_is_copied_where_the_size_is_right(self) -> None:
        values = torch.randn(1, 2, 6, 8)
        assert to_size(values, (6, 8)) is values

    def test_bilinear_and_antialiased_where_an_axis_shrinks(self) -> None:
        values = torch.randn(1, 2, 6, 8)
        assert_close(
            to_size(values, (9, 11)), F.interpolate(values, (9, 11), mode="bilinear", align_corners=False)
        )
        assert torch.equal(to_size(values, (3, 11)), resize(values, (3, 11), "bilinear"))
        comb = torch.arange(64).remainder(2).float().expand(1, 1, 64, 64)
        assert (to_size(comb, (16, 16)) - 0.5).abs().max() < 0.1, "pixels are skipped without antialiasing"

    @pytest.mark.parametrize(
        ("grid", "size", "steps"),
        [
            ((8, 8), (64, 64), 3),
            ((8, 8), (65, 9), 4),
            ((8, 8), (8, 8), 1),
            ((8, 8), (2, 2), 1),
            ((3, 5), (7, 20), 2),
        ],
    )
    def test_doublings(self, grid: tuple[int, int], size: tuple[int, int], steps: int) -> None:
        assert doublings(grid, size) == steps
