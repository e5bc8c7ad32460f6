"""Errors that a user can act on, and the words they are told in."""

from __future__ import annotations

import difflib
import errno
import os
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST_NAME = 120
_HARMLESS = "\n\t\u200c\u200d"  # the last two join letters, and faces into families
_CONTAINERS = (dict, list, tuple, set, frozenset)
_BRIEF = reprlib.Repr()  # a value that refers to itself over and over has no end in `repr`
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxtuple = 4, 12, 12, 12
_BRIEF.maxstring = _BRIEF.maxother = 60
_REASONS = {
    errno.ENOENT: "there is no such file or folder",
    errno.EEXIST: "a file is in its place",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "its links lead in a circle",
    errno.ENAMETOOLONG: "its name is too long for the file system",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the quota of disk space is used up",
    errno.EROFS: "the file system is read-only",
    errno.EMFILE: "too many files are open",
    errno.EIO: "the disk or its connection failed",
}


class UpbenchError(Exception):
    """Bad input: its text is one line that names the thing and, where there is one, the nearest right one.

    The command line prints it without a traceback and exits with code 2. What a name or another library's
    message brings into the text cannot break the line or reach a terminal: it is written as `printable` does.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(printable(text))


def printable(text: object) -> str:
    r"""Text as one line that any terminal, file and JSON can hold.

    White space becomes one blank; the rest is written as `harmless` does.
    """
    return harmless(" ".join(str(text).split()))


def harmless(text: str) -> str:
    r"""Text, lines and all, that does nothing to a terminal but stand there.

    Control characters, those that change the direction of text, and halves of a pair (bytes of a name that
    are not UTF-8) are written as escapes such as `\x1b`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def named(value: object) -> str:
    """A name or path as an error shows it: in quotes, on one line, shortened in its middle."""
    text = printable(value)
    if len(text) <= _LONGEST_NAME:
        return f"'{text}'"
    half = _LONGEST_NAME // 2 - 2
    return f"'{text[:half]} ... {text[-half:]}' ({len(text)} characters)"


def shown(value: Any) -> str:
    """A value as errors show it: in one line, cut where it is long."""
    try:
        text = _BRIEF.repr(value) if isinstance(value, _CONTAINERS) else repr(value)
    except Exception as error:  # a class whose repr fails, a number of too many digits
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    text = printable(text)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def system_errors(what: str, path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """What the system refuses within, as one line: `cannot WHAT 'PATH': REASON`.

    Args:
        what: What is tried, after "cannot": "read the config file", "write the table to".
        path: The file or folder that it is tried on; None if `what` says it all.

    Raises:
        UpbenchError: For an OSError, text that is not UTF-8, a path that no file can have (a NUL in it), too
            little memory, or nesting that is too deep. The original is its cause.
    """
    try:
        yield
    except (OSError, UnicodeError, MemoryError, RecursionError) as error:
        thing = what if path is None else f"{what} {named(os.fspath(path))}"
        raise UpbenchError(f"cannot {thing}: {reason(error)}") from error
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        thing = what if path is None else f"{what} {named(os.fspath(path))}"
        raise UpbenchError(f"cannot {thing}: its name has a NUL character in it") from error


def reason(error: BaseException) -> str:
    """Why the system refused something, in words: "permission denied", "it is not text in UTF-8"."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in UTF-8 (byte {error.start})"
    if isinstance(error, UnicodeError):
        return "it has a character that cannot be written"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError):
        if error.errno in _REASONS:
            return _REASONS[error.errno]
        return printable(error.strerror or error) or type(error).__name__
    if isinstance(error, (TypeError, ValueError)):  # what a function says of what it was given
        return printable(error) or type(error).__name__
    return f"{type(error).__name__}: {printable(error)}"


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was most likely meant to be, or None."""
    choices = list(choices)
    folded = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if match:
        return folded[match[0]]
    starts = sorted(choice for choice in choices if choice.lower().startswith(name.lower()) and name)
    return starts[0] if starts else None


def unknown(kind: str, name: Any, choices: Iterable[str], more: str = "") -> UpbenchError:
    """The error for a name that is not known: what it was meant to be, or what there is.

    Args:
        kind: What the name stands for, as in "method".
        name: The name as it was given.
        choices: The names that would have been right.
        more: A clause to append, such as how to list the right names.
    """
    choices = sorted(choices)
    guess = nearest(str(name)[:_LONGEST_NAME], choices)
    hint = f"did you mean '{guess}'?" if guess else f"known: {', '.join(choices) or 'none'}"
    return UpbenchError(f"unknown {kind} {named(name)}; {hint}{'; ' + more if more else ''}")
