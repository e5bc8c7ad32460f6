"""Chains of maps: crops, casts, groups of channels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.chain import ChainOperator, KernelMap, resizing
from upbench.ops.operator import project
from upbench.ops.reassemble import Padding
from upbench.ops.resample import to_size
from upbench.testing import assert_close
from upbench.testing.closeness import allowed, relative_error

WINDOWS = [slice(0, 4), slice(1, 2), slice(3, 12), slice(11, 12), slice(5, 8)]


def kernels(groups: int, side: int, scale: int, size: tuple[int, int]) -> Tensor:
    logits = torch.randn(2, groups, side * side, scale * size[0], scale * size[1], dtype=torch.float64)
    return logits.softmax(2)


@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize(("side", "scale"), [(5, 2), (3, 3), (1, 2)])
def test_a_cropped_map_needs_few_cells(padding: Padding, side: int, scale: int) -> None:
    values = torch.randn(2, 3, 12 // scale, 12 // scale, dtype=torch.float64)
    whole = KernelMap(kernels(1, side, scale, (12 // scale, 12 // scale)), scale, padding)
    dense = whole(values)
    assert whole.output_size == (12, 12)
    for rows, cols in itertools.product(WINDOWS, WINDOWS):
        part, row_cells, col_cells = whole.crop(rows, cols)
        assert_close(part(values[..., row_cells, col_cells]), dense[..., rows, cols])
        reach = (rows.stop - rows.start) // scale + 2 + 2 * (side // 2)
        assert 0 <= row_cells.start < row_cells.stop <= row_cells.start + reach
        again, inner_rows, inner_cols = part.crop(slice(0, 1), slice(0, 1))  # a crop of a crop
        cells = values[..., row_cells, col_cells][..., inner_rows, inner_cols]
        assert_close(again(cells), dense[..., rows, cols][..., :1, :1])


def chain(groups: int, output_size: tuple[int, int]) -> ChainOperator:
    """Kernels for all channels, then for each group, from 3 x 4 to 12 x 16; resized."""
    maps = [KernelMap(kernels(1, 5, 2, (3, 4)), 2), KernelMap(kernels(groups, 3, 2, (6, 8)), 2, "replicate")]
    return ChainOperator(maps, resizing((12, 16), output_size, torch.zeros(1)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("output_size", [(12, 16), (11, 13), (5, 40)])
def test_a_chain_is_its_maps_and_a_resize(groups: int, output_size: tuple[int, int]) -> None:
    operator = chain(groups, output_size)
    features = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64)
    dense = to_size(operator.maps[1](operator.maps[0](features)), output_size)
    expected = F.conv2d(dense, weight[:, :, None, None])
    low = project(weight, features, groups)
    single = {"dtype": torch.float32}  # of the weights of the resize
    assert (operator.groups, operator.output_size) == (groups, output_size)
    assert_close(operator(low), expected, **single)
    for rows, cols in (
        (slice(0, 2), slice(5, 6)),
        (slice(3, 5), slice(0, 13)),
        (slice(None, -1), slice(7, None)),
    ):
        part = operator.crop(rows, cols)
        assert part.output_size == tuple(expected[0, 0, rows, cols].shape)
        assert_close(part(low), expected[..., rows, cols], **single)
        twice = part.crop(slice(1, None), slice(0, 1))
        assert_close(twice(low), expected[..., rows, cols][..., 1:, :1], **single)


def test_half_precision_keeps_half_the_bytes() -> None:
    operator, values = chain(1, (11, 13)).to(torch.float32), torch.randn(2, 1, 4, 3, 4)
    half = operator.to(torch.float16)
    assert half.nbytes() * 2 == operator.nbytes() > 0
    assert 0 < relative_error(half.to(torch.float32)(values), operator(values)) <= allowed(torch.float16, 1)


def test_gradients_reach_the_values() -> None:
    operator = chain(3, (11, 13))
    values = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator, values, fast_mode=True, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    two, three = (KernelMap(kernels(groups, 3, 2, (3, 4)), 2) for groups in (2, 3))
    with pytest.raises(UpbenchError, match=r"2 maps with \[2, 3\] groups"):
        ChainOperator([two, three])
    with pytest.raises(UpbenchError, match="0 maps"):
        ChainOperator([])
    with pytest.raises(UpbenchError, match=r"takes \[B, 2, K, h, w\], got \[2, 1, 4, 3, 4\]"):
        ChainOperator([two])(torch.randn(2, 1, 4, 3, 4))
