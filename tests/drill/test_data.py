"""Files of data, where no command line shows it: the numbers that are read, and what is looked at when."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from drill.imagefiles import (
    HEIGHT,
    WIDTH,
    broken_link,
    chunk,
    content,
    labelled,
    photos,
    png,
    refuses,
    rotated,
    saved,
)
from upbench.cli import main
from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Camera, Sample
from upbench.datasets import (
    content_fingerprint,
    list_folder,
    read_bytes,
    read_image,
    read_labels,
    read_values,
)
from upbench.datasets.folder import FolderDataset
from upbench.features.images import SplitImages
from upbench.protocols.geometry import SquareCrop
from upbench.registry import find_protocol
from upbench.train.config import ViewConfig
from upbench.train.views import find_photos, plan_views, prepare

no_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


# -------------------- label maps --------------------


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What is stored so that an orientation makes it upright, by Pillow's inverse operation."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    picture = Image.fromarray(upright)
    return np.asarray(picture.transpose(back[orientation]) if orientation in back else picture)


@pytest.mark.drill("label maps")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_and_its_label_map_are_made_upright_alike(tmp_path: Path, orientation: int) -> None:
    root = labelled(tmp_path)
    upright = np.zeros((HEIGHT, WIDTH), np.uint8)
    upright[:9, :14] = 1
    stored = Image.fromarray(stored_as(upright, orientation))
    rotated(orientation, stored.point(lambda value: 200 * value))(root / "train" / "1.png")
    for rotates in (False, True):  # the label map of the upright image; one that says its orientation itself
        keep = rotated(orientation, stored) if rotates else saved(Image.fromarray(upright))
        keep(root / "trainannot" / "1.png")
        sample = FolderDataset(root).read("train", 1)
        assert sample.label is not None
        assert torch.equal(sample.label, torch.from_numpy(upright))
        assert torch.equal(sample.image[0] > 100, sample.label == 1)


@pytest.mark.drill("label maps")
def test_sixteen_bits_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.array([[0, 1, 255, 256, 300, 65535]], np.uint16)
    file = tmp_path / "a.png"
    saved(Image.fromarray(values))(file)
    assert np.array_equal(read_labels(file), values.astype(np.int32))


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1) -> bytes:
    """A TIFF of one grey channel of few bits, by its specification."""
    height, width = values.shape
    planes = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    pixels = np.packbits(planes, axis=1).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags[279] = len(pixels)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(pixels) + len(pixels) % 2
    head = b"II*\0" + struct.pack("<I", start) + pixels + b"\0" * (len(pixels) % 2)
    return head + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


@pytest.mark.drill("label maps")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_bits_of_a_tiff_are_not_scaled(tmp_path: Path, bits: int) -> None:
    values = (np.arange(48) * 7 % 2**bits).astype(np.uint8).reshape(6, 8)
    file = tmp_path / "a.tif"
    file.write_bytes(grey_tiff(values, bits))
    assert np.array_equal(read_labels(file), values)
    file.write_bytes(grey_tiff(values, bits, photometric=0))
    refuses(lambda: read_labels(file), file, "white")


@pytest.mark.drill("arrays")
def test_numbers_of_pictures_are_read_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "depth.tif"
    values = np.array([[0.0, 1.5], [np.nan, -3e5]], np.float32)
    for stored, kind in (
        (values, "TIFF"),
        (np.array([[0, 70_000], [1, 2]], np.int32), "TIFF"),
        (np.array([[0, 65_535], [1, 2]], np.uint16), "PNG"),
        (np.array([[0, 255], [1, 2]], np.uint8), "PNG"),
    ):
        saved(Image.fromarray(stored), kind)(file)
        assert np.array_equal(read_values(file), stored, equal_nan=True)
    file.write_bytes(png(np.array([[0, 1], [2, 3]], np.uint8), 2))
    assert read_values(file).tolist() == [[0, 1], [2, 3]]
    for mode in ("RGB", "P"):
        saved(Image.new(mode, (4, 3)))(file)
        refuses(lambda: read_values(file), file, "one channel of numbers", mode)
    saved(Image.new("L", (4, 3)), "JPEG")(file)
    refuses(lambda: read_values(file), file, "JPEG")


# -------------------- what a sample holds --------------------


def sample(**fields: Any) -> Sample:
    """A sound one, but for some fields."""
    size = (4, 6)
    normal = torch.zeros(3, *size)
    normal[2] = -1
    camera = Camera(torch.tensor([[5.0, 5.0, 3.0, 2.0]]))
    sound = Sample(
        "a",
        torch.arange(72, dtype=torch.uint8).view(3, *size),
        torch.ones(size, dtype=torch.bool),
        torch.zeros(size, dtype=torch.int16),
        torch.ones(size),
        normal,
        camera,
    )
    return replace(sound, **fields)


def one(values: Tensor, value: float) -> Tensor:
    """The same with one other value."""
    values = values.clone()
    values.view(-1)[7] = value
    return values


SOUND = sample()
assert SOUND.depth is not None
assert SOUND.normal is not None
DEPTH, NORMAL = SOUND.depth, SOUND.normal
NAN, INF = float("nan"), float("inf")

ODD_SAMPLES = {
    "depth of nan": ({"depth": one(DEPTH, NAN)}, "its depth goes from nan"),
    "depth of infinity": ({"depth": one(DEPTH, INF)}, "to inf"),
    "depth below 0": ({"depth": one(DEPTH, -0.5)}, "from -0.5"),
    "depth in whole numbers": ({"depth": DEPTH.int()}, "its depth must be floats [4, 6], got int32"),
    "depth of another size": ({"depth": DEPTH[1:]}, "[3, 6]"),
    "depth with a channel": ({"depth": DEPTH[None]}, "[1, 4, 6]"),
    "a normal of nan": ({"normal": one(NORMAL, NAN)}, "from nan to nan"),
    "a normal of infinity": ({"normal": one(NORMAL, INF)}, "to inf"),
    "a normal of length 2": ({"normal": 2 * NORMAL}, "from 2 to 2"),
    "a short normal": ({"normal": 0.9 * NORMAL}, "from 0.9 to 0.9"),
    "normals of bytes": ({"normal": NORMAL.to(torch.uint8)}, "its normal must be floats"),
    "normals with channels last": ({"normal": NORMAL.permute(1, 2, 0)}, "[4, 6, 3]"),
    "labels of floats": ({"label": torch.zeros(4, 6)}, "its label must be integers"),
    "labels of colours": ({"label": torch.zeros(3, 4, 6, dtype=torch.long)}, "[3, 4, 6]"),
    "labels of another size": ({"label": torch.zeros(6, 4, dtype=torch.long)}, "[6, 4]"),
    "valid in numbers": ({"valid": torch.ones(4, 6)}, "its valid must be bool"),
    "an image of floats": ({"image": torch.zeros(3, 4, 6)}, "uint8 [3, H, W], got float32"),
    "a grey image": ({"image": torch.zeros(4, 6, dtype=torch.uint8)}, "got uint8 [4, 6]"),
    "an image of nothing": ({"image": torch.zeros(3, 0, 6, dtype=torch.uint8)}, "no pixels"),
    "two cameras": ({"camera": Camera(torch.ones(2, 4))}, "one camera, got 2"),
}


class Given(Dataset):
    """Samples as they are given; without a name of its own in the table of datasets."""

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b")

    def __init__(self, *samples: Sample) -> None:
        super().__init__()
        self.samples = samples
        self.name = "given"  # type: ignore[misc]

    def names(self, split: str) -> list[str]:
        return [each.name for each in self.samples]

    def read(self, split: str, index: int) -> Sample:
        return self.samples[index]

    def fingerprint(self, split: str) -> str:
        return "0"


def images(dataset: Dataset, split: str = "train", protocol: str = "quick") -> SplitImages:
    """Its frames."""
    return SplitImages(dataset, split, find_protocol(protocol)())


@pytest.mark.drill("ground truth")
@pytest.mark.parametrize("case", ODD_SAMPLES)
def test_ground_truth_that_no_metric_could_be_trusted_with(case: str) -> None:
    fields, words = ODD_SAMPLES[case]
    frames = images(Given(sample(), sample(name="b", **fields)))
    assert frames.framed(0).name == "a"
    refuses(lambda: frames.framed(1), "given/train: image 'b': ", words)


@pytest.mark.drill("ground truth")
def test_what_is_unknown_is_no_fault() -> None:
    unknown = sample(depth=one(DEPTH, 0), normal=torch.zeros_like(NORMAL), label=torch.full((4, 6), 255))
    coarse = sample(normal=((NORMAL * 127 + 128).round() - 128) / 127.5)  # as a byte a coordinate holds it
    bare = Sample("bare", SOUND.image)
    for each in (sample(), unknown, coarse, bare):
        each.check()


@pytest.mark.drill("ground truth")
@pytest.mark.parametrize("value", [2, 254, -1])
def test_a_label_out_of_range_is_named_with_its_image(value: int) -> None:
    label = torch.zeros(4, 6, dtype=torch.int32)
    label[:] = value
    frames = images(Given(sample(label=label)))
    refuses(
        lambda: frames.framed(0),
        f"labels {value} to {value} of image 'a'",
        "names 2 classes (0 to 1; 255 is ignored)",
    )


# -------------------- memory --------------------


@pytest.mark.drill("images")
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 40_000_000)])
def test_a_strip_is_refused_before_it_is_resized(size: tuple[int, int]) -> None:
    refuses(lambda: SquareCrop(224).frames(size), "resized to", f"{size[1]}x{size[0]}", "GB")


@pytest.mark.drill("images")
def test_the_strip_of_any_dataset_is_named() -> None:
    strip = Sample("strip", torch.zeros(3, 1, 60_000, dtype=torch.uint8))
    frames = images(Given(strip))
    for ask in (frames.framed, frames.image, frames.frame):
        refuses(lambda ask=ask: ask(0), "image 'strip'", "GB")


@pytest.mark.drill("images")
def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    with file.open("wb") as stream:
        stream.truncate(2**40)  # takes no room on the disk
    for read in (read_bytes, read_image, read_labels):
        refuses(lambda read=read: read(file), file, "bytes")
    refuses(lambda: read_bytes(file, most=10), "the most is 10")


@pytest.mark.drill("images")
def test_text_that_expands_in_a_png(tmp_path: Path) -> None:
    data = png(np.zeros((3, 8), np.uint8))
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 50_000_000))
    (tmp_path / "a.png").write_bytes(data[:33] + text + data[33:])
    refuses(lambda: read_image(tmp_path / "a.png"), "a.png")


# -------------------- files --------------------


@no_root
@pytest.mark.drill("files")
def test_files_and_folders_that_may_not_be_read(tmp_path: Path) -> None:
    root = labelled(tmp_path)
    file = root / "train" / "1.png"
    file.chmod(0)
    for read in (read_bytes, read_image, read_labels):
        refuses(lambda read=read: read(file), file, "permission denied")
    (root / "val").chmod(0)
    try:
        refuses(lambda: FolderDataset(root).names("val"), "permission denied")
        refuses(lambda: list_folder(root / "val"), "permission denied")
        refuses(lambda: find_photos([root]), "permission denied")
    finally:
        (root / "val").chmod(0o700)


@pytest.mark.drill("files")
def test_a_refusal_of_the_system_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tests run as root, who is refused nothing."""
    file = tmp_path / "a.png"
    file.write_bytes(png(np.zeros((3, 8), np.uint8)))

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refuses(lambda: read_image(file), file, "permission denied")


@pytest.mark.drill("files")
@pytest.mark.parametrize("noted", [b"", b"\xff\xfe", b"not a fingerprint", b"0" * 15])
def test_a_damaged_note_of_a_fingerprint_is_written_anew(tmp_path: Path, noted: bytes) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    right = content_fingerprint("a/train", [[file]])
    (note,) = [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]
    note.write_bytes(noted)
    assert content_fingerprint("a/train", [[file]]) == right
    assert note.read_text() == right


# -------------------- photos --------------------

VIEWS = ViewConfig(view_size=16, guidance_size=8, crops_per_image=2, scales_per_view=1, precision="fp32")


class MeanColour(nn.Module):
    """The mean colour of each patch."""

    name, channels, stride, fingerprint = "mean-colour", 3, 4, "1"

    def forward(self, image01: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(image01, 4)


@pytest.mark.drill("photos")
def test_a_photo_of_sixteen_bits_is_no_white_one(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    grey = np.full((64, 64), 100 * 257, np.uint16)
    for file in folder.iterdir():
        saved(Image.fromarray(grey))(file)
    pool = prepare([folder], MeanColour(), VIEWS)  # type: ignore[arg-type]
    batch = pool.read([0], pool.views[0].cells[0])
    assert set((batch.image * 255).round().unique().tolist()) == {100}


@pytest.mark.drill("photos")
def test_a_photo_of_a_pixel(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    saved(Image.new("RGB", (1, 1), (50, 60, 70)))(folder / "b.png")
    for each in plan_views(find_photos([folder]), replace(VIEWS, min_crop=0.1), 4):
        assert each.box[2] >= 1
    assert len(prepare([folder], MeanColour(), VIEWS)) == 4  # type: ignore[arg-type]


@pytest.mark.drill("photos")
def test_no_photo_is_left_out_in_silence(tmp_path: Path) -> None:
    """A name that is an image's is a photo or is refused; a folder of such a name is looked into."""
    folder = photos(tmp_path)
    (folder / "c.png").mkdir()
    (folder / "a.png").rename(folder / "c.png" / "a.png")
    assert [file.name for file in find_photos([folder])] == ["b.png", "a.png"]
    broken_link(folder / "d.png")
    refuses(lambda: plan_views(find_photos([folder]), VIEWS, 4), "d.png", "nowhere.png, which is not there")


@pytest.mark.drill("photos")
def test_a_photo_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    odd = folder / os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "a.png").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert len(prepare([folder], MeanColour(), VIEWS)) == 4  # type: ignore[arg-type]
    content("no photo")(odd)
    assert refuses(lambda: plan_views(find_photos([folder]), VIEWS, 4), "caf").isprintable()


@pytest.mark.drill("photos")
def test_no_features_are_computed_where_a_photo_of_the_validation_is_no_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, val = photos(tmp_path), tmp_path / "val"
    val.mkdir()
    content("no photo")(val / "c.png")
    words = ["train", "carafe", "--images", str(folder), "--val-images", str(val), "--steps", "1"]
    assert main([*words, "--device", "cpu", "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "c.png: it is not an image" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "views").exists()
