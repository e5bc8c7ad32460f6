"""Image files as datasets read them: upright RGB bytes, and label maps with the values that were stored.

A file that cannot be used is named in one line, whatever is wrong with it: a pipe, an empty file, a damaged
one, one whose pixels would fill the memory.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upbench.errors import UpbenchError

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


def read_bytes(file: Path) -> bytes:
    """A file's content.

    Raises:
        UpbenchError: It cannot be read, is empty, or is not a regular file: reading a pipe would wait for
            ever.
    """
    try:
        check_regular(file)
        return file.read_bytes()
    except OSError as error:
        raise UpbenchError(f"cannot read {file}: {error.strerror}") from error


def check_regular(file: Path) -> None:
    """Does nothing for a file that can be read to its end.

    Raises:
        UpbenchError: It is empty, or is a folder, a pipe or a device.
        OSError: It is not there.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise UpbenchError(f"cannot read {file}: it is not a regular file")
    if not found.st_size:
        raise UpbenchError(f"cannot read {file}: it is empty")


def read_image(file: Path, data: bytes | None = None) -> Tensor:
    """`[3, H, W]` uint8 RGB, upright as its EXIF orientation says.

    Grey levels of 16 bits are brought to 8, rounded. An alpha channel is left out: the colours are those that
    are stored.

    Args:
        file: Any format that Pillow reads.
        data: Its content, where that is at hand.

    Raises:
        UpbenchError: It cannot be read, is no image, or holds floats.
    """
    picture = _decode(file, read_bytes(file) if data is None else data)
    with _named(file):
        turn = _UPRIGHT.get(_orientation(picture))
        picture = picture if turn is None else picture.transpose(turn)
        if picture.mode == "F":
            raise ValueError("its values are floats, and no colours")
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
        UpbenchError: It cannot be read, or is no image.
    """
    with _named(file):
        check_regular(file)
        with file.open("rb") as stream, Image.open(stream) as picture:
            width, height = picture.size
            if picture.format == "TIFF" or (picture.format == "PNG" and _ends_with_text(stream)):
                picture.load()  # these say their orientation at the end, or are rotated while they are read
                width, height = picture.size
            swapped = _orientation(picture) in _SWAPPED
    return (width, height) if swapped else (height, width)


def read_labels(file: Path, data: bytes | None = None) -> Tensor:
    """`[H, W]` uint8, the values as they are stored: indices of a palette, or grey levels of 1 to 8 bits.

    Args:
        file: A PNG of one channel.
        data: Its content, where that is at hand.

    Raises:
        UpbenchError: It cannot be read, or has several channels or more than 8 bits.
    """
    data = read_bytes(file) if data is None else data
    picture = _decode(file, data)
    if picture.mode not in ("L", "P", "1"):
        raise UpbenchError(f"label map {file} must have one channel of 8 bits, it is {picture.mode}")
    values = np.array(picture, dtype=np.uint8)
    if picture.mode == "L":
        values //= {2: 85, 4: 17}.get(_grey_bits(data), 1)  # Pillow stretches 2 and 4 bits to 0..255
    return torch.from_numpy(values)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none that can be read."""
    try:
        # as of any picture: the method of PNGs decodes them all to look for what may follow the pixels
        value = Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raises anything; viewers show such an image as it is
        return 1
    return value if value in _UPRIGHT else 1


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


def _decode(file: Path, data: bytes) -> Image.Image:
    with _named(file):
        if not data:
            raise UpbenchError(f"cannot read {file}: it is empty")
        picture = Image.open(io.BytesIO(data))
        picture.load()
    return picture


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors as one line that names the file."""
    try:
        yield
    except UpbenchError:
        raise
    except Image.DecompressionBombError as error:
        raise UpbenchError(f"cannot read image {file}: it has more pixels than can be trusted") from error
    except UnidentifiedImageError as error:
        raise UpbenchError(f"cannot read image {file}: it is no image, or its head is damaged") from error
    except Exception as error:  # decoders of damaged files raise anything
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UpbenchError(f"cannot read image {file}: {text or type(error).__name__}") from error
