"""Numbers in files of NumPy (.npy, .npz), as datasets store depth, normals and label maps."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np

from upbench.datasets._files import MOST_BYTES, read_bytes
from upbench.errors import UpbenchError, printable

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"


def read_array(file: Path, key: str | None = None, data: bytes | None = None) -> np.ndarray:
    """The numbers in a file. Nothing is unpickled: arrays of Python objects could run any code.

    Args:
        file: A .npy or .npz, compressed or not.
        key: Which array of a .npz; None where it holds one.
        data: Its content, where that is at hand.

    Raises:
        UpbenchError: It cannot be read, is damaged, holds something else than booleans, integers or floats,
            has no such array, or would take more than `MOST_BYTES`.
    """
    data = read_bytes(file) if data is None else data
    try:
        if data.startswith(_ZIP):
            name, data = _member(file, key, data)
            where = f"{file}, array '{name}'"
        else:
            where = str(file)
        if not data.startswith(_NPY):
            raise UpbenchError(f"cannot read {where}: it is no array of NumPy; save it with numpy.save")
        shape, dtype, held = _head(data)
        if dtype.kind not in "biuf":
            raise UpbenchError(f"cannot read {where}: it holds {_told(dtype)}, not plain numbers; {_ADVICE}")
        if any(side < 0 for side in shape) or int(np.prod(shape, dtype=object)) * dtype.itemsize > held:
            raise UpbenchError(
                f"cannot read {where}: it is too short for an array {list(shape)}; copy it again"
            )
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except UpbenchError:
        raise
    except Exception as error:  # damaged heads raise anything
        text = re.sub(" object at 0x[0-9a-f]+", "", printable(error))
        what = f"{type(error).__name__}: {text}"
        raise UpbenchError(f"cannot read {file}: it is damaged, copy it again ({what})") from error


_ADVICE = "convert it to floats or integers and save it with numpy.save(..., allow_pickle=False)"


def _told(dtype: np.dtype) -> str:
    return "Python objects, which are never unpickled" if dtype.hasobject else f"values of type {dtype}"


def _member(file: Path, key: str | None, data: bytes) -> tuple[str, bytes]:
    """Name and content of an array of a .npz."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = {name.removesuffix(".npy"): name for name in archive.namelist()}
        if key is None and len(found) == 1:
            key = next(iter(found))
        if key not in found:
            asked = "say which array is meant" if key is None else f"it has no array '{key}'"
            raise UpbenchError(f"cannot read {file}: {asked}; it has {', '.join(sorted(found)) or 'none'}")
        if (size := archive.getinfo(found[key]).file_size) > MOST_BYTES:
            raise UpbenchError(
                f"cannot read {file}: array '{key}' has {size} bytes, the most is {MOST_BYTES}"
            )
        return key, archive.read(found[key])


def _head(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type that a .npy announces, and how many bytes follow."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype, len(data) - stream.tell()
