"""Folder datasets: layout, label values, geometry, and every way in which a folder can be wrong."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.sample import IGNORE
from upbench.datasets.camvid import CamVid
from upbench.datasets.folder import FolderDataset
from upbench.errors import UpbenchError
from upbench.protocols.geometry import SquareCrop
from upbench.registry import open_dataset
from upbench.testing import assert_close, check_dataset

HEIGHT, WIDTH = 24, 32
CLASSES = "sky\nroad\nvoid\ncar\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


def add(root: Path, split: str, name: str, label: np.ndarray, suffix: str = ".png") -> None:
    """An image whose red channel is ten times its label, and the label map."""
    for folder in (root / split, root / f"{split}annot"):
        folder.mkdir(exist_ok=True)
    rgb = np.stack([label * 10, label * 0, label * 0], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(root / split / f"{name}{suffix}")
    Image.fromarray(label.astype(np.uint8)).save(root / f"{split}annot" / f"{name}.png")


def quarters() -> np.ndarray:
    """Values 0 and 1 above, 2 (void) and 3 below."""
    label = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    label[:12, 16:], label[12:, :16], label[12:, 16:] = 1, 2, 3
    return label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "classes.txt").write_text(CLASSES)
    for split, names in (("train", "bac"), ("val", "d")):
        for name in names:
            add(folder, split, name, quarters())
    return folder


def test_names_and_classes(root: Path):
    dataset = FolderDataset(root)
    assert dataset.names("train") == ["a", "b", "c"]
    assert dataset.names("val") == ["d"]
    assert dataset.classes == ("sky", "road", "car")
    assert dataset.eval_splits == ("val",)


def test_values_skip_void(root: Path):
    """A void in the middle of the list leaves no gap: car, 3 in the files, is class 2."""
    label = quarters()
    label[0, 0] = 255
    add(root, "train", "a", label)
    sample = FolderDataset(root).read("train", 0)
    expected = np.array([0, 1, IGNORE, 2])[quarters()]
    expected[0, 0] = IGNORE
    assert sample.label is not None
    assert sample.label.dtype == torch.uint8
    assert np.array_equal(sample.label, expected)
    assert sample.valid is None, "all pixels count but for their labels"


def test_samples_are_as_they_are_stored(root: Path):
    sample = FolderDataset(root).read("train", 0)
    assert sample.name == "a"
    assert sample.image.dtype == torch.uint8
    assert sample.size == (HEIGHT, WIDTH)
    assert np.array_equal(sample.image[0], quarters() * 10)
    assert FolderDataset(root).size("train", 0) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [24, 12, 48, 31])
def test_image_and_label_stay_aligned(root: Path, size: int):
    """Shorter side to `size`, centre crop: both show the same classes away from boundaries."""
    sample = FolderDataset(root).read("train", 0)
    (frame,) = SquareCrop(size).frames(sample.size)
    framed = frame.of(sample)
    assert framed.image.shape == (3, size, size)
    assert framed.label is not None
    raw = framed.image[0] * 255 / 10
    classes = torch.where(framed.label == IGNORE, 2, torch.where(framed.label == 2, 3, framed.label)).float()
    rows = torch.tensor([i for i in range(size) if abs(i + 0.5 - size / 2) > 2.5 * size / 24])
    assert len(rows) > 0.7 * size
    assert_close(raw[rows][:, rows], classes[rows][:, rows])


def test_an_image_that_lies_on_its_side(root: Path):
    """A phone stores it so and says so: the label map is of the upright image."""
    upright = np.stack([quarters() * 10] * 3, axis=-1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(root / "train" / "a.png", exif=exif)
    dataset = FolderDataset(root)
    sample = dataset.read("train", 0)
    assert sample.size == dataset.size("train", 0) == (HEIGHT, WIDTH)
    assert np.array_equal(sample.image[0], upright[..., 0])
    assert dataset.fingerprint("train")


def test_images_of_other_formats_and_palettes(root: Path):
    add(root, "train", "photo", quarters(), ".jpg")
    palette = Image.fromarray(quarters())
    palette.putpalette(list(range(30)))
    palette.save(root / "trainannot" / "photo.png", bits=2)
    sample = FolderDataset(root).read("train", 3)
    assert sample.name == "photo"
    assert sample.label is not None
    assert np.array_equal(sample.label, np.array([0, 1, IGNORE, 2])[quarters()])


def test_test_split_stands_in_for_val(root: Path):
    for folder in ("val", "valannot"):
        (root / folder).rename(root / folder.replace("val", "test"))
    assert FolderDataset(root).eval_splits == ("test",)


# -------------------- fingerprint --------------------


def test_fingerprint_follows_content(root: Path):
    first = FolderDataset(root).fingerprint("train")
    assert FolderDataset(root).fingerprint("train") == first
    assert FolderDataset(root).fingerprint("val") != first

    changed = quarters()
    changed[5, 5] = 3
    Image.fromarray(changed).save(root / "trainannot" / "a.png")
    second = FolderDataset(root).fingerprint("train")
    add(root, "train", "e", quarters())
    third = FolderDataset(root).fingerprint("train")
    (root / "classes.txt").write_text("sky\nroad\ngrass\ncar\n")
    fourth = FolderDataset(root).fingerprint("train")
    assert len({first, second, third, fourth}) == 4


def test_fingerprint_is_the_same_for_a_copy(root: Path, tmp_path: Path):
    """It is of the content: neither the place nor the date of a file is."""
    copy = tmp_path / "else" / "where"
    shutil.copytree(root, copy, copy_function=shutil.copy)
    here = FolderDataset(root).fingerprint("train")
    assert FolderDataset(copy).fingerprint("train") == here
    os.utime(copy / "train" / "a.png", (1, 1))
    assert FolderDataset(copy).fingerprint("train") == here
    (copy / "train" / "a.png").rename(copy / "train" / "aa.png")
    (copy / "trainannot" / "a.png").rename(copy / "trainannot" / "aa.png")
    assert FolderDataset(copy).fingerprint("train") != here, "names are content"


def test_files_are_checked_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    first = FolderDataset(root).fingerprint("train")

    def again(file: Path) -> bytes:
        pytest.fail(f"{file} was read again")

    monkeypatch.setattr("upbench.datasets._content.read_bytes", again)
    assert FolderDataset(root).fingerprint("train") == first
    monkeypatch.undo()
    os.utime(root / "train" / "a.png", (1, 1))
    monkeypatch.setattr("upbench.datasets._content.read_bytes", again)
    with pytest.raises(pytest.fail.Exception, match="was read again"):
        FolderDataset(root).fingerprint("train")


def test_files_are_checked_by_threads_and_in_order(root: Path, monkeypatch: pytest.MonkeyPatch):
    """As many as there are cores; whichever ends first, hash and error are those of the order."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for name in "efghijk":
        add(root, "train", name, quarters())
    plain = FolderDataset(root).fingerprint("train")
    os.utime(root / "train" / "a.png", (1, 1))
    check, done, others = FolderDataset._check, [], threading.Event()

    def first_is_last(self: FolderDataset, files: Sequence[Path], contents: Sequence[bytes]) -> None:
        if files[0].stem == "a":
            assert others.wait(60), "the others did not go on"
        check(self, files, contents)
        done.append(files[0].stem)
        if len(done) == 7:  # of the eight that may be ahead
            others.set()

    with monkeypatch.context() as patch:
        patch.setattr(FolderDataset, "_check", first_is_last)
        assert FolderDataset(root).fingerprint("train") == plain
    assert done.index("a") == 7
    for name in "ck":
        (root / "train" / f"{name}.png").write_text("no image")
    for _ in range(5):
        refused(root, r"cannot read image .*/train/c\.png")


# -------------------- bad folders --------------------


def refused(root: Path, text: str) -> None:
    """The dataset refuses in one line before a run: when its splits are fingerprinted at the latest."""
    with pytest.raises(UpbenchError, match=text) as info:
        [FolderDataset(root).fingerprint(split) for split in ("train", "val")]
    assert "\n" not in str(info.value)


def test_folder_is_missing(tmp_path: Path):
    with pytest.raises(UpbenchError, match=r"dataset folder not found: .*/nowhere"):
        open_dataset(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UpbenchError, match="needs its folder: write folder:/path"):
        open_dataset("folder")


def test_images_without_labels(root: Path):
    for name in ("b", "c"):
        (root / "trainannot" / f"{name}.png").unlink()
    refused(
        root,
        r"2 of 3 images in .*/train have no label map; the first: b\.png \(expected .*/trainannot/b\.png\)",
    )


@pytest.mark.parametrize("value", [4, 200])
def test_label_outside_the_classes(root: Path, value: int):
    label = quarters()
    label[3, 4] = value
    add(root, "train", "b", label)
    refused(root, rf"label map .*/trainannot/b\.png has value {value}, but there are 4 classes \(0 to 3")
    with pytest.raises(UpbenchError, match=f"has value {value}"):
        FolderDataset(root).read("train", 1)


@pytest.mark.parametrize("folder", ["train", "valannot"])
def test_unreadable_image(root: Path, folder: str):
    file = sorted((root / folder).iterdir())[0]
    file.write_bytes(file.read_bytes()[:60])
    refused(root, rf"cannot read image .*/{folder}/{file.name}")


def test_a_pipe_is_refused_and_not_waited_for(root: Path):
    (root / "train" / "a.png").unlink()
    os.mkfifo(root / "train" / "a.png")
    refused(root, r"cannot read .*/train/a\.png: it is not a regular file")
    for ask in (FolderDataset.read, FolderDataset.size):
        with pytest.raises(UpbenchError, match="not a regular file"):
            ask(FolderDataset(root), "train", 0)
    (root / "classes.txt").unlink()
    os.mkfifo(root / "classes.txt")
    refused(root, r"classes\.txt: it is not a regular file")


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png"])
def test_names_that_no_record_can_hold(root: Path, name: bytes):
    try:
        (root / "train" / "b.png").rename(root / "train" / os.fsdecode(name))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    shown = re.escape(repr(name)[2:-1])
    refused(root, rf"file name '{shown}' is not UTF-8, or has control characters")


def test_names_of_any_language(root: Path):
    add(root, "train", "smörgås 写真\u202f5", quarters())
    dataset = FolderDataset(root)
    assert dataset.names("train")[-1] == "smörgås 写真\u202f5"
    assert dataset.fingerprint("train")


def test_not_an_image(root: Path):
    (root / "train" / "a.png").write_text("hello")
    refused(root, r"cannot read image .*/train/a\.png")
    with pytest.raises(UpbenchError, match=r"cannot read image .*/train/a\.png"):
        FolderDataset(root).read("train", 0)


def test_label_of_another_size(root: Path):
    Image.fromarray(quarters()[:10]).save(root / "trainannot" / "a.png")
    refused(root, r"label map .*/a\.png is 32x10, its image 32x24")


def test_label_with_colours(root: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "trainannot" / "a.png")
    refused(root, r"label map .*/a\.png must have one channel of 1 to 16 bits, its pixels are RGB")


def test_two_images_of_one_name(root: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "train" / "a.jpg")
    refused(root, r"has two images of one name: a\.jpg, a\.png")


def test_no_images(root: Path):
    for file in (root / "val").iterdir():
        file.unlink()
    refused(root, r"/val has no images")


@pytest.mark.parametrize("folder", ["train", "trainannot", "val", "valannot"])
def test_missing_split(root: Path, folder: str):
    os.rename(root / folder, root / "other")
    split = folder.removesuffix("annot")
    refused(root, f"needs folders '{split}' and '{split}annot'")


@pytest.mark.parametrize("text", [None, "", "void\n", "class\n" * 300])
def test_classes_missing_or_useless(root: Path, text: str | None):
    (root / "classes.txt").unlink()
    if text is not None:
        (root / "classes.txt").write_text(text)
    refused(root, r"classes\.txt")


def test_unknown_split(root: Path):
    with pytest.raises(UpbenchError, match="unknown split of dataset 'folder' 'vall'; did you mean 'val'"):
        FolderDataset(root).names("vall")


# -------------------- CamVid --------------------


def test_camvid(shared: Path, monkeypatch: pytest.MonkeyPatch):
    folder = shared / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip("CamVid is not in ../shared/data")
    monkeypatch.setenv("UPBENCH_DATA", str(folder.parent))
    dataset = open_dataset("camvid")
    assert isinstance(dataset, CamVid)
    assert [len(dataset.names(split)) for split in ("train", "val", "test")] == [367, 101, 233]
    assert len(dataset.classes) == 11
    listed = (folder / "classes.txt").read_text().split()
    assert list(dataset.classes) == listed
    sample = dataset.read("test", 0)
    assert sample.label is not None
    assert sample.image.shape == (3, 360, 480)
    values = set(sample.label.unique().tolist())
    assert IGNORE in values
    assert values - {IGNORE} <= set(range(11))
    assert set(check_dataset(dataset).values()) <= {"ok", "skipped: no video", "skipped: no pairs"}


def test_camvid_without_its_test_split(root: Path):
    with pytest.raises(UpbenchError, match="needs folders 'test' and 'testannot'"):
        CamVid(root)
