"""What the commands share: the parser that raises, and readers of values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from upbench.errors import UpbenchError, named, printable
from upbench.system.outputs import emit
from upbench.values import LARGEST_CHANNELS, LARGEST_SIDE, whole


class Parser(argparse.ArgumentParser):
    """A parser that raises `UpbenchError` instead of leaving the process."""

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UpbenchError(f"{message}; see '{self.prog} --help'")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version: what cannot be written is told, where argparse would be silent."""
        emit(message, end="")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its line in the help, its arguments, and what it does (the exit code comes back)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], int]
    description: str = ""


_MOST_DIGITS = 18


def integer(text: str) -> int:
    """A whole number, as an argument's `type`."""
    if not re.fullmatch(r"[+-]?[0-9]+", text.strip()):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {named(text)}")
    if len(text.strip()) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at most {_MOST_DIGITS} digits, got {named(text)}"
        )
    return int(text)


def real(text: str) -> float:
    """A finite number, as an argument's `type`."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {named(text)}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {named(text)}")
    return value


def check_sizes(arguments: argparse.Namespace) -> None:
    """Raises UpbenchError for channels, a stride or a batch that nothing can have."""
    for name, most in (("channels", LARGEST_CHANNELS), ("stride", LARGEST_SIDE), ("batch", 100_000)):
        if (value := getattr(arguments, name)) is not None:
            whole(f"--{name}", value, most=most)


def number(text: str) -> float:
    """A number, as an argument's `type`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from None


def settings(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as a mapping; a value is read as YAML reads it."""
    from upbench.system.yaml_text import read_value

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UpbenchError(f"{flag}: expected KEY=VALUE, got {named(pair)}")
        name = key.replace("-", "_")
        if name in found:
            raise UpbenchError(f"{flag}: {named(key)} is given twice")
        found[name] = read_value(f"{flag} {printable(key)[:60]}", value)
    return found
