"""SeparableOperator: two matrices as an operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.operator import project
from upbench.ops.separable import SeparableOperator
from upbench.testing import assert_close


def _bilinear(size: int, cells: int) -> Tensor:
    """`[size, cells]` weights: what the resize makes of unit vectors."""
    return F.interpolate(torch.eye(cells).unsqueeze(0), size, mode="linear")[0].T


@pytest.fixture
def operator() -> SeparableOperator:
    return SeparableOperator(_bilinear(19, 5), _bilinear(12, 7))


def test_equals_the_resize_and_commutes_with_a_probe(operator: SeparableOperator) -> None:
    features, weight = torch.randn(2, 6, 5, 7), torch.randn(3, 6, requires_grad=True)
    dense = F.interpolate(features, (19, 12), mode="bilinear")
    for groups in (1, 2):
        low = project(weight, features, groups)
        assert_close(operator(low), F.conv2d(dense, weight[:, :, None, None]))
    assert operator.output_size == (19, 12)
    (gradient,) = torch.autograd.grad(operator(project(weight, features, 1)).sum(), weight)
    assert_close(gradient, dense.sum((0, 2, 3)).expand(3, 6))


def test_crop_is_a_slice(operator: SeparableOperator) -> None:
    values = torch.randn(1, 1, 4, 5, 7)
    crop = operator.crop(slice(3, 11), slice(5, None))
    assert crop.output_size == (8, 7)
    assert_close(crop(values), operator(values)[:, :, 3:11, 5:])
    assert crop.rows.data_ptr() > operator.rows.data_ptr()  # a view


def test_rectangles_of_several_images_in_one_operator(operator: SeparableOperator) -> None:
    features, weight = torch.randn(3, 6, 5, 7), torch.randn(3, 4, 6)
    crops = [(slice(0, 8), slice(7, 12)), (slice(11, 19), slice(0, 5)), (slice(4, 12), slice(3, 8))]
    joined, low = operator.cropped_each(crops, [one[None] for one in features])
    assert joined.output_size == (8, 5)
    assert low.shape[0] == 3
    assert low.shape[2] < 5  # what no rectangle looks at is not projected
    made = joined((weight @ low.flatten(2)).view(3, 1, 4, *low.shape[2:]))
    whole = operator((weight @ features.flatten(2)).view(3, 1, 4, 5, 7))
    for one, dense, (rows, cols) in zip(made, whole, crops, strict=True):
        assert_close(one, dense[:, rows, cols])
    part = joined.crop(slice(2, 6), slice(1, 3))
    assert_close(part(project(weight[0], low, 1)), joined(project(weight[0], low, 1))[:, :, 2:6, 1:3])


def test_a_row_that_looks_at_nothing() -> None:
    rows = torch.zeros(4, 5)
    rows[2:, 3] = 1
    operator = SeparableOperator(rows, _bilinear(12, 7))
    joined, low = operator.cropped_each([(slice(0, 2), slice(0, 6))], [torch.ones(1, 2, 5, 7)])
    assert not bool(joined(low[:, None]).any())


def test_storage(operator: SeparableOperator) -> None:
    half = operator.to(dtype=torch.float16)
    assert operator.nbytes() == 4 * (19 * 5 + 12 * 7) == 2 * half.nbytes()
    values = torch.randn(1, 1, 4, 5, 7)
    assert half(values).dtype == torch.float32
    assert_close(half(values), operator(values), terms=1, dtype=torch.float16)


def test_refuses_what_is_no_matrix() -> None:
    with pytest.raises(UpbenchError, match="rows of a separable operator"):
        SeparableOperator(torch.zeros(3), torch.zeros(3, 3))
