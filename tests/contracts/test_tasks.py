"""Every registered task keeps the contract."""

from __future__ import annotations

from functools import cache

import pytest

from upbench.registry import find_task, plugins
from upbench.testing import TASK_CHECKS, NotApplicable, TaskCase, toy_case


@cache
def case(name: str) -> TaskCase:
    return toy_case(find_task(name))


@pytest.mark.parametrize("check", TASK_CHECKS)
@pytest.mark.parametrize("name", sorted(plugins("task")))
def test_contract(name: str, check: str) -> None:
    try:
        TASK_CHECKS[check](case(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))
