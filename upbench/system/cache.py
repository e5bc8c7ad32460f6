"""The cache folder, and files that are either whole or not there. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from upbench.errors import UpbenchError, reason
from upbench.values import user_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 20
_DAY = 86400.0
_LONGEST_NAME = 150
"""Bytes of a file's name that its temporary files repeat: theirs are longer, and a system takes 255."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir(*parts: str) -> Path:
    """The folder `$UPBENCH_CACHE` (else `~/.cache/upbench`), or one in it, created where it is missing.

    Raises:
        UpbenchError: It cannot be created.
    """
    root = os.environ.get("UPBENCH_CACHE")
    folder = user_path(root or Path("~", ".cache", "upbench")).joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpbenchError(
            f"cannot create cache folder {folder}: {reason(error)}; set UPBENCH_CACHE"
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
    text = "\x1f".join(str(p) for p in parts)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`: takes its place when the block ends well, vanishes when it does not.

    A reader sees the old file or the new one, never a part of it, even after `kill -9`; of several writers
    the last one wins. What killed writers left behind is removed (see `_remove_orphans`).

    Raises:
        UpbenchError: The disk is full, the folder cannot be written, or `path` is a folder.
    """
    _remove_orphans(path)
    temporary = path.with_name(f"{_prefix(path)}{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with locked(temporary):
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        if (told := _told(path, temporary, error)) is None:
            raise
        raise told from error
    except RuntimeError as error:  # as which torch.save tells what the system said
        cause = _system_error(error)
        if cause is None or (told := _told(path, temporary, cause)) is None:
            raise
        raise told from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(path: Path, mode: int = 0o666) -> Iterator[None]:
    """Makes an empty file, and holds a lock on it that says that somebody is writing it.

    The system lets go of the lock when the process ends, however it ends. Where it knows no locks on files,
    there is only the file.

    Args:
        path: Of the file.
        mode: Its permissions, before the user's mask.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), mode)
    try:
        if fcntl is None:  # an open file could not be given another name, either
            os.close(handle)
            handle = -1
        else:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def abandoned(path: Path) -> bool:
    """Whether a file that was made by `locked` has no writer any more, wherever that was.

    Nobody holds its lock, and it was not written for a day: on some network file systems a lock is seen on
    the machine alone that holds it. Where locks are not known at all, nobody can tell, and the answer is no.
    """
    if fcntl is None:
        return False
    try:
        if time.time() - path.stat().st_mtime < _DAY:
            return False
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def _told(path: Path, temporary: Path, error: OSError) -> UpbenchError | None:
    """An error of the system while a file was written, in a line; None where it is about something else."""
    if error.filename not in (None, str(temporary), temporary):
        return None  # another file, which the block reads
    if isinstance(error, (ConnectionError, TimeoutError)):
        return None  # a peer, or the terminal
    reason = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return UpbenchError(f"disk full: cannot write {path} ({reason})")
    return UpbenchError(f"cannot write {path}: {reason}")


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that an exception was raised for, if there is one."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _prefix(path: Path) -> str:
    """What the names of a file's temporary files begin with."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = digest(name)
    return f".{name}."


@cache
def _machine() -> str:
    """Tells process numbers of this machine, since it was started and in this container, from all others."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return digest(*parts)[:8]


def _remove_orphans(path: Path) -> None:
    """Deletes temporary files for `path` whose writer is gone.

    Of a writer where process numbers mean the same as here that is known for sure, of others see `abandoned`.
    """
    pattern = re.compile(re.escape(_prefix(path)) + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")
    with suppress(OSError):
        for other in path.parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match is None:
                continue
            gone = not _alive(int(match[2])) if match[1] == _machine() else abandoned(other)
            if gone:
                with suppress(FileNotFoundError):
                    other.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
