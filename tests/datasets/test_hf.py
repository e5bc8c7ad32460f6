"""`hf:NAME`: tables with columns of images, in the hub's formats, from local folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniatures
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from upbench.contracts.sample import IGNORE
from upbench.errors import UpbenchError
from upbench.registry import open_dataset
from upbench.testing import assert_close, check_dataset

hub = pytest.importorskip("datasets", reason="extra 'hf' is not installed")
if not hasattr(hub, "load_dataset"):  # a namespace: the folder of these tests
    pytest.skip("extra 'hf' is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CLASSES = ["sky", "road", "car"]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(hub.config, "HF_DATASETS_OFFLINE", True)
    hub.disable_progress_bars()


def table(folder: Path, count: int, columns: tuple[str, str] = ("image", "annotation")) -> Any:
    """Pictures and label maps 0..3 (0 is none), as a table that holds files."""
    rows: dict[str, list[str]] = {name: [] for name in columns}
    for i in range(count):
        label = miniatures.drawing(i, [1, 2, 3, 0])
        files = folder / f"{i}.jpg", folder / f"{i}.png"
        miniatures.save(files[0], miniatures.photo(label, i))
        miniatures.save(files[1], label)
        for name, file in zip(columns, files, strict=True):
            rows[name].append(str(file))
    return hub.Dataset.from_dict(rows, hub.Features({name: hub.Image() for name in columns}))


def saved(root: Path, **columns: Any) -> Path:
    """A folder as `push_to_hub` lays it out: Parquet files by split."""
    (root / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("validation", 2)):
        part = table(root.parent / "files" / split, count, **columns)
        part.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))
    return root


def description(root: Path, **more: Any) -> Path:
    said = {"path": "table", "classes": CLASSES, "first": 1, **more}
    (root / "mine.yaml").write_text(yaml.safe_dump(said))
    return root / "mine.yaml"


def test_parquet_with_a_description(tmp_path: Path) -> None:
    saved(tmp_path / "table")
    dataset = open_dataset(f"hf:{description(tmp_path)}")
    check_dataset(dataset)
    assert dataset.name == "hf:mine"
    assert dataset.classes == tuple(CLASSES)
    assert (dataset.names("train"), dataset.names("val")) == (
        ["000000", "000001", "000002"],
        ["000000", "000001"],
    )
    for i in range(3):
        stored = miniatures.drawing(i, [1, 2, 3, 0])
        sample = dataset.read("train", i)
        assert np.array_equal(sample.label, np.where(stored == 0, IGNORE, stored.astype(int) - 1))
        with Image.open(tmp_path / f"files/train/{i}.jpg") as picture:
            assert np.array_equal(sample.image.numpy().transpose(1, 2, 0), np.asarray(picture)), (
                "the stored bytes"
            )
    assert len(pickle.loads(pickle.dumps(dataset)).names("val")) == 2


def test_other_columns_and_splits(tmp_path: Path) -> None:
    saved(tmp_path / "table", columns=("photo", "gt"))
    columns, splits = {"image": "photo", "label": "gt"}, {"train": "validation", "test": "train"}
    dataset = open_dataset(f"hf:{description(tmp_path, columns=columns, splits=splits)}")
    assert dataset.eval_splits == ("test",)
    assert len(dataset.names("train")) == 2
    check_dataset(dataset)


def test_a_saved_table_without_description(tmp_path: Path) -> None:
    """`save_to_disk`, usual names, and a list of classes beside it."""
    parts = {"train": table(tmp_path / "a", 3), "test": table(tmp_path / "b", 2)}
    hub.DatasetDict(parts).save_to_disk(str(tmp_path / "kept"))
    with pytest.raises(UpbenchError, match="whose classes it does not name"):
        open_dataset(f"hf:{tmp_path / 'kept'}")
    (tmp_path / "kept/classes.txt").write_text("none\nsky\nroad\ncar\n")
    dataset = open_dataset(f"hf:{tmp_path / 'kept'}")
    assert dataset.name == "hf:kept"
    assert np.array_equal(dataset.read("val", 0).label, miniatures.drawing(0, [1, 2, 3, 0]))
    check_dataset(dataset)


def test_depth_in_pictures_and_arrays(tmp_path: Path) -> None:
    """Millimetres in pictures of 16 bits, or metres in arrays of floats: no classes are needed."""
    depth = (1 + np.arange(48 * 64).reshape(48, 64) % 700).astype(np.uint16)
    depth[0] = 0
    for i in range(2):
        miniatures.save(tmp_path / f"{i}.png", depth + i)
        miniatures.save(tmp_path / f"{i}.jpg", miniatures.photo(depth.astype(np.uint8), i))
    pictures = [str(tmp_path / f"{i}.jpg") for i in range(2)]
    kinds = {
        "pictures": ([str(tmp_path / f"{i}.png") for i in range(2)], hub.Image()),
        "arrays": (
            [(depth + i).astype(np.float32) / 1000 for i in range(2)],
            hub.Array2D((48, 64), "float32"),
        ),
    }
    for kind, (column, feature) in kinds.items():
        features = hub.Features({"image": hub.Image(), "depth_map": feature})
        part = hub.Dataset.from_dict({"image": pictures, "depth_map": column}, features)
        hub.DatasetDict({"train": part, "val": part.select([1])}).save_to_disk(str(tmp_path / kind))
        said = {"path": kind, "columns": {"image": "image", "depth": "depth_map"}}
        said["depth_unit"] = 0.001 if kind == "pictures" else 1
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(said))
        dataset = open_dataset(f"hf:{tmp_path / kind}.yaml")
        assert dataset.targets == {"depth"}
        assert_close(dataset.read("train", 1).depth, torch.from_numpy((depth + 1) / np.float64(1000)))
        dataset.fingerprint("train")


def test_content_counts(tmp_path: Path) -> None:
    """The same table in another place has the same fingerprint; a changed pixel, another."""
    for place in "ab":
        saved(tmp_path / place / "table")
    one, two = (open_dataset(f"hf:{description(tmp_path / place)}") for place in "ab")
    assert one.fingerprint("train") == two.fingerprint("train") != one.fingerprint("val")
    other = open_dataset(f"hf:{description(tmp_path / 'b', first=0, classes=['none', *CLASSES])}")
    assert other.fingerprint("train") != two.fingerprint("train")


def breaking(root: Path, what: str) -> Path:
    if what == "path":
        return description(root, path="nowhere/at-all")
    if what == "yaml":
        (root / "mine.yaml").write_text("path: [")
        return root / "mine.yaml"
    if what == "empty":
        (root / "mine.yaml").write_text("classes: [a]\n")
        return root / "mine.yaml"
    saved(root / "table", **({"columns": ("photo", "gt")} if what == "columns" else {}))
    changes: dict[str, dict[str, Any]] = {
        "key": {"collumns": {"image": "image"}},
        "mapping": {"columns": ["image"]},
        "column": {"columns": {"image": "image", "label": "anotation"}},
        "field": {"columns": {"image": "image", "labels": "annotation"}},
        "split": {"splits": {"train": "train", "val": "valid"}},
        "one split": {"splits": {"train": "train"}},
        "range": {"first": 0},
        "classes": {"classes": None},
    }
    return description(root, **changes.get(what, {}))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("path", "hf: cannot open 'nowhere/at-all'"),
        ("yaml", "mine.yaml is no YAML"),
        ("empty", "mine.yaml must say 'path'"),
        ("key", "unknown key of .*mine.yaml 'collumns'; did you mean 'columns'"),
        ("mapping", "'columns' must be a mapping"),
        ("column", "has no column 'anotation'; did you mean 'annotation'"),
        ("field", "unknown column of .* 'labels'; did you mean 'label'"),
        ("columns", "has columns photo, gt: an image, and a label map or depth, were not found"),
        ("split", "has splits train, validation, and none is 'valid'"),
        ("one split", "'splits' must name train, and one to evaluate on"),
        ("range", "value 3, but there are 3 classes .values 0 to 2; 255 is ignored"),
        ("classes", "has label maps in column 'annotation', whose classes it does not name"),
    ],
)
def test_broken_ones_are_refused_in_one_line(what: str, words: str, tmp_path: Path) -> None:
    file = breaking(tmp_path, what)
    with pytest.raises(UpbenchError, match=words) as refused:
        open_dataset(f"hf:{file}").fingerprint("train")
    assert "\n" not in str(refused.value)


def damaged(change: Callable[[Path], None], root: Path) -> None:
    part = table(root / "files", 2)
    change(root / "files")
    hub.DatasetDict({"train": part, "val": part}).save_to_disk(str(root / "table"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f: Image.new("RGB", (64, 48)).save(f / "1.png"),
            "one channel of 1 to 16 bits, its pixels are RGB",
        ),
        (lambda f: Image.new("L", (5, 5), 1).save(f / "1.png"), "is 5x5, its image 64x48"),
        (
            lambda f: (f / "1.jpg").write_bytes(b"JFIF") and None,
            "cannot read image hf:mine/train/000001, column 'image'",
        ),
    ],
)
def test_damaged_pictures_are_named(change: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    damaged(change, tmp_path)
    with pytest.raises(UpbenchError, match=words):
        open_dataset(f"hf:{description(tmp_path)}").fingerprint("train")


def test_an_image_folder(tmp_path: Path) -> None:
    """Pictures with a `metadata.jsonl`, the hub's format for files as they are."""
    for split in ("train", "validation"):
        lines = []
        for i in range(2):
            label = miniatures.drawing(i, [1, 2, 3, 0])
            miniatures.save(tmp_path / "table" / split / f"{i}.jpg", miniatures.photo(label, i))
            miniatures.save(tmp_path / "table" / split / f"{i}_gt.png", label)
            lines.append(json.dumps({"file_name": f"{i}.jpg", "annotation_file_name": f"{i}_gt.png"}))
        (tmp_path / "table" / split / "metadata.jsonl").write_text("\n".join(lines))
    check_dataset(open_dataset(f"hf:{description(tmp_path)}"))
