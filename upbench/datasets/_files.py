"""Image files as everything here reads them: upright RGB bytes, and label maps with the numbers in the file.

A file that cannot be used is named in one line, whatever is wrong with it: a pipe, an empty file, a damaged
one, one whose pixels would fill the memory, one that does not say which of its pictures is meant.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upbench.errors import UpbenchError, printable, reason, system_errors

MOST_BYTES = 2**31
"""Of a file: more than an image of `MOST_PIXELS` takes without compression."""
MOST_PIXELS = 2 * 89_478_485
"""Of an image: where Pillow refuses by default, whatever it was told since. Half a gigabyte of colours."""
MOST_SIDES = 500
"""How often the longer side of an image may hold the shorter one. Protocols resize the shorter side, to 448
pixels as a rule: the longer one then has 224 000, and the image 300 megabytes."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
"""What is read, by Pillow's names; others among its formats start programs (EPS) or have no signature."""
_LABEL_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
"""Those that keep numbers as they are."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright; 1 is upright as it is."""
_SWAPPED = (5, 6, 7, 8)

_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG that can hold an orientation."""
_BITS, _COMPRESSION, _PHOTOMETRIC = 258, 259, 262  # tags of a TIFF
_LOSSY_TIFF = (6, 7, 34892, 50001)  # JPEG, in three ways, and WebP


def read_bytes(file: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content.

    Args:
        file: A regular file.
        most: Bytes that it may have.

    Raises:
        UpbenchError: It cannot be read, is empty, is larger, or is not a regular file: reading a pipe would
            wait for ever.
    """
    check_regular(file, most)
    with system_errors(f"read {file}"):
        return file.read_bytes()


def read_text(file: Path) -> str:
    """The content of a list, an index or a note, in UTF-8 with or without a byte order mark.

    Raises:
        UpbenchError: As `read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UpbenchError(f"cannot read {file}: {reason(error)}; save it as UTF-8") from error


def check_regular(file: Path, most: int | None = None) -> None:
    """Does nothing for a file that can be read to its end.

    Args:
        file: Anything.
        most: Bytes that it may have, where it is to be read at once.

    Raises:
        UpbenchError: It is not there, is empty, has more than `most` bytes, or is a folder, a pipe or a
            device.
    """
    with system_errors(f"read {file}"):
        try:
            found = file.stat()
        except FileNotFoundError:
            if not file.is_symlink():
                raise
            target = file.readlink()
            raise UpbenchError(f"cannot read {file}: it links to {target}, which is not there") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UpbenchError(f"cannot read {file}: it is not a regular file but {kind}; move it away")
    if not found.st_size:
        raise UpbenchError(f"cannot read {file}: it is empty; copy it again, or remove it")
    if most is not None and found.st_size > most:
        raise UpbenchError(f"cannot read {file}: it has {found.st_size} bytes, the most is {most}")


def list_folder(folder: Path) -> list[Path]:
    """What lies in a folder, sorted.

    Raises:
        UpbenchError: It is not there, is no folder, or may not be read.
    """
    with system_errors(f"read the folder {folder}"):
        return sorted(folder.iterdir())


def read_image(file: Path, data: bytes | None = None) -> Tensor:
    """`[3, H, W]` uint8 RGB, upright as its EXIF orientation says.

    Grey levels of 16 bits are brought to 8, rounded; colours of 16 bits lose their lower 8. An alpha channel
    is left out: the colours are those that are stored. Colour profiles are not applied.

    Args:
        file: PNG, JPEG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000 or AVIF.
        data: Its content, where that is at hand.

    Raises:
        UpbenchError: It cannot be read, is no image, holds floats, integers of 32 bits or several pictures,
            or has more pixels or longer sides than can be handled.
    """
    picture = _decode(file, data)
    with _named(file):
        if picture.mode == "F":
            raise _Unfit("its values are floats, not colours: save it with 8 or 16 bits a channel")
        if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
            raise _Unfit("its values are integers of 32 bits, not colours: save it with 8 or 16 bits")
        picture = _upright(picture)
        if picture.mode.startswith("I"):
            wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
            grey = ((wide + 128) // 257).astype(np.uint8)
            pixels = np.repeat(grey[..., None], 3, axis=2)
        else:
            pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def image_size(file: Path) -> tuple[int, int]:
    """(H, W) of an upright image, from the head of its file.

    Raises:
        UpbenchError: As `read_image`, as far as the head tells.
    """
    check_regular(file, MOST_BYTES)
    with _named(file), file.open("rb") as stream, Image.open(stream, formats=_formats()) as picture:
        _check_head(picture)
        width, height = picture.size
        if picture.format == "TIFF" or (picture.format == "PNG" and _ends_with_text(stream)):
            picture.load()  # these say their orientation at the end, or are rotated while they are read
            width, height = picture.size
        swapped = _orientation(picture) in _SWAPPED
    return (width, height) if swapped else (height, width)


def read_labels(file: Path, data: bytes | None = None) -> Tensor:
    """`[H, W]`, the numbers as they are stored: indices of a palette, or grey levels of 1 to 16 bits.

    A label map belongs to the upright image. One that has an EXIF orientation itself is made upright by it.

    Args:
        file: A PNG (or TIFF, BMP, GIF) of one channel.
        data: Its content, where that is at hand.

    Returns:
        uint8; int32 where the file has 16 bits.

    Raises:
        UpbenchError: It cannot be read, has several channels or pictures, or a format that changes numbers.
    """
    if data is None:
        data = read_bytes(file)
    picture = _decode(file, data)
    with _named(file):
        tags = picture.tag_v2 if picture.format == "TIFF" else {}  # type: ignore[attr-defined]
        if unfit := _no_labels(picture, tags):
            raise UpbenchError(
                f"label map {file} {unfit}; store the class of each pixel as a number in a PNG of one channel"
            )
        upright = _upright(picture)
        if picture.mode.startswith("I"):
            return torch.from_numpy(np.asarray(upright).astype(np.int32))
        return torch.from_numpy(np.array(upright, dtype=np.uint8) // _stretch(picture, data))


def read_values(file: Path, data: bytes | None = None) -> Tensor:
    """`[H, W]`, the numbers of a picture of one channel as they are stored, such as depth in millimetres.

    Args:
        file: A PNG, TIFF, BMP or GIF.
        data: Its content, where that is at hand.

    Returns:
        float32 where the file holds floats, int32 else. Nothing is looked at: floats may be NaN.

    Raises:
        UpbenchError: As `read_labels`, or its pixels are indices of a palette.
    """
    data = read_bytes(file) if data is None else data
    picture = _decode(file, data)
    with _named(file):
        tags = picture.tag_v2 if picture.format == "TIFF" else {}  # type: ignore[attr-defined]
        if picture.mode not in ("L", "1", "F", "I") and not picture.mode.startswith("I;16"):
            raise _Unfit(f"it must have one channel of numbers, its pixels are {picture.mode}")
        if unfit := _changed(picture, tags):
            raise _Unfit(f"it {unfit}")
        values = np.asarray(_upright(picture)).astype(np.float32 if picture.mode == "F" else np.int32)
        return torch.from_numpy(values // _stretch(picture, data) if picture.mode == "L" else values)


def _stretch(picture: Image.Image, data: bytes) -> int:
    """By how much Pillow multiplied grey levels of 2 or 4 bits, to fill 0..255."""
    if picture.mode != "L":
        return 1
    tags = picture.tag_v2 if picture.format == "TIFF" else {}  # type: ignore[attr-defined]
    bits = _grey_bits(data) if picture.format == "PNG" else (tags.get(_BITS) or (8,))[0]
    return {2: 85, 4: 17}.get(bits, 1)


def _no_labels(picture: Image.Image, tags: Any) -> str:
    """Why the values of a picture cannot be classes; "" if they can."""
    wide = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode not in ("L", "P", "1") and not wide:
        return f"must have one channel of 1 to 16 bits, its pixels are {picture.mode}"
    return _changed(picture, tags)


def _changed(picture: Image.Image, tags: Any) -> str:
    """Why the numbers of a picture are others than were meant; "" if they are not."""
    if picture.format not in _LABEL_FORMATS or tags.get(_COMPRESSION) in _LOSSY_TIFF:
        return f"is a {picture.format} file that need not keep numbers as they were"
    if tags.get(_PHOTOMETRIC) == 0:
        return "is a TIFF in which 0 stands for white, so that its numbers run backwards"
    return ""


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        # as of any picture: the method of PNGs decodes them all to look for what may follow the pixels
        value = Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raises anything; viewers show such an image as it is
        return 1
    return value if value in _UPRIGHT else 1


def _upright(picture: Image.Image) -> Image.Image:
    rotation = _UPRIGHT.get(_orientation(picture))
    return picture if rotation is None else picture.transpose(rotation)


def _ends_with_text(stream: BinaryIO) -> bool:
    """Whether a PNG has chunks behind its pixels that may hold an orientation; the stream stays in place."""
    place, seen = stream.tell(), False
    stream.seek(len(_PNG))
    try:
        while len(head := stream.read(8)) == 8:
            kind = head[4:]
            if seen and kind in _TEXTS:
                return True
            seen = seen or kind == b"IDAT"
            stream.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        stream.seek(place)


def _grey_bits(data: bytes) -> int:
    """Bits of a sample of a grey PNG; 8 for anything else."""
    is_grey_png = data.startswith(_PNG) and len(data) > 25 and data[25] == 0
    return data[24] if is_grey_png else 8


def _decode(file: Path, data: bytes | None) -> Image.Image:
    """The one picture of a file, as it is stored."""
    data = read_bytes(file) if data is None else data
    with _named(file):
        if not data:
            raise _Unfit("it is empty; copy it again, or remove it")
        picture = Image.open(io.BytesIO(data), formats=_formats())
        _check_head(picture)
        picture.load()
    return picture


def _check_head(picture: Image.Image) -> None:
    """Raises _Unfit for a picture that would fill the memory, or that is not the only one of its file."""
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise _Unfit(f"its {width} x {height} pixels are too many (the most is {MOST_PIXELS}); scale it down")
    if max(width, height) > MOST_SIDES * min(width, height):
        raise _Unfit(
            f"its {width} x {height} pixels are a strip, which would fill the memory when its shorter side "
            f"is resized; cut it (the longer side may be {MOST_SIDES} times the shorter)"
        )
    # an MPO is a photo with previews behind it, as many phones write it under the name of a JPEG
    if picture.format != "MPO" and (count := getattr(picture, "n_frames", 1)) > 1:
        raise _Unfit(f"it holds {count} pictures: save the one that is meant in a file of its own")


@cache
def _formats() -> list[str]:
    """Those of `_FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


class _Unfit(Exception):
    """What is wrong with an image, in words."""


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors as one line that names the file."""
    try:
        yield
    except UpbenchError:
        raise
    except Exception as error:  # decoders of damaged files raise anything
        raise UpbenchError(f"cannot read image {file}: {fault(error)}") from error


def fault(error: Exception) -> str:
    """What is wrong with an image, by what its decoder raised: in words, and what to do."""
    if isinstance(error, (_Unfit, UpbenchError)):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "its pixels are too many; scale it down"
    if isinstance(error, UnidentifiedImageError):  # its text is an address in memory
        known = ", ".join(_formats())
        return f"it is not an image ({known}), or its head is damaged; copy it again, or remove it"
    if isinstance(error, MemoryError) or getattr(error, "errno", None):
        return reason(error)
    return f"it is damaged; copy it again, or remove it ({type(error).__name__}: {printable(error)})"
