"""Datasets of the Hugging Face hub, or in its formats: `hf:NAME`, `hf:FOLDER` or `hf:FILE.yaml`.

A YAML file says what the columns are, and the classes, which hub datasets of label maps rarely do:

    path: EduardoPacheco/FoodSeg103  # a name on the hub, or a folder (from this file's)
    config: null                     # of several in one dataset
    revision: null                   # a commit, so that the data stays the same
    columns: {image: image, label: label}     # also depth: depth_map
    splits: {train: train, val: validation}
    classes: [wall, building, sky]   # or a text file with one a line
    first: 1                         # value of the first class; lower ones are ignored
    depth_unit: 1.0                  # metres per unit of the depth's values

Without a file, columns and splits are found by their usual names; that does for images with depth, or where
the folder has a `classes.txt`. It needs the extra `hf` (`datasets`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._files import read_bytes, read_image, read_labels, read_text, read_values
from upbench.errors import UpbenchError, nearest, unknown
from upbench.system.cache import cache_dir, digest, replacing
from upbench.system.progress import track

USUAL = {
    "image": ("image", "img", "pixel_values", "rgb"),
    "label": (
        "label",
        "annotation",
        "mask",
        "segmentation",
        "segmentation_mask",
        "semantic_segmentation",
        "labels",
    ),
    "depth": ("depth", "depth_map"),
}
"""Names of columns, the likeliest first."""

SPLITS = {"train": ("train", "training"), "val": ("validation", "val", "valid", "dev", "test")}
_KEYS = ("path", "config", "revision", "columns", "splits", "classes", "first", "depth_unit")


class HuggingFace(Dataset):
    """A dataset with columns of images and label maps (or depth); its name in tables is `hf:` and its own."""

    name = "hf"
    title = "Hugging Face's"
    targets = frozenset({"label", "depth"})
    needs_root = True
    place = "name"
    source = "https://huggingface.co/datasets, or a folder"

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`.

        Args:
            root: A name on the hub, a folder, or a YAML file.

        Raises:
            UpbenchError: `datasets` is missing, there is no such dataset, or a column, a split or the classes
                cannot be found.
        """
        if root is None:
            raise UpbenchError("dataset 'hf' needs its name: write hf:NAME, hf:FOLDER or hf:FILE.yaml")
        super().__init__(root)
        said = _description(root)
        path, base = str(said["path"]), root.parent if root.suffix in (".yaml", ".yml") else Path()
        folder = base / path
        vars(self)["name"] = f"hf:{root.stem if said.keys() > {'path'} else folder.name}"
        where = str(folder) if folder.is_dir() else path
        tables = _tables(where, said)
        self._splits = _chosen_splits(where, tables, said.get("splits"))
        self.eval_splits = tuple(split for split in self._splits if split != "train")
        features = {name: tables[theirs].features for name, theirs in self._splits.items()}
        self._columns = _chosen_columns(where, features["train"], said.get("columns"))
        self.targets = frozenset(self._columns) - {"image"}
        self.classes = _classes(base, folder, said.get("classes")) if "label" in self.targets else ()
        if "label" in self.targets and not self.classes:
            raise UpbenchError(
                f"{where} has label maps in column '{self._columns['label']}', whose classes it does not "
                "name: write a YAML file with path and classes (see docs/add-a-dataset.md), and hf:FILE.yaml"
            )
        self._first, self._unit = int(said.get("first") or 0), float(said.get("depth_unit") or 1)
        self._tables = {
            split: _undecoded(tables[theirs], self._columns) for split, theirs in self._splits.items()
        }
        self._fingerprints: dict[str, str] = {}

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`: the numbers of the rows."""
        return [f"{number:06d}" for number in range(len(self._table(split)))]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        return self._sample(split, index, self._table(split)[index])

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`. Reads and checks every row once."""
        if split not in self._fingerprints:
            table = self._table(split)
            facts = (split, self.classes, sorted(self._columns.items()), self._first, self._unit)
            note = cache_dir("datasets") / digest("hf", table._fingerprint, len(table), facts)
            if not note.is_file():
                whole = hashlib.sha256(repr(facts).encode())
                for index, row in track(enumerate(table), f"checking {self.name}/{split}", total=len(table)):
                    self._sample(split, index, row)
                    for part in _contents(row):
                        whole.update(f"{len(part)} ".encode() + part)
                with replacing(note) as temporary:
                    temporary.write_text(whole.hexdigest()[:16])
            self._fingerprints[split] = note.read_text()
        return self._fingerprints[split]

    def _table(self, split: str) -> Any:
        if split not in self._splits:
            raise self.unknown_split(split, list(self._splits))
        return self._tables[split]

    def _sample(self, split: str, index: int, row: Mapping[str, Any]) -> Sample:
        name = f"{index:06d}"
        values = {field: _content(row[column]) for field, column in self._columns.items()}
        where = {
            field: Path(f"{self.name}/{split}/{name}, column '{c}'") for field, c in self._columns.items()
        }
        image = read_image(where["image"], values["image"])
        found: dict[str, Tensor] = {}
        if "label" in values:
            found["label"] = self._label(where["label"], read_labels(where["label"], values["label"]))
        if "depth" in values:
            found["depth"] = _depth(where["depth"], values["depth"]) * self._unit
        for field, value in found.items():
            if value.shape != image.shape[1:]:
                (h, w), (lh, lw) = image.shape[1:], value.shape
                raise UpbenchError(f"{where[field]} is {lw}x{lh}, its image {w}x{h}")
        return Sample(name, image, label=found.get("label"), depth=found.get("depth"))

    def _label(self, where: Path, stored: Tensor) -> Tensor:
        label = stored.to(torch.int32) - self._first
        ignored = (label < 0) | (stored == IGNORE)
        out = stored[~ignored & (label >= len(self.classes))]
        if len(out):
            raise UpbenchError(
                f"{where} has value {int(out[0])}, but there are {len(self.classes)} classes (values "
                f"{self._first} to {self._first + len(self.classes) - 1}; {IGNORE} is ignored)"
            )
        return label.masked_fill(ignored, IGNORE).to(torch.uint8)


def _description(root: Path) -> dict[str, Any]:
    """What the YAML file says; the path alone where there is none."""
    if root.suffix not in (".yaml", ".yml"):
        return {"path": str(root)}
    import yaml

    try:
        said = yaml.safe_load(read_text(root))
    except yaml.YAMLError as error:
        raise UpbenchError(f"{root} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict) or not said.get("path"):
        raise UpbenchError(f"{root} must say 'path', a name on the hub or a folder")
    for key in said:
        if key not in _KEYS:
            raise unknown(f"key of {root}", str(key), _KEYS)
    for key in ("columns", "splits"):
        if said.get(key) is not None and not isinstance(said[key], dict):
            raise UpbenchError(f"{root}: '{key}' must be a mapping, such as {{train: train}}")
    return said


def _tables(path: str, said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Split -> table."""
    try:
        import datasets
    except ImportError as error:
        raise UpbenchError("hf:NAME needs the package datasets: pip install 'upbench[hf]'") from error
    if not hasattr(datasets, "load_dataset"):  # a folder called so, somewhere on the path
        raise UpbenchError("hf:NAME needs the package datasets: pip install 'upbench[hf]'")
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(path))
        return dict(datasets.load_dataset(path, said.get("config"), revision=said.get("revision")))
    except Exception as error:  # network, formats, names: it raises anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise UpbenchError(f"hf: cannot open '{path}': {text[:300]}") from error


def _chosen_splits(path: str, tables: Mapping[str, Any], said: Mapping[str, str] | None) -> dict[str, str]:
    """Our split -> theirs."""
    usual = {ours: next((t for t in names if t in tables), "") for ours, names in SPLITS.items()}
    chosen = {str(ours): str(theirs) for ours, theirs in (said or usual).items()}
    for ours, theirs in chosen.items():
        if theirs not in tables:
            raise UpbenchError(
                f"{path} has splits {', '.join(tables)}, and none is '{theirs or ours}'; say which in "
                "'splits' of a YAML file"
            )
    if "train" not in chosen or len(chosen) < 2:
        raise UpbenchError(f"{path}: 'splits' must name train, and one to evaluate on, such as val")
    return chosen


def _chosen_columns(path: str, features: Mapping[str, Any], said: Mapping[str, str] | None) -> dict[str, str]:
    """Field of a sample -> column."""
    if said is not None:
        chosen = {str(field): str(column) for field, column in said.items()}
        for field, column in chosen.items():
            if field not in USUAL:
                raise unknown(f"column of {path}", field, USUAL)
            if column not in features:
                guess = nearest(column, features)
                hint = f"did you mean '{guess}'?" if guess else f"there are {', '.join(features)}"
                raise UpbenchError(f"{path} has no column '{column}'; {hint}")
    else:
        pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        likeliest = {f: next((n for n in names if n in pictures), "") for f, names in USUAL.items()}
        chosen = {field: column for field, column in likeliest.items() if column}
    if "image" not in chosen or len(chosen) < 2:
        raise UpbenchError(
            f"{path} has columns {', '.join(features)}: an image, and a label map or depth, were not found "
            "among them; say which they are in 'columns' of a YAML file"
        )
    return chosen


def _classes(base: Path, folder: Path, said: Any) -> tuple[str, ...]:
    """Names of classes: a list, a file of lines, or the `classes.txt` of a folder."""
    if isinstance(said, list):
        return tuple(str(name) for name in said)
    file = base / str(said) if said else folder / "classes.txt"
    if not said and not file.is_file():
        return ()
    lines = read_text(file).splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _undecoded(table: Any, columns: Mapping[str, str]) -> Any:
    """The columns that count, pictures as the bytes that were stored."""
    import datasets

    table = table.select_columns(list(columns.values()))
    for column in columns.values():
        if type(table.features[column]).__name__ == "Image":
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _content(value: Any) -> bytes:
    """The bytes of a picture, which the table has itself or in a file; an array as a NumPy file."""
    if isinstance(value, Mapping) and "path" in value:
        return bytes(value["bytes"]) if value.get("bytes") else read_bytes(Path(value["path"]))
    stream = io.BytesIO()
    np.save(stream, np.asarray(value))
    return stream.getvalue()


def _contents(row: Mapping[str, Any]) -> Iterator[bytes]:
    for column in sorted(row):
        yield _content(row[column])


def _depth(where: Path, data: bytes) -> Tensor:
    """`[H, W]` float32 in the column's unit, of pictures of one channel or arrays; 0 where unknown."""
    if data.startswith(b"\x93NUMPY"):
        values = torch.from_numpy(np.load(io.BytesIO(data)).astype(np.float32))
    else:
        values = read_values(where, data).float()
    if values.ndim != 2:
        raise UpbenchError(f"{where} must have one channel, it is {'x'.join(map(str, values.shape))}")
    return values.nan_to_num(0, 0, 0).clamp(min=0)
