"""Claims on cells, so that two runs in one folder share the work: each cell is computed by one of them.

A claim is a lock on a file (`flock`), held by the process that plans and writes. The system lets go of it
when that process ends, however it ends, so that no claim outlives its run. Where the system knows no such
locks (Windows, some network file systems) every claim is granted, and two runs in one folder compute the same
cells.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from upbench.errors import UpbenchError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Claims:
    """The claims of one run.

    Attributes:
        folder: Where the lock files are; they vanish when a claim is let go of.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, int] = {}

    def take(self, key: str) -> bool:
        """Whether a cell is this run's now; no where another run has it.

        Raises:
            UpbenchError: The folder cannot be written.
        """
        if key in self._held or fcntl is None:
            return True
        path = self.folder / f"{key}.lock"
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # another run was through and took the folder away in between
                continue
            except OSError as error:
                raise UpbenchError(f"cannot write {path}: {error.strerror}") from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return False
            except OSError:  # a file system without locks
                os.close(handle)
                return True
            if _is_there(path, handle):
                self._held[key] = handle
                return True
            os.close(handle)  # its holder let go of it and took it away in between

    def drop(self, key: str) -> None:
        """Lets go of a claim."""
        handle = self._held.pop(key, None)
        if handle is not None:
            with suppress(OSError):  # while the lock is held, so that nobody waits on a file without a name
                (self.folder / f"{key}.lock").unlink()
            os.close(handle)

    def close(self) -> None:
        """Lets go of all claims."""
        for key in list(self._held):
            self.drop(key)
        if self.folder.is_dir():
            for path in self.folder.glob("*.lock"):  # of runs that were killed when their cell was finished
                if self.take(path.stem):
                    self.drop(path.stem)
        with suppress(OSError):
            self.folder.rmdir()


def _is_there(path: Path, handle: int) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        named = os.stat(path)
    except OSError:
        return False
    own = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)
