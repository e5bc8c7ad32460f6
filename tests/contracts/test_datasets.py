"""Every registered dataset that comes with the package keeps the contract (others: see tests/datasets)."""

from __future__ import annotations

from functools import cache

import pytest

from upbench.registry import open_dataset, plugins
from upbench.testing import DATASET_CHECKS, DatasetCase, NotApplicable

PACKAGED = sorted(name for name, cls in plugins("dataset").items() if not cls.needs_root)


@cache
def case(name: str) -> DatasetCase:
    return DatasetCase(open_dataset(name))


@pytest.mark.parametrize("check", DATASET_CHECKS)
@pytest.mark.parametrize("name", PACKAGED)
def test_contract(name: str, check: str) -> None:
    try:
        DATASET_CHECKS[check](case(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))
