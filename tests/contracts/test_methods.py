"""Every registered method keeps the contract; the checks are those that plugin authors run."""

from __future__ import annotations

from functools import cache

import pytest

from upbench.registry import find_method, plugins
from upbench.testing import METHOD_CHECKS, MethodCase, NotApplicable

METHODS = sorted(plugins("method"))

# Check that a method fails by design -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("loftup", "batch"): "scales colours over the batch, as the official code; an option makes it not",
}


@cache
def case(name: str) -> MethodCase:
    return MethodCase(find_method(name))


@pytest.mark.parametrize("check", METHOD_CHECKS)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, check: str) -> None:
    if (name, check) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, check])
    try:
        METHOD_CHECKS[check](case(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))
