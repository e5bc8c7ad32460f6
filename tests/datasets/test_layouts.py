"""Layouts of the papers' datasets that are wrong: each is refused in one line, before any computing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
from PIL import Image

from upbench.errors import UpbenchError
from upbench.registry import open_dataset

MAKE: dict[str, Callable[[Path], Path]] = {
    "voc2012": miniatures.voc2012,
    "voc2012_aug": miniatures.sbd,
    "ade20k": miniatures.ade20k,
    "cityscapes": miniatures.cityscapes,
    "coco_stuff27": miniatures.coco_stuff,
    "coco_stuff171": miniatures.coco_stuff,
    "pascal_context": miniatures.pascal_context,
    "kitti_semantics": miniatures.kitti_semantics,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


def stored(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


VOC, ADE, CONTEXT = "VOCdevkit/VOC2012", "ADEChallengeData2016", "VOCdevkit/VOC2010"
GT = "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
VAL_LIST = f"{VOC}/ImageSets/Segmentation/val.txt"
VOC_LABEL, ADE_LABEL = (
    f"{VOC}/SegmentationClass/2007_000000.png",
    f"{ADE}/annotations/training/ADE_train_00000001.png",
)
ADE_IMAGE = f"{ADE}/images/training/ADE_train_00000001.jpg"


def remove(place: str) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        shutil.rmtree(root / place) if (root / place).is_dir() else (root / place).unlink()

    return do


def rename(place: str, name: str) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        (root / place).rename((root / place).with_name(name))

    return do


def write(place: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / place).write_bytes(content) and None  # type: ignore[return-value]


def label(place: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        Image.fromarray(change(stored(root / place))).save(root / place)

    return do


def cut(place: str) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        content = (root / place).read_bytes()
        (root / place).write_bytes(content[: len(content) // 2])

    return do


def zipped(root: Path) -> None:
    shutil.rmtree(root / "gtFine")
    (root / "gtFine_trainvaltest.zip").write_bytes(b"PK")


def renamed(root: Path) -> None:
    for kind in ("image_2", "semantic"):
        rename(f"training/{kind}/000003_10.png", "000003\udcff_10.png")(root)


BROKEN: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("a name of other bytes", "kitti_semantics", renamed, "has a name that is not UTF-8"),
    (
        "nothing there",
        "voc2012",
        remove("VOCdevkit"),
        r"has no ImageSets/Segmentation \(found: nothing\); expected",
    ),
    (
        "no labels",
        "voc2012",
        remove(f"{VOC}/SegmentationClass"),
        "has ImageSets/Segmentation, JPEGImages but no Seg",
    ),
    ("no list", "voc2012", remove(VAL_LIST), "cannot read .*val.txt"),
    ("an empty list", "voc2012", write(VAL_LIST, b"\n\n"), "val.txt names no image"),
    (
        "a list that is an image",
        "voc2012",
        write(VAL_LIST, b"\xff\xd8\xff\xe0"),
        "cannot read .*val.txt: it is not text in UTF-8",
    ),
    ("a name twice", "voc2012", write(VAL_LIST, b"2007_000004\n2007_000004\n"), "names '2007_000004' twice"),
    (
        "a list of others",
        "voc2012",
        write(VAL_LIST, b"2005_1\n"),
        "has no images .the first would be .*2005_1.jpg",
    ),
    (
        "labels in colours",
        "voc2012",
        label(VOC_LABEL, miniatures.photo),
        "must have one channel of 1 to 16 bits, its pixels are RGB",
    ),
    (
        "labels of 16 bits",
        "voc2012",
        label(VOC_LABEL, lambda x: x.astype(np.uint16) + 256),
        "value 256, which dataset 'voc2012' has no meaning for",
    ),
    (
        "a class too many",
        "voc2012",
        label(VOC_LABEL, lambda x: x * 0 + 21),
        "value 21, which .*known: 0 to 20, 255",
    ),
    ("another size", "voc2012", label(VOC_LABEL, lambda x: x[:-1]), "is 48x63, its image 48x64"),
    ("a label map cut short", "voc2012", cut(VOC_LABEL), "cannot read image .*2007_000000.png"),
    (
        "no SBD",
        "voc2012_aug",
        remove("benchmark_RELEASE"),
        "no SegmentationClassAug, .* without either voc2012 would",
    ),
    ("the training split only", "ade20k", remove(f"{ADE}/images/validation"), "but no images/validation"),
    (
        "a slip",
        "ade20k",
        rename(f"{ADE}/annotations", "anotations"),
        "'anotations' should be called 'annotations'",
    ),
    (
        "no label map",
        "ade20k",
        remove(ADE_LABEL),
        "1 of 4 images of split 'train' have no label map; .*00000001.jpg",
    ),
    ("no image", "ade20k", remove(ADE_IMAGE), "1 of 4 label maps of split 'train' have no image"),
    (
        "a class of 200",
        "ade20k",
        label(ADE_LABEL, lambda x: x + 50),
        "which dataset 'ade20k' has no meaning for",
    ),
    ("an empty image", "ade20k", write(ADE_IMAGE, b""), "cannot read .*00000001.jpg: it is empty"),
    ("an image cut short", "ade20k", cut(ADE_IMAGE), "cannot read image .*00000001.jpg"),
    (
        "no gtFine",
        "cityscapes",
        remove("gtFine"),
        "has leftImg8bit/train, leftImg8bit/val but no gtFine/train",
    ),
    (
        "gtFine still packed",
        "cityscapes",
        zipped,
        "no gtFine/train; expected .*; unpack gtFine_trainvaltest.zip",
    ),
    ("gtfine", "cityscapes", rename("gtFine", "gtfine"), "'gtfine' should be called 'gtFine'"),
    ("no label ids", "cityscapes", remove(GT), "1 of 4 images .* have no label map; .*aachen_000000"),
    ("ids of 34", "cityscapes", label(GT, lambda x: x * 0 + 34), "value 34, .*known: 0 to 33, 255"),
    (
        "no lists",
        "coco_stuff27",
        remove("curated"),
        "no list curated/train2017/Coco164kFull_Stuff_Coarse.txt",
    ),
    (
        "the other list",
        "coco_stuff27",
        remove("curated/train2017/Coco164kFull_Stuff_Coarse.txt"),
        "found Coco164kFull_Stuff_Coarse_7.txt, which are other images",
    ),
    ("no annotations", "coco_stuff171", remove("dataset/annotations"), "but no annotations/train2017"),
    (
        "no context",
        "pascal_context",
        remove(f"{CONTEXT}/SegmentationClassContext"),
        "but no SegmentationClassContext",
    ),
    ("no labels for KITTI", "kitti_semantics", remove("training/semantic"), "but no training/semantic"),
]


def planned(spec: str) -> None:
    """What every run does before anything is computed."""
    dataset = open_dataset(spec)
    for split in dataset.splits:
        dataset.names(split)
        dataset.fingerprint(split)


@pytest.mark.parametrize(
    ("name", "break_it", "words"), [entry[1:] for entry in BROKEN], ids=[e[0] for e in BROKEN]
)
def test_broken_ones_are_refused_in_one_line(
    name: str, break_it: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = MAKE[name](tmp_path / "data")
    break_it(folder)
    with pytest.raises(UpbenchError, match=words) as refused:
        planned(f"{name}:{folder}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("cityscapes", "leftImg8bit", "."),
        ("cityscapes", "leftImg8bit/train", "."),
        ("ade20k", "ADEChallengeData2016/images", "."),
        ("kitti_semantics", "training", "."),
    ],
)
def test_a_folder_too_far_down(name: str, given: str, meant: str, tmp_path: Path) -> None:
    folder = MAKE[name](tmp_path / "data")
    with pytest.raises(
        UpbenchError, match=f"did you mean {name}:{re.escape(str((folder / meant).resolve()))}"
    ):
        open_dataset(f"{name}:{folder / given}")


def test_a_folder_too_far_up(tmp_path: Path) -> None:
    miniatures.cityscapes(tmp_path / "data" / "cityscapes")
    with pytest.raises(UpbenchError, match=f"did you mean cityscapes:{tmp_path}/data/cityscapes"):
        open_dataset(f"cityscapes:{tmp_path / 'data'}")


def test_more_than_the_official_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(f"ade20k:{miniatures.ade20k(tmp_path)}")
    monkeypatch.setattr(type(dataset), "counts", {"train": 3, "val": 3})
    with pytest.raises(UpbenchError, match="has 4 images, the official one 3"):
        dataset.names("train")
