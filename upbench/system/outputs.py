"""Where results go: stdout, stderr, and files that a user names. Imports no torch."""

from __future__ import annotations

import errno
import io
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upbench.errors import UpbenchError, harmless, named, reason, system_errors
from upbench.values import kind_of, user_path

LONGEST_LINE = 500
"""Characters of an error's line."""


def prepare_streams() -> None:
    """Makes stdout and stderr take any text, whatever the terminal's encoding, and be there at all.

    What an encoding does not have is written as an escape. A stdout that was closed fails when it is written
    to, as a full one does; a closed stderr takes what it is given, as nobody asked for it.
    """
    for number in (0, 1, 2):  # else the next file that is opened would be taken for stdout
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


class _Closed(io.TextIOBase):
    """The stdout of a process that was started without one."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


def emit(text: str, end: str = "\n") -> None:
    """Prints a result to stdout; what would move a terminal's cursor or colour it is written as an escape.

    Raises:
        UpbenchError: Stdout is closed or full.
        BrokenPipeError: Whoever reads it has seen enough.
    """
    with stdout_errors():
        print(harmless(text), end=end)


def flush() -> None:
    """Makes sure that stdout has what was printed; errors as `emit`."""
    with stdout_errors():
        sys.stdout.flush()


@contextmanager
def stdout_errors() -> Iterator[None]:
    """What goes wrong while stdout is written, as `emit` tells it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: "I/O operation on closed file"
        drop(sys.stdout)
        closed = isinstance(error, ValueError) or error.errno == errno.EBADF
        raise UpbenchError(
            f"cannot write to stdout: {'it is closed' if closed else reason(error)}"
        ) from error


def drop(stream: object) -> None:
    """Sends what is left of a stream to nowhere, so that the interpreter's last flush does not fail, too."""
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()  # type: ignore[attr-defined]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def complain(text: str, longest: int | None = LONGEST_LINE) -> None:
    """A line on stderr, cut in its middle where it is long; one that cannot be written is lost."""
    text = harmless(text)
    if longest is not None and len(text) > longest:
        half = longest // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop(sys.stderr)


def writable_file(what: str, path: str | os.PathLike[str]) -> Path:
    """Where a file that the user named goes, tried out before the work is done. It is left as it was.

    Args:
        what: What is to be written, as in "table".
        path: As a user writes it; its folder exists.

    Raises:
        UpbenchError: It is a folder, a device or a pipe, or no file can be made in its folder.
    """
    place = user_path(path)
    with system_errors(f"write the {what} to", path):
        try:
            mode: int | None = place.stat().st_mode
        except FileNotFoundError:
            mode = place.lstat().st_mode if place.is_symlink() else None
            if mode is not None:
                raise UpbenchError(
                    f"cannot write the {what} to {named(path)}: it is a link to something that is not there"
                ) from None
        if mode is not None and (kind := kind_of(mode)) != "a file":
            raise UpbenchError(f"cannot write the {what} to {named(path)}: it is {kind}, not a file")
        # The name of a file that takes another's place when it is whole is longer (`system.cache.replacing`).
        trial = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
        try:
            with trial.open("xb") as file:
                file.write(b"\n")  # permissions say nothing of a full disk
        finally:
            with suppress(OSError):
                trial.unlink()
    return place
