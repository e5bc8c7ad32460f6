"""What the commands share: the parser that raises, and readers of values."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from upbench.errors import UpbenchError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UpbenchError` instead of leaving the process."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UpbenchError(f"{message}; see '{self.prog} --help'")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its line in the help, its arguments, and what it does (the exit code comes back)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], int]
    description: str = ""


def integer(text: str) -> int:
    """A whole number, as an argument's `type`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from None


def number(text: str) -> float:
    """A number, as an argument's `type`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from None


def settings(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as a mapping; a value is read as YAML reads it."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UpbenchError(f"{flag}: expected KEY=VALUE, got '{pair}'")
        # YAML wants a point in a float with an exponent; people write 1e-3
        number = re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE)
        found[key.replace("-", "_")] = float(value) if number else yaml.safe_load(value)
    return found
