"""Small files that anybody may have written: read whole, or refused in one line. Imports no torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from upbench.errors import UpbenchError, named, system_errors

_KINDS = (
    (stat.S_ISDIR, "it is a folder, not a file"),
    (stat.S_ISFIFO, "it is a pipe, not a file"),
    (stat.S_ISSOCK, "it is a socket, not a file"),
)


def read_file(path: str | os.PathLike[str], what: str, most: int) -> bytes:
    """The content of a regular file.

    Nothing is waited for (a pipe that nobody writes to), and no more than `most` bytes are ever held.

    Args:
        path: The file.
        what: What it is called in errors, as in "record".
        most: Bytes that it may have.

    Raises:
        UpbenchError: It is not there, cannot be read, is no regular file, or is larger.
    """
    with system_errors(f"read {what}", path):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                why = next(
                    (text for fits, text in _KINDS if fits(found.st_mode)), "it is a device, not a file"
                )
                raise UpbenchError(f"cannot read {what} {named(path)}: {why}")
            content = file.read(most + 1)
    if len(content) > most:
        size = max(found.st_size, len(content))
        raise UpbenchError(
            f"cannot read {what} {named(path)}: it has {size:,} bytes, and no {what} has more than {most:,}"
        )
    return content


def is_file(path: Path) -> bool:
    """Whether a path is a regular file, links followed; no where the system does not tell."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
