"""The cache folder, and files that are either whole or not there. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upbench.errors import UpbenchError

_CHUNK = 1 << 20


def cache_dir(*parts: str) -> Path:
    """The folder `$UPBENCH_CACHE` (else `~/.cache/upbench`), or one in it, created where it is missing.

    Raises:
        UpbenchError: It cannot be created.
    """
    root = os.environ.get("UPBENCH_CACHE")
    folder = Path(root).expanduser() if root else Path.home() / ".cache" / "upbench"
    folder = folder.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpbenchError(
            f"cannot create cache folder {folder}: {error.strerror}; set UPBENCH_CACHE"
        ) from error
    return folder


def safe_name(text: str) -> str:
    """`text` as a file name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UpbenchError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise UpbenchError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the parts' text."""
    return hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: takes its place when the block ends well, vanishes when it does not.

    A reader sees the old file or the new one, never a part of it, even after `kill -9`; of several writers
    the last one wins. What killed writers on this machine left behind is removed.

    Raises:
        UpbenchError: The disk is full, the folder cannot be written, or `path` is a folder.
    """
    _remove_orphans(path)
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise  # of another file, which the block reads
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UpbenchError(f"disk full: cannot write {path} ({error.strerror})") from error
        raise UpbenchError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _remove_orphans(path: Path) -> None:
    """Deletes temporary files for `path` whose process, on this machine, is gone."""
    pattern = re.compile(re.escape(f".{path.name}.{_host()}-") + r"(\d+)-[0-9a-f]{8}\.tmp")
    with suppress(OSError):
        for other in path.parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match and not _alive(int(match[1])):
                other.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
