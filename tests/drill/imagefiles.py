"""Files of images, as datasets hold them, and every way in which one can be damaged."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import SIZE, folder_dataset
from PIL import Image

from upbench.errors import UpbenchError

ORIENTATION = 0x0112
HEIGHT, WIDTH = SIZE
SIDE = 32
"""Of a scene."""

Change = Callable[[Path], object]
"""What is done to a file, which exists."""


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int = 8, palette: bool = False) -> bytes:
    """A PNG of one channel and up to 8 bits by its specification."""
    rows, width = values.shape
    head = struct.pack(">IIBBBBB", width, rows, bits, 3 if palette else 0, 0, 0, 0)
    planes = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(rows, -1)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), np.packbits(planes, axis=1)], axis=1)
    colours = chunk(b"PLTE", bytes(range(3)) * 2**bits) if palette else b""
    parts = (
        chunk(b"IHDR", head),
        colours,
        chunk(b"IDAT", zlib.compress(lines.tobytes())),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width: int, height: int) -> Change:
    """A PNG of a few bytes that announces so many pixels."""

    def change(file: Path) -> None:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b""))

    return change


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> Change:
    """Another picture under the same name, in any format."""

    def change(file: Path) -> None:
        stream = io.BytesIO()
        picture.save(stream, kind, **options)
        file.write_bytes(stream.getvalue())

    return change


def filled(mode: str, colour: Any = 0, kind: str = "PNG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Change:
    """A picture of one colour; `size` is (width, height)."""
    return saved(Image.new(mode, size, colour), kind)


def content(data: bytes | str) -> Change:
    """Something else in its place."""
    return lambda file: file.write_bytes(data.encode() if isinstance(data, str) else data)


def cut(fraction: float) -> Change:
    """The file without its end."""
    return lambda file: file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)])


def flipped(file: Path) -> None:
    """The file with a bit of its middle changed."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def instead(make: Change) -> Change:
    """Something that is no regular file under the same name."""

    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def broken_link(file: Path) -> None:
    """A link to nothing."""
    file.symlink_to("nowhere.png")


def loop(file: Path) -> None:
    """A link to itself."""
    file.symlink_to(file.name)


def device(file: Path) -> None:
    """A file that never ends."""
    file.symlink_to("/dev/zero")


def rotated(orientation: int, picture: Image.Image | None = None, kind: str = "PNG") -> Change:
    """A picture that says its EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(picture or Image.new("RGB", (WIDTH, HEIGHT)), kind, exif=exif)


def animated(kind: str) -> Change:
    """Two pictures in a file."""
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), (shade, 0, 0)) for shade in (10, 200)]
    return saved(pictures[0], kind, save_all=True, append_images=pictures[1:])


NO_FILES: dict[str, tuple[Change, str]] = {
    "empty": (content(b""), "empty"),
    "a folder": (instead(Path.mkdir), "a folder"),
    "a pipe": (instead(os.mkfifo), "a pipe"),
    "a device": (instead(device), "a device"),
    "a broken link": (instead(broken_link), "which is not there"),
    "a link to itself": (instead(loop), "circle"),
}
"""Name -> what stands where a file should, and a word of what is said of it."""


def labelled(place: Path) -> Path:
    """A dataset for `folder:data`: three images of two classes a split."""
    return folder_dataset(place / "data")


def scenes(place: Path, count: int = 2) -> Path:
    """A dataset for `interiors:data`: small scenes in one zip file a split."""
    folder = place / "data"
    folder.mkdir()
    for number, split in enumerate(("train", "val", "val_heldout")):
        lines = []
        with zipfile.ZipFile(folder / f"{split}-00.zip", "w") as archive:
            for seed in range(100 * number, 100 * number + count):
                for suffix, data in scene().items():
                    archive.writestr(f"{seed}{suffix}", data)
                lines.append(line(seed, shard=f"{split}-00.zip"))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def line(seed: int, **fields: Any) -> dict[str, Any]:
    """Of a scene, in the index."""
    centre = SIDE / 2
    return {"seed": seed, "size": SIDE, "intrinsics": [40.0, 40.0, centre, centre], "classes": {}, **fields}


def scene() -> dict[str, bytes]:
    """The files of a scene: a wall two metres away, which faces the viewer."""
    normal = np.full((SIDE, SIDE, 3), 128, np.uint8)
    normal[..., 2] = 1
    files = {
        ".jpg": (Image.new("RGB", (SIDE, SIDE), (90, 120, 150)), "JPEG"),
        "_label.png": (Image.new("L", (SIDE, SIDE), 1), "PNG"),
        "_depth.png": (Image.fromarray(np.full((SIDE, SIDE), 2000, np.uint16)), "PNG"),
        "_normal.png": (Image.fromarray(normal), "PNG"),
    }
    found = {}
    for suffix, (picture, kind) in files.items():
        stream = io.BytesIO()
        picture.save(stream, kind)
        found[suffix] = stream.getvalue()
    return found


def with_line(**fields: Any) -> Change:
    """The index with other values in its first line; a value of None takes the key out."""

    def change(index: Path) -> None:
        first, *others = index.read_text().splitlines(keepends=True)
        values = {**json.loads(first), **fields}
        values = {key: value for key, value in values.items() if value is not None}
        index.write_text(json.dumps(values) + "\n" + "".join(others))

    return change


def photos(place: Path) -> Path:
    """Two photos, for `train --images photos`."""
    folder = place / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), (90, 120, 150)).save(folder / f"{name}.png")
    return folder


def refuses(call: Callable[[], object], *words: object) -> str:
    """What an error says, in one line that holds every word."""
    with pytest.raises(UpbenchError) as info:
        call()
    text = str(info.value)
    assert "\n" not in text
    assert "object at 0x" not in text
    for word in words:
        assert str(word) in text
    return text
