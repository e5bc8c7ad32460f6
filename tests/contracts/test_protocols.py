"""Every registered protocol keeps the contract."""

from __future__ import annotations

from functools import cache

import pytest

from upbench.registry import find_protocol, plugins
from upbench.testing import PROTOCOL_CHECKS, ProtocolCase


@cache
def case(name: str) -> ProtocolCase:
    return ProtocolCase(find_protocol(name))


@pytest.mark.parametrize("check", PROTOCOL_CHECKS)
@pytest.mark.parametrize("name", sorted(plugins("protocol")))
def test_contract(name: str, check: str) -> None:
    PROTOCOL_CHECKS[check](case(name))
