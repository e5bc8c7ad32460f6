"""The rule for equality but for rounding: it passes what only rounding changed, and nothing else."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.testing import assert_close
from upbench.testing.closeness import allowed, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def in_another_order(x: Tensor) -> Tensor:
    """The sum over the first axis, one term after the other, rounded after each."""
    total = torch.zeros_like(x[0])
    for term in x.flip(0):
        total += term
    return total


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("terms", [3, 100, 2000])
def test_sums_in_another_order(terms: int, size: float) -> None:
    x = size * torch.randn(terms, 50, 40)
    assert_close(in_another_order(x), x.sum(0), terms=terms)
    assert_close(in_another_order(x), x.double().sum(0), terms=terms)
    with pytest.raises(AssertionError):
        assert_close(in_another_order(x), (x * 1.001).sum(0), terms=terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_coarsest_dtype_counts(dtype: torch.dtype) -> None:
    x = torch.randn(64, 50)
    assert_close(x.to(dtype), x.double(), terms=1)
    assert_close(x.to(dtype).float(), x, terms=1, dtype=dtype)
    with pytest.raises(AssertionError):
        assert_close(x.to(dtype).float(), x, terms=64)
    with pytest.raises(AssertionError, match=r"torch\.float32, not torch\.(b?float16)"):
        assert_close(x, x.to(dtype))


def upsampled() -> Tensor:
    return F.interpolate(torch.randn(1, 4, 9, 7), (54, 42), mode="bilinear")


def moved(x: Tensor) -> Tensor:
    return x.roll(1, 3)


def noisy(x: Tensor) -> Tensor:
    return x * (1 + 1e-3 * torch.randn_like(x))


def one_pixel(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 1, 20, 20] += 1e-3 * x.abs().max()
    return x


def transposed(x: Tensor) -> Tensor:
    return x.flip(1)


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def rounded_to_half(x: Tensor) -> Tensor:
    return x.half().float()


def scaled(x: Tensor) -> Tensor:
    return x * 1.0001


def not_a_number(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = torch.nan
    return x


def infinite(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = torch.inf
    return x


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


WRONG = [
    moved,
    noisy,
    one_pixel,
    transposed,
    rounded,
    rounded_to_half,
    scaled,
    not_a_number,
    infinite,
    zero,
    torch.Tensor.double,
    torch.Tensor.long,
    lambda x: x[..., :-1],
    lambda x: x[:, :1],
    lambda x: x[0],
]


@pytest.mark.parametrize("wrong", WRONG)
def test_real_errors_are_found(wrong) -> None:
    x = upsampled()
    assert_close(x.clone(), x)
    with pytest.raises(AssertionError):
        assert_close(wrong(x), x)


@pytest.mark.parametrize("wrong", WRONG)
def test_real_errors_are_found_by_a_reference(wrong) -> None:
    low = torch.randn(1, 4, 9, 7)
    plain = F.interpolate(low, (54, 42), mode="bilinear")
    reference = F.interpolate(low.double(), (54, 42), mode="bilinear")
    assert_close(plain + 1e-7 * plain, plain, reference=reference)
    with pytest.raises(AssertionError):
        assert_close(wrong(plain), plain, reference=reference)


def test_a_reference_allows_what_the_plain_way_loses() -> None:
    """A small spread about a large mean amplifies roundings: no count of terms tells by how much."""

    def normalised(x: Tensor, mean: Tensor) -> Tensor:
        return (x - mean) / (x - mean).square().mean(0).sqrt()

    x = 1000 + torch.rand(500, 40)
    plain, other = normalised(x, x.mean(0)), normalised(x, in_another_order(x / 500))
    reference = normalised(x.double(), x.double().mean(0))
    assert relative_error(plain, reference) > allowed(torch.float32, 20)
    with pytest.raises(AssertionError):
        assert_close(other, plain)
    assert_close(other, plain, reference=reference, times=30)  # it rounds 500 times where the sum is in pairs
    message = r"^a way: differs by .* \(allowed .*\), most at \[\d+, \d+\]: \S+ for \S+$"
    with pytest.raises(AssertionError, match=message):
        assert_close(normalised(x, x.mean(0) + 0.01), plain, reference=reference, times=30, what="a way")


def test_what_proves_nothing_is_refused() -> None:
    x = upsampled()
    with pytest.raises(ValueError, match=r"the plain way has lost half of its digits: off by 0\.\d+"):
        assert_close(x, x, reference=moved(x).double())
    with pytest.raises(ValueError, match=r"x might be off by 1: that proves nothing"):
        assert_close(x.bfloat16(), x.bfloat16(), terms=256, what="x")
    with pytest.raises(ValueError, match=r"a reference is float64, not torch\.float32"):
        assert_close(x, x, reference=x)
    with pytest.raises(AssertionError, match=r"torch\.float32, not torch\.float64"):
        assert_close(x, x.double(), reference=x.double())


def test_every_bit() -> None:
    x = torch.rand(30)
    assert_close(x.clone(), x, terms=0)
    with pytest.raises(AssertionError):
        assert_close(torch.nextafter(x, x + 1), x, terms=0)


def test_zeros_have_no_size() -> None:
    zeros = torch.zeros(3)
    assert_close(zeros.clone(), zeros)
    with pytest.raises(AssertionError):
        assert_close(zeros + 1e-30, zeros)
    assert_close(zeros + 1e-7, zeros, scale=1)
    assert_close(zeros + 1e-7, zeros, scale=torch.tensor([0.1, -1.0]))
    with pytest.raises(AssertionError):
        assert_close(zeros + 1e-3, zeros, scale=1)


def test_infinities_are_equal_to_themselves() -> None:
    x = torch.tensor([1.0, torch.inf, -torch.inf])
    assert_close(x.clone(), x)
    assert_close(torch.tensor([1 + 1e-7, torch.inf, -torch.inf]), x)
    with pytest.raises(AssertionError, match=r"\(allowed 1\.5e-05\), most at \[1\]: -inf for inf"):
        assert_close(torch.tensor([1.0, -torch.inf, -torch.inf]), x)


def test_arrays_numbers_sequences_and_mappings() -> None:
    x = torch.rand(5)
    assert_close(x.numpy(), x.numpy() + np.float32(1e-7))
    assert_close(float(x.sum()), float(x.double().sum()), dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_close(float(x.sum()), float(x.double().sum()) + 1e-3, dtype=torch.float32)
    assert_close({"a": [x, 2 * x]}, {"a": [x, 2 * x]})
    assert_close([x, x], [x, x], reference=[x.double(), x.double()])
    with pytest.raises(AssertionError, match=r"^sums\['a'\]\[1\]: differs by"):
        assert_close({"a": [x, x]}, {"a": [x, 2 * x]}, what="sums")
    with pytest.raises(AssertionError, match="other names"):
        assert_close({"a": x}, {"b": x})
    with pytest.raises(AssertionError, match="another length"):
        assert_close([x], [x, x])


def test_whole_numbers_are_exact() -> None:
    whole = torch.arange(5)
    assert_close(whole, whole.clone())
    with pytest.raises(AssertionError, match="other numbers"):
        assert_close(whole + 1, whole)
    assert_close(whole > 2, whole > 2)


def test_the_formula() -> None:
    assert allowed(torch.float32, 256) == 8 * 16 * 2**-23
    assert allowed(torch.bfloat16, 1) == 8 * 2**-7
    assert allowed(torch.float64, 0) == 0
    assert relative_error(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125
    assert relative_error(torch.tensor([torch.nan]), torch.tensor([1.0])) == math.inf


def test_no_test_has_a_tolerance_of_its_own(root: Path) -> None:
    """They all go by the rule; finite differences (`gradcheck`) have another one."""
    own = re.compile(r"\b(atol|rtol)=|\ballclose\(|testing\.assert_close\(|\bdeadline=\d")
    files = [p for p in (root / "tests").rglob("*.py") if p != Path(__file__)]
    assert len(files) > 50
    lines = [
        f"{path.name}:{number}: {line.strip()}"
        for path in (*files, *(root / "upbench" / "testing").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if own.search(line) and "gradcheck" not in line
    ]
    assert lines == []
