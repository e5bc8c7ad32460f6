"""Every registered method keeps the contract; the checks are those that plugin authors run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from upbench.registry import find_method, plugins
from upbench.testing import METHOD_CHECKS, MethodCase, NotApplicable

METHODS = sorted(plugins("method"))

# Check that a method fails by design -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("loftup", "batch"): "scales colours over the batch, as the official code; an option makes it not",
}


# Options under which a method is another one: every check holds for them, too.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "anyup, small": ("anyup", {"dim": 64, "filter_size": 3}),
    "carafe, stages": ("carafe", {"share_stages": False}),
    "carafe, kernels": ("carafe", {"compressed": 7, "encoder_kernel": 5, "up_kernel": 3}),
    "dysample, stages": ("dysample", {"style": "pl", "dynamic_scope": True, "share_stages": False}),
    "dysample, groups": ("dysample", {"groups": 2}),
    "featup_jbu, norm": ("featup_jbu", {"norm": True}),
    "jbu, radius 1": ("jbu", {"radius": 1}),
    "loftup, image": ("loftup", {"colour_range": "image"}),
    "naf, deep": ("naf", {"dim": 128, "blocks": 3}),
    "sapa, stages": ("sapa", {"similarity": "gated", "share_stages": False}),
    "sapa, no positions": ("sapa", {"positions": False, "embedding": 8, "guide_dim": 16, "kernel": 3}),
    "shift_average, interleave": ("shift_average", {"mode": "interleave"}),
}


@cache
def case(name: str) -> MethodCase:
    method, options = VARIANTS.get(name, (name, {}))
    # Sharp weights: a pixel between two cells may lean to the other one.
    rounding = 0.1 if name in ("anyup", "anyup, small", "naf, deep") else 0.05
    return MethodCase(find_method(method), options, rounding=rounding)


@pytest.mark.parametrize("check", METHOD_CHECKS)
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_contract(name: str, check: str) -> None:
    if (name, check) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, check])
    try:
        METHOD_CHECKS[check](case(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))
