"""How contract checks are collected and run; the checks themselves are in the modules beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Case = TypeVar("Case")
Checks = Mapping[str, Callable[[Case], None]]


class NotApplicable(Exception):
    """Raised by a check that says nothing about a plugin; its text says why."""


class ContractError(AssertionError):
    """A plugin breaks its contract; the text names every check that failed."""


def run_checks(title: str, checks: Checks[Any], case: Any, skip: Mapping[str, str]) -> dict[str, str]:
    """Runs every check, then reports.

    Args:
        title: What is checked, for the message.
        checks: Name -> check.
        case: What the checks are called with.
        skip: Name of a check that the plugin does not pass by design -> why.

    Returns:
        Name -> "ok", or why it was skipped.

    Raises:
        ContractError: A check failed.
        ValueError: `skip` names a check that there is not.
    """
    if unknown := sorted(set(skip) - set(checks)):
        raise ValueError(f"no such check: {', '.join(unknown)}; there are {', '.join(checks)}")
    outcome: dict[str, str] = {}
    faults: list[tuple[str, Exception]] = []
    for name, check in checks.items():
        if name in skip:
            outcome[name] = f"skipped: {skip[name]}"
            continue
        try:
            check(case)
        except NotApplicable as reason:
            outcome[name] = f"skipped: {reason}"
        except Exception as error:
            faults.append((name, error))
        else:
            outcome[name] = "ok"
    if faults:
        lines = [f"  {name}: {type(error).__name__}: {error}" for name, error in faults]
        text = f"{title} fails {len(faults)} of {len(checks)} checks:\n" + "\n".join(lines)
        raise ContractError(text) from faults[0][1]
    return outcome


def require(condition: object, message: str) -> None:
    """Fails the check with `message` unless the condition holds."""
    if not condition:
        raise ContractError(message)
