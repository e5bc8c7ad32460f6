"""The papers' datasets on their official layouts in miniature: what is read, and every way of being wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE
from upbench.datasets.nyu.nyuv2 import NYU40
from upbench.datasets.papers._names import (
    ADE150,
    CITYSCAPES19,
    COCO_STUFF27,
    COCO_STUFF182,
    COCO_STUFF_COARSE,
    COCO_STUFF_UNUSED,
    CONTEXT59,
    VOC21,
)
from upbench.datasets.papers.cityscapes import LABEL_IDS
from upbench.errors import UpbenchError
from upbench.registry import find_dataset, open_dataset
from upbench.testing import check_dataset

Make = Callable[[Path], Path]

READERS: dict[str, tuple[Make, dict[str, int]]] = {
    "voc2012": (miniatures.voc2012, {"train": 4, "val": 3}),
    "voc2012_aug": (miniatures.sbd, {"train_aug": 7, "train": 4, "val": 3}),
    "ade20k": (miniatures.ade20k, {"train": 4, "val": 3}),
    "ade20k_150": (miniatures.ade20k, {"train": 4, "val": 3}),
    "cityscapes": (miniatures.cityscapes, {"train": 4, "val": 2}),
    "coco_stuff27": (miniatures.coco_stuff, {"train": 3, "val": 2}),
    "coco_stuff171": (miniatures.coco_stuff, {"train": 4, "val": 3}),
    "pascal_context": (miniatures.pascal_context, {"train": 3, "val": 2}),
    "pascal_context59": (miniatures.pascal_context, {"train": 3, "val": 2}),
    "kitti_semantics": (miniatures.kitti_semantics, {"train": 4, "val": 2}),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


def opened(name: str, folder: Path) -> Dataset:
    make, _ = READERS[name]
    return open_dataset(f"{name}:{make(folder)}")


@pytest.mark.parametrize("name", READERS)
def test_contract(name: str, tmp_path: Path) -> None:
    check_dataset(opened(name, tmp_path / "data"))


@pytest.mark.parametrize("name", READERS)
def test_splits(name: str, tmp_path: Path) -> None:
    dataset = opened(name, tmp_path / "data")
    assert {split: len(dataset.names(split)) for split in READERS[name][1]} == READERS[name][1]
    assert set(dataset.counts) == set(READERS[name][1]), "the official counts are known"
    for text in (dataset.title, dataset.license, dataset.source, dataset.citation):
        assert text
    assert dataset.archives or dataset.by_hand, "it can be had somehow"


def stored(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


def same(label: torch.Tensor | None, expected: np.ndarray) -> bool:
    assert label is not None
    return np.array_equal(label.numpy(), expected)


# -------------------- label values --------------------


def test_voc_as_stored(tmp_path: Path) -> None:
    dataset = opened("voc2012", tmp_path)
    sample = dataset.read("train", 1)
    file = tmp_path / "VOCdevkit/VOC2012/SegmentationClass" / f"{sample.name}.png"
    assert same(sample.label, stored(file))
    assert (sample.label == IGNORE).any(), "borders stay 255"
    with Image.open(file) as picture:
        assert picture.mode == "P"


def test_ade_with_and_without_other(tmp_path: Path) -> None:
    whole, reduced = opened("ade20k", tmp_path), open_dataset(f"ade20k_150:{tmp_path}")
    raw = stored(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png").astype(int)
    assert same(whole.read("val", 0).label, raw)
    assert same(reduced.read("val", 0).label, np.where(raw == 0, IGNORE, raw - 1))
    assert whole.classes == ("other", *ADE150)
    assert whole.other_class == 0
    assert (len(reduced.classes), reduced.other_class) == (150, None)
    assert whole.fingerprint("val") != reduced.fingerprint("val")


def test_cityscapes_by_id_and_by_train_id(tmp_path: Path) -> None:
    by_id = open_dataset(f"cityscapes:{miniatures.cityscapes(tmp_path / 'a')}")
    raw = stored(tmp_path / "a/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png")
    expected = np.array([LABEL_IDS.index(v) if v in LABEL_IDS else IGNORE for v in range(34)])[raw]
    sample = by_id.read("train", 0)
    assert sample.name == "aachen_000000_000019"
    assert same(sample.label, expected)

    made = open_dataset(f"cityscapes:{miniatures.cityscapes(tmp_path / 'b', train_ids=True)}")
    raw = stored(tmp_path / "b/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png")
    assert same(made.read("train", 0).label, raw)
    check_dataset(made)


def test_cityscapes_table_is_torchvisions() -> None:
    from torchvision.datasets import Cityscapes

    theirs = {c.train_id: (c.id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 19}
    assert [theirs[i] for i in range(19)] == list(zip(LABEL_IDS, CITYSCAPES19, strict=True))


def test_coco_coarse_and_fine(tmp_path: Path) -> None:
    fine = opened("coco_stuff171", tmp_path)
    coarse = open_dataset(f"coco_stuff27:{tmp_path}")
    raw = stored(tmp_path / "dataset/annotations/val2017/000000000139.png")
    used = [value for value in range(182) if value not in COCO_STUFF_UNUSED]
    table = np.array([used.index(v) if v in used else IGNORE for v in range(182)] + [IGNORE] * 74)
    assert same(fine.read("val", 0).label, table[raw])
    assert same(coarse.read("val", 0).label, np.array([*COCO_STUFF_COARSE, *[IGNORE] * 74])[raw])
    assert len(fine.classes) == 171
    assert set(coarse.names("train")) < set(fine.names("train")), "the list chooses"
    things = {COCO_STUFF27[coarse] for coarse in COCO_STUFF_COARSE[:91]}
    assert all(name.endswith("-things") for name in things), "the first 91 values are things"
    assert all(COCO_STUFF27[coarse].endswith("-stuff") for coarse in COCO_STUFF_COARSE[91:])
    assert COCO_STUFF182[0] == "person"
    assert COCO_STUFF27[COCO_STUFF_COARSE[0]] == "person-things"


@pytest.mark.parametrize("nested", ["curated", "dataset/curated", "curated/curated"])
def test_coco_lists_where_scripts_leave_them(nested: str, tmp_path: Path) -> None:
    miniatures.coco_stuff(tmp_path)
    lists = tmp_path / "lists"
    (tmp_path / "curated").rename(lists)
    shutil.copytree(lists, tmp_path / nested)
    assert len(open_dataset(f"coco_stuff27:{tmp_path}").names("train")) == 3


def test_coco_without_the_folder_dataset(tmp_path: Path) -> None:
    miniatures.coco_stuff(tmp_path)
    for kind in ("images", "annotations"):
        (tmp_path / "dataset" / kind).rename(tmp_path / kind)
    assert len(open_dataset(f"coco_stuff27:{tmp_path}").names("val")) == 2


def test_context_with_and_without_background(tmp_path: Path) -> None:
    whole, reduced = opened("pascal_context", tmp_path), open_dataset(f"pascal_context59:{tmp_path}")
    raw = stored(tmp_path / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000000.png").astype(int)
    assert same(whole.read("train", 0).label, raw)
    assert same(reduced.read("train", 0).label, np.where(raw == 0, IGNORE, raw - 1))
    assert whole.other_class == 0


def test_contexts_own_labels(tmp_path: Path) -> None:
    miniatures.pascal_context(tmp_path, folder="59_context_labels")
    base = tmp_path / "VOCdevkit/VOC2010"
    (base / "59_context_labels").rename(tmp_path / "59_context_labels")
    check_dataset(open_dataset(f"pascal_context:{tmp_path}"))


def test_kitti_splits_by_number(tmp_path: Path) -> None:
    """A partial copy has the same images in the same splits."""
    dataset = opened("kitti_semantics", tmp_path)
    assert dataset.names("val") == ["000000_10", "000005_10"]
    for kind in ("image_2", "semantic"):
        (tmp_path / "training" / kind / "000000_10.png").unlink()
    assert open_dataset(f"kitti_semantics:{tmp_path}").names("val") == ["000005_10"]


@pytest.mark.parametrize(
    ("names", "count"),
    [(VOC21, 21), (ADE150, 150), (CONTEXT59, 59), (NYU40, 40), (COCO_STUFF182, 182), (COCO_STUFF27, 27)],
)
def test_names_are_distinct(names: tuple[str, ...], count: int) -> None:
    assert len(set(names)) == len(names) == count
    assert all(name == name.strip() and name for name in names)


@pytest.mark.parametrize("dataset", ["VOC", "ADE20K", "PascalContext", "Cityscapes", "COCOStuff"])
def test_names_are_mmsegs(dataset: str) -> None:
    """The same classes in the same order as a well-kept library's; spelling may differ."""
    mmseg = pytest.importorskip("mmseg.datasets", reason="extra 'mmseg' is not installed")
    theirs, ours = {
        "VOC": (mmseg.PascalVOCDataset, VOC21),
        "ADE20K": (mmseg.ADE20KDataset, ADE150),
        "PascalContext": (mmseg.PascalContextDataset59, CONTEXT59),
        "Cityscapes": (mmseg.CityscapesDataset, CITYSCAPES19),
        "COCOStuff": (mmseg.COCOStuffDataset, find_dataset("coco_stuff171").classes),
    }[dataset]

    def letters(names: object) -> list[str]:
        return [re.sub("[^a-z]", "", name.lower()) for name in names]  # type: ignore[attr-defined]

    assert letters(theirs.METAINFO["classes"]) == letters(ours)


# -------------------- annotations of SBD --------------------


@pytest.mark.parametrize("png", [False, True])
def test_train_aug(png: bool, tmp_path: Path) -> None:
    """VOC's own label maps where it has them, SBD's elsewhere; nothing of VOC's val."""
    dataset = open_dataset(f"voc2012_aug:{miniatures.sbd(tmp_path, png=png)}")
    check_dataset(dataset)
    own, val, names = dataset.names("train"), dataset.names("val"), dataset.names("train_aug")
    assert set(own) < set(names)
    assert not set(val) & set(names)
    assert dataset.splits == ["train_aug", "val"]
    for i, name in enumerate(names):  # SBD's are numbered from 100 on
        drawn = None if name in own else miniatures.drawing(int(name[-2:]) + 50, range(21))
        voc = tmp_path / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"
        assert same(dataset.read("train_aug", i).label, stored(voc) if drawn is None else drawn)


# -------------------- partial copies --------------------


def test_partial_copies_are_read(tmp_path: Path) -> None:
    """Where neither picture nor label map is there, the image is left out; where one is, that is an error."""
    miniatures.voc2012(tmp_path)
    base = tmp_path / "VOCdevkit/VOC2012"
    name = (base / "ImageSets/Segmentation/train.txt").read_text().split()[1]
    (base / f"JPEGImages/{name}.jpg").unlink()
    with pytest.raises(UpbenchError, match=f"1 of 4 label maps of split 'train' have no image; .*{name}"):
        open_dataset(f"voc2012:{tmp_path}").names("train")
    (base / f"SegmentationClass/{name}.png").unlink()
    dataset = open_dataset(f"voc2012:{tmp_path}")
    assert len(dataset.names("train")) == 3
    assert name not in dataset.names("train")


@pytest.mark.parametrize("place", ["VOCdevkit", "VOCdevkit/VOC2012"])
def test_a_folder_further_down_will_do(place: str, tmp_path: Path) -> None:
    miniatures.voc2012(tmp_path)
    assert open_dataset(f"voc2012:{tmp_path / place}").names("val") == opened("voc2012", tmp_path).names(
        "val"
    )


@pytest.mark.parametrize(
    ("make", "folder", "names"),
    [
        (miniatures.sbd, "voc2012", ["voc2012", "voc2012_aug"]),
        (miniatures.ade20k, "ade20k", ["ade20k", "ade20k_150"]),
        (miniatures.coco_stuff, "coco_stuff27", ["coco_stuff27", "coco_stuff171"]),
        (miniatures.pascal_context, "pascal_context", ["pascal_context", "pascal_context59"]),
        (miniatures.nyuv2_splits, "nyuv2", ["nyuv2", "nyuv2_39"]),
    ],
)
def test_readings_of_the_same_files_share_a_folder(
    make: Make, folder: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPBENCH_DATA", str(tmp_path))
    make(tmp_path / folder)
    for name in names:
        assert open_dataset(name).root == tmp_path / folder
    (tmp_path / names[1]).mkdir()  # whoever has one of its own means it
    with pytest.raises(UpbenchError, match=f"{tmp_path / names[1]}"):
        open_dataset(names[1])


def test_where_it_lies_does_not_matter(tmp_path: Path) -> None:
    one, two = (open_dataset(f"ade20k:{miniatures.ade20k(tmp_path / place)}") for place in "ab")
    assert one.fingerprint("train") == two.fingerprint("train")


# -------------------- beside torchvision's readers --------------------


def test_voc_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import VOCSegmentation
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    dataset = opened("voc2012", tmp_path)
    for split in dataset.splits:
        theirs = VOCSegmentation(str(tmp_path), "2012", split)
        assert len(theirs) == len(dataset.names(split))
        for i, (image, mask) in enumerate(theirs):
            sample = dataset.read(split, i)
            assert np.array_equal(sample.image.permute(1, 2, 0), np.asarray(image))
            assert same(sample.label, np.asarray(mask))
    (archive,) = dataset.archives
    facts = DATASET_YEAR_DICT["2012"]
    assert (archive.url, archive.checksum) == (facts["url"], f"md5:{facts['md5']}")


def test_sbd_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import SBDataset

    dataset = open_dataset(f"voc2012_aug:{miniatures.sbd(tmp_path)}")
    base = tmp_path / "benchmark_RELEASE/dataset"
    extra = [name for name in dataset.names("train_aug") if name not in dataset.names("train")]
    (base / "img").mkdir()
    (base / "train.txt").write_text("\n".join(extra))
    theirs = SBDataset(str(base), "train", mode="segmentation")
    for i, name in enumerate(extra):
        ours = dataset.read("train_aug", dataset.names("train_aug").index(name))
        assert same(ours.label, np.asarray(theirs._get_segmentation_target(theirs.masks[i])))
    assert dataset.archives[1].url == SBDataset.url
    assert dataset.archives[1].checksum == f"md5:{SBDataset.md5}"


def test_cityscapes_is_torchvisions(tmp_path: Path) -> None:
    from torchvision import datasets

    dataset = opened("cityscapes", tmp_path)
    table = np.full(256, IGNORE)
    for known in datasets.Cityscapes.classes:
        table[known.id] = known.train_id if 0 <= known.train_id < 19 else IGNORE
    for split in dataset.splits:
        theirs = datasets.Cityscapes(str(tmp_path), split, target_type="semantic")
        pairs = {
            Path(file).name: (image, mask) for file, (image, mask) in zip(theirs.images, theirs, strict=True)
        }
        assert len(pairs) == len(dataset.names(split))
        for i, name in enumerate(dataset.names(split)):
            image, mask = pairs[f"{name}_leftImg8bit.png"]
            sample = dataset.read(split, i)
            assert np.array_equal(sample.image.permute(1, 2, 0), np.asarray(image))
            assert same(sample.label, table[np.asarray(mask)])
