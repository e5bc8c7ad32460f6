"""Image files as datasets read them: upright, in 8 bits, unscaled, and never for ever."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from upbench.datasets import image_size, read_bytes, read_image, read_labels
from upbench.errors import UpbenchError

ORIENTATION = 0x0112
HEIGHT, WIDTH = 16, 24


def colours() -> np.ndarray:
    """An image without a symmetry: four corners of different colours."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[:8, :12], image[:8, 12:], image[8:, :12], image[8:, 12:] = (
        (250, 0, 0),
        (0, 250, 0),
        (0, 0, 250),
        (250, 250, 0),
    )
    return image


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What a camera stores so that `orientation` makes it `upright`, from the definition of the tag: where
    the stored row 0 and column 0 are in the upright image."""
    if orientation in (5, 6, 7, 8):  # stored rows are columns of the upright image
        upright = upright.swapaxes(0, 1)
        rows, cols = {5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}[orientation]
    else:
        rows, cols = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1)}[orientation]
    return np.ascontiguousarray(upright[::rows, ::cols])


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def one_line(info: pytest.ExceptionInfo[UpbenchError], file: Path) -> None:
    assert "\n" not in str(info.value)
    assert str(file) in str(info.value)
    assert "0x" not in str(info.value), "an address in memory tells nobody anything"


# -------------------- orientation --------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_honoured(tmp_path: Path, suffix: str, orientation: int):
    file = tmp_path / f"a.{suffix}"
    options = {"png": {}, "jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}, "tiff": {}}
    picture = Image.fromarray(stored_as(colours(), orientation))
    picture.save(file, exif=exif(orientation), **options[suffix])
    image = read_image(file)
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image_size(file) == (HEIGHT, WIDTH)
    off = (image.permute(1, 2, 0).int() - torch.from_numpy(colours()).int()).abs()
    assert int(off.max()) <= (8 if suffix == "jpg" else 0), "but for what JPEG loses"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_an_orientation_behind_the_pixels_of_a_png(tmp_path: Path):
    file = tmp_path / "a.png"
    Image.fromarray(stored_as(colours(), 6)).save(file)
    data = file.read_bytes()
    end = data.rindex(b"IEND") - 4
    content = exif(6).tobytes().removeprefix(b"Exif\0\0")
    file.write_bytes(data[:end] + chunk(b"eXIf", content) + data[end:])
    assert image_size(file) == tuple(read_image(file).shape[1:]) == (HEIGHT, WIDTH)


def test_an_orientation_in_xmp(tmp_path: Path):
    file, text = tmp_path / "a.png", PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.fromarray(stored_as(colours(), 6)).save(file, pnginfo=text)
    assert image_size(file) == tuple(read_image(file).shape[1:]) == (HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's
@pytest.mark.parametrize("data", [b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0garbage", b""])
def test_damaged_exif_is_no_orientation(tmp_path: Path, data: bytes):
    file = tmp_path / "a.jpg"
    Image.fromarray(colours()).save(file, exif=data)
    assert image_size(file) == tuple(read_image(file).shape[1:]) == (HEIGHT, WIDTH)


def test_a_size_is_had_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [tmp_path / name for name in ("a.png", "b.jpg", "c.webp", "d.bmp")]
    for file in files:
        Image.fromarray(colours()).save(file)

    def decoded(self: object, *args: object) -> None:
        pytest.fail("was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert {image_size(file) for file in files} == {(HEIGHT, WIDTH)}


# -------------------- modes --------------------


def test_sixteen_bits_are_brought_to_eight(tmp_path: Path):
    values = np.array([[0, 1, 128, 129, 257, 32767, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.round(values / 65535 * 255).astype(np.uint8)
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(expected).expand(3, 1, 8))


def test_sixteen_bits_are_rotated_too(tmp_path: Path):
    grey = colours()[..., 0].astype(np.uint16) * 257
    Image.fromarray(stored_as(grey, 6)).save(tmp_path / "a.png", exif=exif(6))
    assert np.array_equal(read_image(tmp_path / "a.png")[0], colours()[..., 0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_colours_of_every_mode(tmp_path: Path, mode: str):
    """Black, grey and white survive every mode, whatever the alpha says."""
    levels = (0, 255) if mode == "1" else (0, 51, 204, 255)
    plain = Image.fromarray(np.array([levels] * 2, dtype=np.uint8))
    picture = plain.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(0)
    file = tmp_path / ("a.png" if mode not in ("CMYK", "YCbCr") else "a.tiff")
    picture.save(file)
    with Image.open(file) as saved:
        assert saved.mode == mode
    assert torch.equal(read_image(file), torch.tensor([levels] * 2, dtype=torch.uint8).expand(3, 2, -1))


def test_a_jpeg_for_a_printer(tmp_path: Path):
    Image.fromarray(colours()).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    off = (read_image(tmp_path / "a.jpg").permute(1, 2, 0).int() - torch.from_numpy(colours()).int()).abs()
    assert int(off.max()) <= 8, "but for what JPEG loses"


def test_values_that_are_no_colours(tmp_path: Path):
    file = tmp_path / "a.tiff"
    Image.new("F", (4, 3)).save(file)
    with pytest.raises(UpbenchError, match="cannot read image") as info:
        read_image(file)
    one_line(info, file)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_labels_are_not_scaled(tmp_path: Path, bits: int, palette: bool):
    """Grey levels and palettes of few bits: the numbers in the file, as it says itself."""
    values = (np.arange(40) * 7 % 2**bits).astype(np.uint8).reshape(5, 8)
    file = tmp_path / "a.png"
    file.write_bytes(png(values, bits, palette))
    found = read_labels(file)
    assert found.dtype == torch.uint8
    assert np.array_equal(found, values)
    assert torch.equal(read_labels(Path("anywhere"), file.read_bytes()), found)


def png(values: np.ndarray, bits: int, palette: bool) -> bytes:
    """A PNG by its specification."""
    height, width = values.shape
    head = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    planes = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), np.packbits(planes, axis=1)], axis=1)
    colour = chunk(b"PLTE", bytes(range(3)) * 2**bits) if palette else b""
    parts = (chunk(b"IHDR", head), colour, chunk(b"IDAT", zlib.compress(rows.tobytes())), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_labels_of_several_channels(tmp_path: Path, mode: str):
    file = tmp_path / "a.png"
    Image.new(mode, (4, 3)).save(file)
    with pytest.raises(UpbenchError, match="must have one channel of 1 to 16 bits, its pixels are") as info:
        read_labels(file)
    one_line(info, file)


# -------------------- files that are no good --------------------


def pipe(file: Path) -> None:
    os.mkfifo(file)


BAD = {
    "missing": lambda file: None,
    "empty": lambda file: file.touch(),
    "folder": lambda file: file.mkdir(),
    "pipe": pipe,
    "text": lambda file: file.write_text("hello\nworld"),
    "loop": lambda file: file.symlink_to(file),
}


@pytest.mark.parametrize("read", [read_bytes, read_image, image_size, read_labels])
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named(tmp_path: Path, read, kind: str):
    if kind == "text" and read is read_bytes:
        pytest.skip("bytes may be text")
    file = tmp_path / "a.png"
    BAD[kind](file)
    with pytest.raises(UpbenchError, match="cannot read") as info:
        read(file)
    one_line(info, file)


def test_a_picture_that_would_fill_the_memory(tmp_path: Path):
    file = tmp_path / "a.png"
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b""))
    for read in (read_image, image_size, read_labels):
        with pytest.raises(UpbenchError, match="too many") as info:
            read(file)
        one_line(info, file)


def encoded(suffix: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(colours()).save(stream, suffix, exif=exif(6))
    return stream.getvalue()


ENCODED = {suffix: encoded(suffix) for suffix in ("png", "jpeg", "webp", "bmp", "tiff")}


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds, too
@given(
    st.sampled_from(sorted(ENCODED)), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4))), st.data()
)
def test_damage_is_an_error_of_ours_or_none(suffix: str, damage, data):
    """Whatever happens to a file, it is read or named."""
    content = bytearray(ENCODED[suffix])
    for place, values in damage:
        start = int(place * len(content))
        content[start : start + len(values)] = values
    content = content[: data.draw(st.integers(1, len(content)))]
    for read in (read_image, read_labels):
        said = ""
        try:
            read(Path("a file"), bytes(content))
        except UpbenchError as error:
            said = str(error)
        assert said == "" or ("a file" in said and "\n" not in said)
