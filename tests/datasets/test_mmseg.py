"""`mmseg:CONFIG.py`: what MMSegmentation itself reads from a config, is what upbench reads."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.sample import IGNORE
from upbench.errors import UpbenchError
from upbench.registry import open_dataset
from upbench.testing import check_dataset

pytest.importorskip("mmengine", reason="extra 'mmseg' is not installed")

LOADERS = "[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]"
ADE = """
dataset = dict(type='ADE20KDataset', data_root='{root}/ADEChallengeData2016', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=(8, 8)), dict(type='PackSegInputs')])
train_dataloader = dict(batch_size=4, dataset=dict(
    **dataset, data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')))
val_dataloader = dict(batch_size=1, dataset=dict(
    **dataset, data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation')))
test_dataloader = val_dataloader
"""
OWN = """
custom = dict(
    type='BaseSegDataset', data_root={root!r}, img_suffix='.jpg', seg_map_suffix='.png', {more}
    metainfo=dict(classes={classes!r}, palette=[[i, i, i] for i in range({count})]))
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=3, dataset=dict(
    **custom, data_prefix=dict(img_path='train', seg_map_path='trainlabels'))))
val_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[
    dict(**custom, data_prefix=dict(img_path='val/a', seg_map_path='vallabels/a')),
    dict(**custom, data_prefix=dict(img_path='val/b', seg_map_path='vallabels/b'))]))
"""


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    before = logging.getLogger("mmengine").level
    yield
    logging.getLogger("mmengine").setLevel(before)


def own(root: Path, classes: tuple[str, ...] = ("sky", "road", "car"), more: str = "") -> Path:
    """A lab's own data, and the config that describes it."""
    for folder, count in (("train", 3), ("val/a", 2), ("val/b", 2)):
        for i in range(count):
            label = miniatures.drawing(i, [0, 1, 2, 255])
            miniatures.save(root / folder / f"{i}.jpg", miniatures.photo(label, i))
            labels = folder.replace("train", "trainlabels").replace("val", "vallabels")
            miniatures.save(root / labels / f"{i}.png", label)
    file = root / "own.py"
    file.write_text(OWN.format(root=str(root), classes=classes, count=len(classes), more=more))
    return file


def ade(root: Path) -> Path:
    miniatures.ade20k(root)
    (root / "ade.py").write_text(ADE.format(root=root).replace(", reduce_zero_label=True", ""))
    return root / "ade.py"


def theirs(config: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images (RGB) and label maps as MMSegmentation's own pipeline loads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.datasets  # noqa: F401
        from mmengine.config import Config
        from mmengine.registry import DefaultScope
        from mmseg.registry import DATASETS

        described = Config.fromfile(str(config))[f"{split}_dataloader"]["dataset"]
        described["pipeline"] = [step for step in described["pipeline"] if step["type"].startswith("Load")]
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = DATASETS.build(described)
        return [(item["img"][..., ::-1], item["gt_seg_map"]) for item in dataset]


def test_the_same_as_mmsegs(tmp_path: Path) -> None:
    config = ade(tmp_path)
    dataset = open_dataset(f"mmseg:{config}")
    check_dataset(dataset)
    assert dataset.name == "mmseg:ade"
    assert dataset.splits == ["train", "val"]
    assert len(dataset.classes) == 150
    for split in dataset.splits:
        expected = theirs(config, split)
        assert len(expected) == len(dataset.names(split))
        for i, (image, label) in enumerate(expected):
            sample = dataset.read(split, i)
            assert np.array_equal(sample.label, label), "value 0 is ignored, the others are one less"
            off = np.abs(sample.image.numpy().transpose(1, 2, 0).astype(int) - image)
            assert off.mean() < 1, "another decoder of JPEG"
    ours = open_dataset(f"ade20k_150:{tmp_path}")
    assert torch.equal(ours.read("val", 1).label, dataset.read("val", 1).label)


def test_wrappers_and_own_classes(tmp_path: Path) -> None:
    dataset = open_dataset(f"mmseg:{own(tmp_path)}")
    check_dataset(dataset)
    assert dataset.classes == ("sky", "road", "car")
    assert dataset.names("train") == ["0", "1", "2"], "repeated, and yet each is one image"
    assert dataset.names("val") == ["a/0", "a/1", "b/0", "b/1"], "of two datasets, told apart"
    assert np.array_equal(dataset.read("train", 1).label, miniatures.drawing(1, [0, 1, 2, 255]))


def test_ignore_index(tmp_path: Path) -> None:
    before = open_dataset(f"mmseg:{own(tmp_path)}").fingerprint("train")
    dataset = open_dataset(f"mmseg:{own(tmp_path, more='ignore_index=1,')}")
    stored = miniatures.drawing(1, [0, 1, 2, 255])
    assert np.array_equal(dataset.read("train", 1).label, np.where(stored == 1, IGNORE, stored))
    assert dataset.fingerprint("train") != before, "the config is part of what labels mean"


def test_paths_from_above_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MMSegmentation's configs count from its own folder, wherever one is."""
    file = own(tmp_path / "data")
    place = tmp_path / "configs/_base_/datasets/own.py"
    place.parent.mkdir(parents=True)
    place.write_text(file.read_text().replace(str(tmp_path / "data"), "data"))
    monkeypatch.chdir("/")
    dataset = open_dataset(f"mmseg:{place}")
    assert len(dataset.names("train")) == 3
    assert len(pickle.loads(pickle.dumps(dataset)).names("val")) == 4


def test_a_loader_of_its_own(tmp_path: Path) -> None:
    """Arrays of NumPy, by the loader that the config names."""
    file = own(tmp_path)
    for image in (tmp_path / "train").glob("*.jpg"):
        with Image.open(image) as picture:
            np.save(image.with_suffix(".npy"), np.asarray(picture)[..., ::-1])  # BGR
    text = file.read_text().replace("**custom, data_prefix=dict(img_path='train'", (
        "**{**custom, 'img_suffix': '.npy'}, pipeline=[dict(type='LoadImageFromNpyFile'), "
        "dict(type='LoadAnnotations')], data_prefix=dict(img_path='train'"
    ))  # fmt: skip
    (tmp_path / "numpy.py").write_text(text)
    numpy, plain = open_dataset(f"mmseg:{tmp_path / 'numpy.py'}"), open_dataset(f"mmseg:{file}")
    assert torch.equal(numpy.read("train", 2).image, plain.read("train", 2).image)
    assert numpy.size("train", 2) == plain.size("train", 2)
    assert numpy.fingerprint("train")


def broken(root: Path, what: str) -> Path:
    file = own(root)
    text = file.read_text()
    if what == "type":
        file.write_text(text.replace("BaseSegDataset", "NoSuchDataset"))
    elif what == "python":
        file.write_text(text + "\n1 / 0\n")
    elif what == "train":
        file.write_text(text.replace("train_dataloader", "other_dataloader"))
    elif what == "data":
        file.write_text(text.replace(f"data_root='{root}'", "data_root='/nowhere'"))
    elif what == "classes":
        start, end = text.index("metainfo="), text.index("))", text.index("metainfo=")) + 1
        file.write_text(text[:start] + text[end:])
    elif what == "pair":
        (root / "trainlabels/1.png").unlink()
    elif what == "range":
        Image.fromarray(np.full((48, 64), 7, np.uint8)).save(root / "trainlabels/1.png")
    elif what == "wide":
        Image.fromarray(np.full((48, 64), 300, np.uint16)).save(root / "trainlabels/1.png")
    elif what == "colours":
        Image.fromarray(np.full((48, 64, 3), 1, np.uint8)).save(root / "trainlabels/1.png")
    elif what == "cut":
        content = (root / "trainlabels/1.png").read_bytes()
        (root / "trainlabels/1.png").write_bytes(content[:40])
    return file


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("type", "NoSuchDataset"),
        ("python", "division by zero"),
        ("train", "describes val data; a train_dataloader and a val_dataloader are expected"),
        ("data", "/nowhere"),
        ("classes", "its datasets name no classes"),
        ("pair", r"1 of 3 images of split 'train' have no label map; the first: 1\.jpg"),
        ("range", "value 7, .*known: 0 to 2, 255"),
        ("wide", "value 300, MMSegmentation reads 8 bits"),
        ("colours", "must have one channel"),
        ("cut", r"cannot read .*1\.png"),
    ],
)
def test_broken_ones_are_refused_in_one_line(what: str, words: str, tmp_path: Path) -> None:
    file = broken(tmp_path, what)
    with pytest.raises(UpbenchError, match=words) as refused:
        open_dataset(f"mmseg:{file}").fingerprint("train")
    assert "\n" not in str(refused.value)


def test_what_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UpbenchError, match=r"dataset file not found: .*nothing\.py"):
        open_dataset(f"mmseg:{tmp_path / 'nothing.py'}")
    with pytest.raises(UpbenchError, match="dataset 'mmseg' needs its file: write mmseg:FILE"):
        open_dataset("mmseg")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UpbenchError, match="describes no data"):
        open_dataset(f"mmseg:{tmp_path / 'empty.py'}")


# -------------------- MMSegmentation's own configs --------------------


def trained_ids(root: Path) -> None:
    miniatures.cityscapes(root, train_ids=True)


def augmented(root: Path) -> None:
    """VOC and SBD as MMSegmentation's converter leaves them: with a list of the additional ones."""
    base = miniatures.sbd(root, png=True) / "VOCdevkit/VOC2012"
    lists = base / "ImageSets/Segmentation"
    own = set((lists / "train.txt").read_text().split())
    miniatures.text(
        lists / "aug.txt", [n for n in (lists / "trainaug.txt").read_text().split() if n not in own]
    )


CONFIGS = {
    "ade20k": ("data/ade", miniatures.ade20k, "ade20k_150"),
    "cityscapes": ("data/cityscapes", trained_ids, "cityscapes"),
    "pascal_context": ("data", miniatures.pascal_context, "pascal_context"),
    "pascal_context_59": ("data", miniatures.pascal_context, "pascal_context59"),
    "pascal_voc12": ("data", miniatures.voc2012, "voc2012"),
    "pascal_voc12_aug": ("data", augmented, "voc2012_aug"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_their_configs_say_what_our_readers_say(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmseg

    file = Path(mmseg.__file__).parent / ".mim/configs/_base_/datasets" / f"{config}.py"
    assert file.is_file()
    place, make, name = CONFIGS[config]
    make(tmp_path / place)
    monkeypatch.chdir(tmp_path)
    dataset, ours = open_dataset(f"mmseg:{file}"), open_dataset(f"{name}:{tmp_path / place}")
    assert dataset.name == f"mmseg:{config}"
    assert len(dataset.classes) == len(ours.classes)
    for split, same in (("train", ours.train_split), ("val", "val")):
        labels = {
            sample.name: sample.label for sample in (ours.read(same, i) for i in range(len(ours.names(same))))
        }
        assert len(dataset.names(split)) == len(labels)
        for i, name in enumerate(dataset.names(split)):
            short = name.rpartition("/")[2].removesuffix("_leftImg8bit")
            assert torch.equal(dataset.read(split, i).label, labels[short])
