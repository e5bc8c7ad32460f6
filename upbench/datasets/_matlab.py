"""MATLAB's files, old and new (HDF5): each that cannot be used is named in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from upbench.datasets._files import check_regular, read_bytes
from upbench.errors import UpbenchError
from upbench.system.cache import cache_dir, digest, replacing, sha256_file


def open_hdf5(file: Path) -> Any:
    """A file of MATLAB 7.3, as an `h5py.File`.

    Raises:
        UpbenchError: h5py is missing, or the file is cut short or none of these.
    """
    try:
        import h5py
    except ImportError as error:
        raise UpbenchError(f"{file.name} needs h5py: pip install 'upbench[datasets]'") from error
    try:
        check_regular(file)
        return h5py.File(file, "r")
    except OSError as error:
        text = " ".join(str(error).split())
        raise UpbenchError(
            f"cannot read {file}: it is cut short, or no .mat file of version 7.3 ({text})"
        ) from error


def load_mat(file: Path, *keys: str, data: bytes | None = None) -> dict[str, Any]:
    """Arrays of an older .mat file.

    Args:
        file: The file.
        keys: What it must have.
        data: Its content, where that is at hand.

    Raises:
        UpbenchError: It is damaged, or lacks a key.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UpbenchError(f"{file.name} needs scipy: pip install 'upbench[datasets]'") from error
    content = read_bytes(file) if data is None else data
    try:
        found: dict[str, Any] = loadmat(io.BytesIO(content), variable_names=keys)
    except Exception as error:  # of a damaged file it raises anything
        raise UpbenchError(f"cannot read {file}: it is damaged, or no .mat file") from error
    for key in keys:
        if key not in found:
            raise UpbenchError(f"{file} has no '{key}'")
    return found


def file_digest(file: Path) -> str:
    """SHA-256 of a large file; kept in the cache until its size or date changes.

    Raises:
        UpbenchError: It cannot be read.
    """
    try:
        stamp = file.stat()
    except OSError as error:
        raise UpbenchError(f"cannot read {file}: {error.strerror}") from error
    note = cache_dir("datasets") / digest("file", file.absolute(), stamp.st_size, stamp.st_mtime_ns)
    if note.is_file() and (known := note.read_text().strip()):
        return known
    found = sha256_file(file)
    with replacing(note) as temporary:
        temporary.write_text(found)
    return found
