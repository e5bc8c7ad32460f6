"""Stages one after the other: how many run, whose weights, what follows; and their operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.layers.stack import RATIO, Stack, gaussian_prior, shares_stages
from upbench.ops.chain import KernelMap
from upbench.ops.resample import to_size
from upbench.testing import assert_close


class Scaled(nn.Module):
    """Nearest neighbours times a weight; with a guide, times its mean, too."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, features: Tensor, guide: Tensor | None) -> KernelMap:
        b, _, h, w = features.shape
        kernels = self.weight.expand(b, 1, 1, 2 * h, 2 * w)
        return KernelMap(kernels if guide is None else kernels * guide.unsqueeze(1), 2)


def primes(share_stages: bool) -> Stack:
    numbers = iter((2.0, 3.0, 5.0, 7.0))
    return Stack(lambda: Scaled(next(numbers)), share_stages)


@pytest.mark.parametrize(
    ("output_size", "steps"),
    [((6, 8), 1), ((12, 10), 2), ((6, 16), 2), ((9, 17), 3), ((48, 64), 4), ((96, 64), 4), ((2, 3), 1)],
)
def test_the_next_ratio_is_resized(output_size: tuple[int, int], steps: int) -> None:
    features = torch.randn(2, 5, 3, 4)
    for shared, factors in ((True, (2, 2, 2, 2)), (False, (2, 3, 5, 7))):
        stack = primes(shared)
        native = F.interpolate(features, scale_factor=2**steps) * torch.tensor(factors[:steps]).prod()
        expected = to_size(native, output_size)
        assert_close(stack(features, output_size), expected)
        operator = stack.operator(features, output_size)
        assert_close(operator(features.unsqueeze(1)), expected)
        assert len(operator.maps) == steps
    assert RATIO == 16


def test_guides_have_the_size_of_the_stage() -> None:
    asked = []

    def guide(size: tuple[int, int]) -> Tensor:
        asked.append(size)
        return torch.full((1, 1, *size), float(len(asked)))

    out = primes(True)(torch.ones(1, 1, 3, 4), (24, 32), guide)
    assert asked == [(6, 8), (12, 16), (24, 32)]
    assert out.unique().tolist() == [2**3 * 6]


def test_shared_stages_are_told_by_their_keys() -> None:
    for shared in (True, False):
        state = {f"stack.{key}": value for key, value in primes(shared).state_dict().items()}
        assert shares_stages(state) == shared
        assert len(state) == (1 if shared else 4)


def test_the_prior_is_close_to_bilinear_interpolation() -> None:
    weights = gaussian_prior(5).softmax(0).view(5, 5, 2, 2)
    assert_close(weights, weights.flip(0, 2))
    assert_close(weights, weights.transpose(0, 1).transpose(2, 3))
    rows = weights.sum(1)[..., 0]  # [row of the tap, row of the pixel]
    assert [round(x, 3) for x in rows[1:4, 0].tolist()] == [0.221, 0.760, 0.019]
    values = torch.randn(1, 3, 6, 7)
    kernels = weights.view(1, 1, 25, 2, 2).repeat(1, 1, 1, 6, 7)
    near = KernelMap(kernels, 2, "replicate")(values)
    bilinear = F.interpolate(values, scale_factor=2, mode="bilinear")
    assert F.cosine_similarity(near.flatten(), bilinear.flatten(), dim=0) > 0.995
