"""What users and plugins may give: the one place that says which numbers, words and paths are taken.

Each function returns the value where it is one, and raises `UpbenchError` where it is not: a line with the
name of the setting, what it takes, and what it was given. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from upbench.errors import UpbenchError, named, reason, shown, system_errors, unknown

LONGEST_LABEL = 200
"""Characters of what a row may be called."""
LARGEST_CHANNELS = 1_000_000
LARGEST_SIDE = 1_000_000
"""Of an image, in pixels; what fits into memory is less (`upbench.system.environment.check_memory`)."""
LARGEST_COUNT = 1_000_000_000
LARGEST_SEEDS = 1000

_WORD = re.compile(r"\w[\w.+-]*")
_LONGEST_WORD = 64
_INVISIBLE = "\u200c\u200d"  # they join letters, and faces into families


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST_COUNT) -> int:
    """A whole number from `least` to `most`; True and 3.0 are none."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or not least <= value <= most:
        too_large = fits and value > most
        bounds = (
            f"of at least {least}" if most == LARGEST_COUNT and not too_large else f"from {least} to {most}"
        )
        raise UpbenchError(f"{name} must be a whole number {bounds}, got {shown(value)}")
    return value  # type: ignore[no-any-return]


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """A finite number from `low` (or, with `above`, greater than it) to `high`; True and "3" are none."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or not _finite(value) or (above and value == low):
        bounds = []
        if low > -math.inf:
            bounds.append(f"{'above' if above else 'of at least'} {low:g}")
        if high < math.inf:
            bounds.append(f"{'of ' if not bounds else ''}at most {high:g}")
        wanted = f"a number {' and '.join(bounds)}" if bounds else "a finite number"
        raise UpbenchError(f"{name} must be {wanted}, got {shown(value)}")
    return value  # type: ignore[no-any-return]


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise UpbenchError(f"{name} must be true or false, got {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words; the nearest is suggested."""
    if not isinstance(value, str) or value not in choices:
        raise unknown(name, value if isinstance(value, str) else shown(value), choices)
    return value


def text(name: str, value: Any, *, empty: bool = False) -> str:
    """Text that a record can hold and a line can show: printable, on one line, and valid Unicode."""
    if not isinstance(value, str) or not (empty or value.strip()):
        raise UpbenchError(f"{name} must be text, got {shown(value)}")
    odd = next((c for c in value if not c.isprintable() and c not in _INVISIBLE), None)
    if odd is not None:
        raise UpbenchError(f"{name} must be text of one line, got {shown(value)} with {_character(odd)}")
    return value


def _character(odd: str) -> str:
    if "\ud800" <= odd <= "\udfff":
        return "bytes that are not UTF-8"
    kind = "a line break" if odd in "\n\r\x0b\x0c\x85\u2028\u2029" else "the invisible character"
    return f"{kind} {odd.encode('unicode_escape').decode('ascii')}"


def label(name: str, value: Any) -> str:
    """What a row is called, or "": any text of one line, up to `LONGEST_LABEL` characters."""
    text(name, value, empty=True)
    if len(value) > LONGEST_LABEL:
        raise UpbenchError(f"{name} must have at most {LONGEST_LABEL} characters, got {len(value)}")
    if value and not value.strip():
        raise UpbenchError(f"{name} must not be blank")
    return value  # type: ignore[no-any-return]


def word(name: str, value: Any, taken: Iterable[str] = ("all",)) -> str:
    """The name of a plugin: one word that a command line can hold, and none that stands for something."""
    if not isinstance(value, str) or not _WORD.fullmatch(value) or len(value) > _LONGEST_WORD:
        raise UpbenchError(
            f"{name} {shown(value)} must be one word: letters, digits, '_', '-', '.' and '+', "
            f"at most {_LONGEST_WORD} of them, a letter or digit first"
        )
    if value in taken:
        raise UpbenchError(f"{name} '{value}' cannot be taken: it stands for something else")
    return value


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, `~` and `~name` being home folders.

    Raises:
        UpbenchError: There is no such user, or no file can have this name.
    """
    given = os.fspath(path)
    if "\0" in given:
        raise UpbenchError(f"{named(given)} is no path: it has a NUL character in it")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        who = given.split("/", 1)[0]
        whose = f"there is no user {named(who[1:])}" if len(who) > 1 else "HOME is not set"
        raise UpbenchError(f"cannot find the home folder of {named(given)}: {whose}") from error


def existing_folder(what: str, path: str | os.PathLike[str]) -> Path:
    """A folder that is there; arguments and errors as `existing_file`."""
    place, mode = _existing(what, path)
    if not stat.S_ISDIR(mode):
        raise UpbenchError(f"{what} {_plain(path)} is {kind_of(mode)}, not a folder")
    return place


def existing_file(what: str, path: str | os.PathLike[str]) -> Path:
    """A file that is there.

    Args:
        what: What it is called in errors, as in "config file".
        path: As a user writes it.

    Raises:
        UpbenchError: There is none, or what stands there is a folder, a pipe or a device (to read one could
            take forever).
    """
    place, mode = _existing(what, path)
    if not stat.S_ISREG(mode):
        raise UpbenchError(f"{what} {_plain(path)} is {kind_of(mode)}, not a file")
    return place


def _existing(what: str, path: str | os.PathLike[str]) -> tuple[Path, int]:
    """A path that is there, and what is (`st_mode`), its links followed."""
    place = user_path(path)
    try:
        return place, place.stat().st_mode
    except FileNotFoundError as error:
        link = place.is_symlink()
        more = " (it is a link to something that is not there)" if link else ""
        raise UpbenchError(f"{what} not found: {_plain(path)}{more}") from error
    except (OSError, ValueError) as error:
        raise UpbenchError(f"cannot read {what} {_plain(path)}: {reason(error)}") from error


def kind_of(mode: int) -> str:
    """What stands at a path that is no file: `st_mode` in words."""
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    ):
        if test(mode):
            return words
    return "a device"


def read_text(what: str, path: str | os.PathLike[str], most: int = 1_000_000) -> str:
    """The text of a small file that a user names.

    Raises:
        UpbenchError: As `existing_file`, or it cannot be read, is not UTF-8, or has more bytes than `most`.
    """
    place = existing_file(what, path)
    with system_errors(f"read {what}", path):
        size = place.stat().st_size
        if size > most:
            raise UpbenchError(f"{what} {_plain(path)} is too large: {size} bytes, at most {most} are read")
        return place.read_text(encoding="utf-8-sig")


def _plain(path: str | os.PathLike[str]) -> str:
    """A path as errors show it: without quotes, unless it had to be shortened."""
    shortened = named(os.fspath(path))
    return shortened[1:-1] if shortened.endswith("'") else shortened
