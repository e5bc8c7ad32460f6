"""Folder datasets: layout, label values, geometry, and every way in which a folder can be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.sample import IGNORE
from upbench.datasets.camvid import CamVid
from upbench.datasets.folder import FolderDataset
from upbench.errors import UpbenchError
from upbench.registry import open_dataset

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
    sample = FolderDataset(root).load("train", 0, 24)
    assert sample.label is not None
    assert sample.label.dtype == torch.int64
    assert sample.label.shape == sample.valid.shape == sample.image.shape[1:] == (24, 24)
    assert sample.label[0, -1] == 1
    assert sample.label[-1, 0] == IGNORE
    assert sample.label[-1, -1] == 2
    assert set(sample.label.unique().tolist()) == {0, 1, 2, IGNORE}
    assert sample.valid.all()


@pytest.mark.parametrize("size", [24, 12, 48, 31])
def test_image_and_label_stay_aligned(root: Path, size: int):
    """Shorter side to `size`, centre crop: both show the same classes away from boundaries."""
    sample = FolderDataset(root).load("train", 0, size)
    assert sample.image.shape == (3, size, size)
    assert sample.label is not None
    raw = sample.image[0] * 255 / 10
    classes = torch.where(sample.label == IGNORE, 2, torch.where(sample.label == 2, 3, sample.label)).float()
    rows = torch.tensor([i for i in range(size) if abs(i + 0.5 - size / 2) > 2.5 * size / 24])
    assert len(rows) > 0.7 * size
    torch.testing.assert_close(raw[rows][:, rows], classes[rows][:, rows], rtol=0, atol=0.21)


def test_images_of_other_formats_and_palettes(root: Path):
    add(root, "train", "photo", quarters(), ".jpg")
    palette = Image.fromarray(quarters(), mode=None).convert("L")
    palette = palette.convert("P")
    palette.putdata(quarters().reshape(-1).tolist())
    palette.save(root / "trainannot" / "photo.png")
    sample = FolderDataset(root).load("train", 3, 24)
    assert sample.name == "photo"
    assert sample.label is not None
    assert set(sample.label.unique().tolist()) == {0, 1, 2, IGNORE}


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
    import shutil

    shutil.copytree(root, tmp_path / "elsewhere")
    assert FolderDataset(root).fingerprint("train") == FolderDataset(tmp_path / "elsewhere").fingerprint(
        "train"
    )


def test_files_are_checked_once(root: Path, monkeypatch: pytest.MonkeyPatch):
    first = FolderDataset(root).fingerprint("train")
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read again"))
    assert FolderDataset(root).fingerprint("train") == first


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
        FolderDataset(root).load("train", 1, 24)


@pytest.mark.parametrize("folder", ["train", "valannot"])
def test_unreadable_image(root: Path, folder: str):
    file = sorted((root / folder).iterdir())[0]
    file.write_bytes(file.read_bytes()[:60])
    refused(root, rf"cannot read image .*/{folder}/{file.name}")


def test_not_an_image(root: Path):
    (root / "train" / "a.png").write_text("hello")
    refused(root, r"cannot read image .*/train/a\.png")
    with pytest.raises(UpbenchError, match=r"cannot read image .*/train/a\.png"):
        FolderDataset(root).load("train", 0, 24)


def test_label_of_another_size(root: Path):
    Image.fromarray(quarters()[:10]).save(root / "trainannot" / "a.png")
    refused(root, r"label map .*/a\.png is 32x10, its image 32x24")


def test_label_with_colours(root: Path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "trainannot" / "a.png")
    refused(root, r"label map .*/a\.png must have one channel of 8 bits, it is RGB")


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
    sample = dataset.load("test", 0, 224)
    assert sample.label is not None
    assert sample.image.shape == (3, 224, 224)
    values = set(sample.label.unique().tolist())
    assert IGNORE in values
    assert values - {IGNORE} <= set(range(11))


def test_camvid_without_its_test_split(root: Path):
    with pytest.raises(UpbenchError, match="needs folders 'test' and 'testannot'"):
        CamVid(root)
