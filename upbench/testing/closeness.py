"""One rule for how far apart two results may lie that are the same but for rounding.

An error is the largest difference, relative to the largest number that is expected:

    error = max |actual - expected| / max |expected|

An absolute bound says nothing of a tensor whose size it does not know, and an error relative to each number
by itself is infinite at zeros, where sums cancel. What is allowed follows from the arithmetic, not from what
some processor happened to give:

    allowed = 8 * sqrt(terms) * eps(dtype)

A sum of n terms in an order that nobody promises is off by about sqrt(n) roundings, and by more than 8 times
that with a probability of some n * 1e-14 (N. J. Higham and T. Mary, A New Approach to Probabilistic Rounding
Error Analysis, SIAM J. Sci. Comput. 41(5), 2019; eps is twice the unit roundoff: both sides of a comparison
are rounded). `terms` are those of the sums on the way from the inputs to one output number, those of several
layers added. In float32 that allows 1.5e-5 with 256 terms, in bfloat16 0.06 with one.

Where what happens between amplifies roundings (exponentials of large logits, divisions by small spreads, a
dozen layers), no count of terms tells how far off float32 is. Then a result in float64 does:

    allowed = max(4 * error of the plain way, 8 * eps(dtype))

with errors of both from the float64 result. A way that is as exact as the plain one passes on every
processor, for both have that processor's roundings; a wrong one is off by far more. A plain way that has lost
half of its digits is no measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVIATIONS = 8  # of a sum's rounding error
TIMES = 4  # how much less exact than the plain way a result may be
TERMS = 256
WORST = 0.25  # more would let another function pass
# Terms that the checks of contracts take: a few layers with hundreds of channels each and what their
# activations amplify, or the same operations on the same numbers, where only their place in memory may change
# the order.
ANOTHER_WAY = 2**14
AGAIN = 128


def allowed(dtype: torch.dtype, terms: float = TERMS) -> float:
    """Largest relative error of a result in `dtype` whose sums have `terms` terms; 0 without any."""
    return DEVIATIONS * math.sqrt(terms) * torch.finfo(dtype).eps


def relative_error(actual: Tensor, expected: Tensor, scale: float | Tensor | None = None) -> float:
    """Largest difference, relative to the largest expected number.

    Args:
        actual: Any shape.
        expected: The same shape.
        scale: What the difference is relative to instead: a number, or the largest one of a tensor.

    Returns:
        The error; 0 where both are equal, infinite where one is not finite and the other is not the same, or
        where nothing but zeros is expected.
    """
    one, two = (x.detach().to("cpu", torch.float64) for x in (actual, expected))
    different = one != two  # infinities are equal to themselves, NaN is not
    if not bool(different.any()):
        return 0.0
    apart = float((one - two)[different].abs().max())
    largest = two if scale is None else torch.as_tensor(scale).detach().to(two)
    size = float(largest.abs().nan_to_num(0, 0).max())
    return apart / size if size > 0 and math.isfinite(apart) else math.inf


def assert_close(
    actual: Any,
    expected: Any,
    *,
    terms: float = TERMS,
    reference: Any = None,
    times: float = TIMES,
    scale: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
    what: str = "",
) -> None:
    """Fails where two results differ by more than rounding explains; the module says by how much.

    Args:
        actual: What is tested: a tensor, an array, a number, or a sequence or mapping of such.
        expected: What it should be, of the same shape and dtype; float64 is as good whatever the dtype of
            `actual`.
        terms: Of the sums behind an output number; 0 where every bit must be the same.
        reference: The same result in float64. `expected` is then the plain way to compute it in the dtype of
            `actual`, and `actual` may be off by `times` what that is off.
        times: See there.
        scale: What errors are relative to, where the largest expected number does not tell: a number, or a
            tensor for its largest one. Sums that cancel have those of their terms, a part has the whole.
        dtype: In which it was computed, where neither result tells (a TF32 product has the digits of
            float16). The coarsest counts.
        what: What is compared, for the message.

    Raises:
        AssertionError: They differ; the message has the error, what is allowed, and where it is largest.
        ValueError: So much is allowed that nothing is proven: many terms of few digits, or a reference from
            which the plain way is far off.
    """
    for name, one, two, third in _pairs(actual, expected, reference, what):
        _compare(one, two, third, terms, times, scale, dtype, name)


def _pairs(
    actual: Any, expected: Any, reference: Any, what: str
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """What is compared with what, under which name."""
    names: list[Any]
    if isinstance(expected, Mapping):
        _require(isinstance(actual, Mapping) and set(actual) == set(expected), what, "other names")
        names = list(expected)
    elif isinstance(expected, Sequence):
        _require(isinstance(actual, Sequence) and len(actual) == len(expected), what, "another length")
        names = list(range(len(expected)))
    else:
        third = None if reference is None else _tensor(reference)
        yield what, _tensor(actual), _tensor(expected), third
        return
    for name in names:
        part = None if reference is None else reference[name]
        yield from _pairs(actual[name], expected[name], part, f"{what}[{name!r}]")


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _compare(
    actual: Tensor,
    expected: Tensor,
    reference: Tensor | None,
    terms: float,
    times: float,
    scale: float | Tensor | None,
    dtype: torch.dtype | None,
    what: str,
) -> None:
    _alike(actual, expected, reference, what)
    if not actual.dtype.is_floating_point:
        _require(torch.equal(actual, expected), what, f"other numbers:\n{actual}\n{expected}")
        return
    kinds = (actual.dtype, expected.dtype, dtype or actual.dtype)
    coarsest = max(kinds, key=lambda kind: torch.finfo(kind).eps)
    if reference is None:
        truth, limit = expected, allowed(coarsest, terms)
    else:
        plain = relative_error(expected, reference, scale)
        if plain > math.sqrt(torch.finfo(coarsest).eps):
            raise ValueError(f"{what or 'the plain way'} has lost half of its digits: off by {plain:.2g}")
        truth, limit = reference, max(times * plain, allowed(coarsest, 1))
    if limit > WORST:
        raise ValueError(f"{what or 'a result'} might be off by {limit:.2g}: that proves nothing")
    error = relative_error(actual, truth, scale)
    if error <= limit:
        return
    one, two = (x.detach().to("cpu", torch.float64) for x in (actual, truth))
    apart = torch.where(one == two, 0.0, (one - two).abs().nan_to_num(math.inf))
    place = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    numbers = f"{float(one[place]):.9g} for {float(two[place]):.9g}"
    _require(False, what, f"differs by {error:.2g} (allowed {limit:.2g}), most at {list(place)}: {numbers}")


def _alike(actual: Tensor, expected: Tensor, reference: Tensor | None, what: str) -> None:
    """Shapes, devices and dtypes go together."""
    if reference is not None and reference.dtype != torch.float64:
        raise ValueError(f"a reference is float64, not {reference.dtype}")
    for other in (expected,) if reference is None else (expected, reference):
        shapes = list(actual.shape), list(other.shape)
        _require(shapes[0] == shapes[1], what, f"shape {shapes[0]}, not {shapes[1]}")
        _require(actual.device == other.device, what, f"on {actual.device}, not {other.device}")
    exact = expected.dtype == torch.float64 and reference is None and actual.dtype.is_floating_point
    _require(exact or actual.dtype == expected.dtype, what, f"{actual.dtype}, not {expected.dtype}")


def _require(condition: object, what: str, message: str) -> None:
    if not condition:
        raise AssertionError(f"{what}: {message}" if what else message)
