"""The files of a feature store: shards of consecutive images, how they are cut, and the lock.

A shard is a safetensors file of one tensor `[C, h, w]` an image, named by the image's index in its split
("000017"), with its class token `[C]` after it where the store has them ("000017.token"). Its metadata holds
what anybody wants to know of it, and, for the store: `store`, the store's key; `first`, the index of the
first image; `names`, the images' names, and `crc32`, one checksum an image, as JSON lists.

Files are read by plain reads, not mapped: pages of a mapped file count as memory of the process, and a long
run would seem to hold all that it has ever read. Nothing is kept open between two reads, so that a store may
be used from several threads and after a fork.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.system.cache import replacing
from upbench.system.progress import say

try:
    import fcntl
except ImportError:  # Windows: two processes do the same work, and the files stay whole
    fcntl = None  # type: ignore[assignment]

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
"""What features can be stored as."""

SHARD_BYTES = 128_000_000
SHARD_IMAGES = 256
"""A shard of a new store has about so many bytes, and at most so many images."""

Shape = tuple[int, int, int]

_CODES = {"float32": "F32", "float16": "F16"}
_BLOCK = 1 << 20
_OWN = ("store", "first", "names", "crc32")
_HUGE = (10**6, 10**6, 10**6)


class Damaged(Exception):
    """A file does not hold what it should, or is not there any more; the text says what is wrong."""


@dataclass(frozen=True)
class Format:
    """What all shards of a store have in common.

    Attributes:
        store: Key of the store: a shard with another one is not its shard.
        dtype: A key of `DTYPES`.
        token: Whether there are class tokens.
        about: Metadata for readers, of no use to the store.
    """

    store: str
    dtype: str
    token: bool = False
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Layout:
    """How a store is cut into shards, as the process that began it fixed it.

    Attributes:
        per_shard: Images in a shard.
        image_size: Bytes of the first image's features.
    """

    per_shard: int
    image_size: int

    @classmethod
    def of(cls, image_size: int) -> Layout:
        """That of a new store."""
        per_shard = max(1, min(SHARD_IMAGES, SHARD_BYTES // image_size))
        return cls(per_shard // 8 * 8 if per_shard > 8 else per_shard, image_size)  # whole batches

    @classmethod
    def load(cls, path: Path, format: Format) -> Layout | None:
        """Reads it; None where it is damaged, of another store, or not there."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            layout = cls(int(data["images_per_shard"]), int(data["bytes_per_image"]))
            return layout if layout.per_shard > 0 and data["store"] == format.store else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, path: Path, format: Format) -> None:
        """Writes it to a file that is whole or not there. Raises `UpbenchError` where that cannot be."""
        data = {"store": format.store, "images_per_shard": self.per_shard, "bytes_per_image": self.image_size}
        data |= {"dtype": format.dtype, "cls_token": format.token, **format.about}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Shard:
    """A shard that is on disk: its header, which was read, and its images, which were not.

    Attributes:
        path: Where it is.
        format: Of the store.
        first: Index of the first image.
        names: Names of the images.
        shapes: (C, h, w) of each image.
        widths: C of each image's class token; () in a store without them.
        checksums: CRC-32 of each image's bytes, those of its token included.
        offsets: Where each image starts in the file, and where the last one ends.
        identity: What tells this file from one that takes its place.
    """

    path: Path
    format: Format
    first: int
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    widths: tuple[int, ...]
    checksums: tuple[int, ...]
    offsets: tuple[int, ...]
    identity: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def nbytes(self, count: int | None = None) -> int:
        """Bytes of the first `count` images; of all by default."""
        end = len(self) if count is None else min(count, len(self))
        return self.offsets[end] - self.offsets[0]

    @classmethod
    def open(cls, path: Path, format: Format, first: int) -> Shard:
        """Reads the header of a shard, and no features.

        Raises:
            FileNotFoundError: There is none.
            Damaged: It is not a whole shard of this store that starts with the image `first`.
            UpbenchError: The system refuses to read it.
        """
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                (length,) = struct.unpack("<Q", _exactly(file, 0, 8))
                if length > status.st_size - 8:
                    raise Damaged("its header is too long")
                text = _exactly(file, 8, length)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            names, shapes, widths, checksums, start = _parse(text, format)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Damaged("its header makes no sense") from error
        if start != first:
            raise Damaged("it holds other images")
        offsets = [8 + length]
        for position, shape in enumerate(shapes):
            numbers = math.prod(shape) + (widths[position] if widths else 0)
            offsets.append(offsets[-1] + numbers * format.itemsize)
        if offsets[-1] != status.st_size:
            raise Damaged(f"it has {status.st_size} bytes instead of {offsets[-1]}")
        return cls(path, format, first, names, shapes, widths, checksums, tuple(offsets), _identity(status))

    def verify(self) -> None:
        """Checks all checksums, the first time that this process does so.

        Raises:
            Damaged: The file has changed in any way.
        """
        key = (str(self.path), *self.identity)
        if key in _verified:
            return
        block = memoryview(bytearray(_BLOCK))
        with self._opened() as file:
            for position, expected in enumerate(self.checksums):
                checksum, start, end = 0, self.offsets[position], self.offsets[position + 1]
                while start < end:
                    part = block[: min(_BLOCK, end - start)]
                    _read_into(file, start, part)
                    checksum = zlib.crc32(part, checksum)
                    start += len(part)
                if checksum != expected:
                    raise Damaged(f"the checksum of '{self.names[position]}' differs")
        _verified.add(key)

    def read(self, position: int, out: Tensor | None = None) -> Tensor:
        """Features of an image: `[C, h, w]` in the store's dtype, on the CPU.

        Args:
            position: Of the image in this shard.
            out: Where to put them: contiguous, of the right shape and dtype. A fresh tensor by default.

        Raises:
            Damaged: The file has changed or is gone.
        """
        if out is None:
            out = torch.empty(self.shapes[position], dtype=DTYPES[self.format.dtype])
        with self._opened() as file:
            _read_into(file, self.offsets[position], as_bytes(out))
        return out

    def token(self, position: int) -> Tensor:
        """Class token of an image: `[C]` in the store's dtype, on the CPU. Raises as `read` does."""
        out = torch.empty(self.widths[position], dtype=DTYPES[self.format.dtype])
        with self._opened() as file:
            _read_into(file, self.offsets[position + 1] - out.nbytes, as_bytes(out))
        return out

    @contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        with file:
            if _identity(os.fstat(file.fileno())) != self.identity:
                raise Damaged("another file has taken its place")
            yield file


class ShardWriter:
    """Writes a shard into a file, image by image: memory holds none of them.

    The header, which stands first, is written last: its room is known from the names.
    """

    def __init__(self, file: BinaryIO, format: Format, first: int, names: Sequence[str]) -> None:
        """
        Args:
            file: An empty file.
            format: Of the store.
            first: Index of the first image.
            names: Names of all images to come.
        """
        self._file, self._format, self._first, self._names = file, format, first, tuple(names)
        self._shapes: list[Shape] = []
        self._widths: list[int] = []
        self._checksums: list[int] = []
        count = len(self._names)
        widths = [_HUGE[0]] * count if format.token else []
        largest = _header(format, first, self._names, [_HUGE] * count, widths, [2**32] * count)
        self._room = len(largest) + -len(largest) % 8
        file.seek(8 + self._room)

    def add(self, features: Tensor, token: Tensor | None = None) -> int:
        """Writes the next image and gives its checksum.

        Args:
            features: `[C, h, w]`, contiguous, on the CPU, in the store's dtype.
            token: `[C]`, likewise, in a store of tokens.
        """
        data = as_bytes(features)
        checksum = zlib.crc32(data)
        self._file.write(data)
        if token is not None:
            data = as_bytes(token)
            checksum = zlib.crc32(data, checksum)
            self._file.write(data)
            self._widths.append(len(token))
        channels, height, width = features.shape
        self._shapes.append((channels, height, width))
        self._checksums.append(checksum)
        return checksum

    def finish(self) -> None:
        """Writes the header and waits until all is on the disk."""
        text = _header(self._format, self._first, self._names, self._shapes, self._widths, self._checksums)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def alone(path: Path, waiting: str) -> Iterator[None]:
    """A block that one process (and one thread) at a time is in, as far as the system knows locks.

    The lock goes with its process, however that ends.

    Args:
        path: The lock's file; it stays.
        waiting: Said once where another process is in the block.
    """
    with ExitStack() as stack:
        if fcntl is not None:
            with suppress(OSError):  # a file system that has no locks, or is read-only
                file = stack.enter_context(path.open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(waiting)
                    fcntl.flock(file, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # although a forked child may have it open
        yield


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


_verified: set[tuple[Any, ...]] = set()
"""Shards whose checksums this process has found to be right."""


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _exactly(file: io.FileIO, offset: int, count: int) -> bytes:
    data = bytearray(count)
    _read_into(file, offset, memoryview(data))
    return bytes(data)


def _read_into(file: io.FileIO, offset: int, view: memoryview) -> None:
    try:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise Damaged("it is too short")
            view = view[count:]
    except OSError as error:
        raise _unreadable(Path(file.name), error) from error


def _unreadable(path: Path, error: OSError) -> Exception:
    """What an error of the system means: that the file is lost, or that somebody must mend something else."""
    if error.errno in (errno.ENOENT, errno.EIO, errno.ESTALE):
        return Damaged(str(error.strerror))
    return UpbenchError(f"cannot read {path}: {error.strerror}")


def _header(
    format: Format,
    first: int,
    names: Sequence[str],
    shapes: Sequence[Shape],
    widths: Sequence[int],
    checksums: Sequence[int],
) -> bytes:
    """The JSON text of a shard's header."""
    own = (format.store, str(first), json.dumps(names), json.dumps(checksums))
    entries: dict[str, Any] = {"__metadata__": {**format.about, **dict(zip(_OWN, own, strict=True))}}
    offset = 0
    for position, shape in enumerate(shapes):
        key = f"{first + position:06d}"
        tensors: list[tuple[str, Sequence[int]]] = [(key, shape)]
        if widths:
            tensors.append((f"{key}.token", [widths[position]]))
        for name, sides in tensors:
            end = offset + math.prod(sides) * format.itemsize
            entries[name] = {
                "dtype": _CODES[format.dtype],
                "shape": list(sides),
                "data_offsets": [offset, end],
            }
            offset = end
    return json.dumps(entries, separators=(",", ":")).encode()


def _parse(
    text: bytes, format: Format
) -> tuple[tuple[str, ...], tuple[Shape, ...], tuple[int, ...], tuple[int, ...], int]:
    """Names, shapes, widths of tokens, checksums and first index of a header that `_header` wrote.

    Raises:
        ValueError (and what Python makes of JSON of another form): It did not write it.
    """
    entries = json.loads(text)
    metadata = entries.pop("__metadata__")
    if metadata["store"] != format.store:
        raise ValueError("of another store")
    names, checksums, first = json.loads(metadata["names"]), json.loads(metadata["crc32"]), metadata["first"]
    shapes: list[Shape] = []
    widths: list[int] = []
    for name, entry in entries.items():
        if name.endswith(".token"):
            widths.extend(entry["shape"])
        else:
            channels, height, width = entry["shape"]
            shapes.append((channels, height, width))
    sides = [*widths, *(side for shape in shapes for side in shape)]
    if not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("sides that are none")
    if not all(type(checksum) is int and 0 <= checksum < 2**32 for checksum in checksums):
        raise ValueError("checksums that are none")
    if not len(names) == len(shapes) == len(checksums) == (len(widths) if format.token else len(names)):
        raise ValueError("not the same number of everything")
    about = {key: value for key, value in metadata.items() if key not in _OWN}
    same = Format(format.store, format.dtype, format.token, about)
    if not names or _header(same, int(first), names, shapes, widths, checksums) != text.rstrip(b" "):
        raise ValueError("not as it is written")
    return tuple(names), tuple(shapes), tuple(widths), tuple(checksums), int(first)
