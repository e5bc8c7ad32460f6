"""Any dataset that a config of MMSegmentation describes: `mmseg:CONFIG.py`.

`train_dataloader.dataset` is the split `train`, `val_dataloader.dataset` is `val`; classes, lists,
`reduce_zero_label` and `ignore_index` are the config's. Images and label maps are loaded as there: only the
first steps of its pipelines, `Load...`, are of interest, as what follows (crops, flips) is a protocol's
business. Paths count from the working directory, as in MMSegmentation, or from the nearest folder above the
config where they exist.

    upbench run --datasets mmseg:configs/_base_/datasets/loveda.py --tasks seg --methods bilinear,raysup

It needs the extra `mmseg` (`onedl-mmsegmentation`).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._files import image_size, read_image, read_labels
from upbench.datasets._paired import ImageFiles, PairedDataset
from upbench.errors import UpbenchError

_LOADERS = ({"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"})
"""How a pipeline that does not say so loads files."""
_PLAIN = "LoadImageFromFile"


class MMSegmentationConfig(PairedDataset):
    """What `train_dataloader` and `val_dataloader` of a config of MMSegmentation read.

    Its name in tables is `mmseg:` and the config's.

    Args:
        root: The config, a file.

    Raises:
        UpbenchError: MMSegmentation is missing, or the config is no such, or its data is not there.
    """

    name = "mmseg"
    title = "MMSegmentation's"
    place = "file"
    source = "the config says"
    layout = "what the config says"

    def __init__(self, root: Path | None = None) -> None:
        """See the class."""
        self._parts: dict[str, list[_Part]] = {}
        self._loaded: dict[Path, tuple[_Part, int]] = {}
        super().__init__(root)
        assert root is not None
        vars(self)["name"] = f"mmseg:{root.stem}"  # rows are told apart by it

    def locate(self) -> Path:
        """See `PairedDataset.locate`: opens what the config describes."""
        if self.root is None:
            raise UpbenchError("dataset 'mmseg' needs a config: write mmseg:CONFIG.py")
        with _mmseg(self.root) as (config, build):
            for split in ("train", "val", "test"):
                dataset = (config.get(f"{split}_dataloader") or {}).get("dataset")
                if dataset is not None and not (split == "test" and "val" in self._parts):
                    self._parts[split] = [_Part(leaf, self.root, build) for leaf in _leaves(dataset)]
        if "train" not in self._parts or len(self._parts) < 2:
            raise UpbenchError(
                f"{self.root} describes {', '.join(self._parts) or 'no'} data; a train_dataloader and a "
                "val_dataloader are expected"
            )
        self.eval_splits = tuple(split for split in self._parts if split != "train")
        self.folders = {split: split for split in self._parts}
        described = {part.classes for parts in self._parts.values() for part in parts}
        if len(described) > 1 or not (classes := described.pop()):
            raise UpbenchError(f"{self.root}: its datasets name no classes, or different ones")
        self.classes = classes
        self.values = {index: index for index in range(len(classes))}
        return self.root.parent

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`."""
        files = [(part, i, *part.files(i)) for part in self._parts[split] for i in range(len(part.dataset))]
        names = _names([image for _, _, image, _ in files])
        for name, (part, index, image, label) in zip(names, files, strict=True):
            self._loaded[label] = part, index
            yield ImageFiles(name, image, label)

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        files = self.pairs(split)[index]
        image = self._image(files)
        label = self.read_label(files.label)
        return Sample(files.name, image, label=self.labels(files.label, label, image))

    def read_label(self, file: Path, data: bytes | None = None) -> Tensor:
        """See `PairedDataset.read_label`: what the pipeline makes of it, `ignore_index` being 255."""
        part, index = self._loaded[file]
        return part.label(index)

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        files = self.pairs(split)[index]
        part, _ = self._loaded[files.label]
        return image_size(files.image) if part.plain else super(PairedDataset, self).size(split, index)

    def facts(self, split: str) -> object:
        """See `PairedDataset.facts`."""
        return self.classes, [part.facts for part in self._parts[split]]

    def check(self, files: Sequence[Path], contents: Sequence[bytes]) -> None:
        """See `PairedDataset.check`."""
        image, label = files
        part, index = self._loaded[label]
        if part.plain_labels:
            largest = int(read_labels(label, contents[1]).max())
            if largest > IGNORE:  # the loader would cut it down to 8 bits
                raise UpbenchError(f"label map {label} has value {largest}, MMSegmentation reads 8 bits")
        pixels = read_image(image, contents[0]) if part.plain else part.image(index)
        self.labels(label, part.label(index), pixels)

    def _image(self, files: ImageFiles) -> Tensor:
        part, index = self._loaded[files.label]
        return read_image(files.image) if part.plain else part.image(index)


class _Part:
    """One dataset of a config, and how its pipeline loads files.

    Args:
        config: The dataset's, no wrapper.
        file: The config that it is from.
        build: Makes datasets and transforms.
    """

    def __init__(self, config: Mapping[str, Any], file: Path, build: Any) -> None:
        steps = [dict(step) for step in config.get("pipeline") or ()]
        loaders = [step for step in steps if str(step["type"]).rpartition(".")[2].startswith("Load")]
        loaders = loaders or [dict(step) for step in _LOADERS]
        self.plain = any(step["type"] == _PLAIN for step in loaders)
        self.plain_labels = any(step["type"] == "LoadAnnotations" for step in loaders)
        bare = {**config, "pipeline": [], "serialize_data": False, "lazy_init": False}
        if root := config.get("data_root"):
            bare["data_root"] = str(_placed(root, file))
        self._file = file
        self.dataset, self._steps = build(bare, loaders)
        self.classes = tuple(str(name) for name in self.dataset.metainfo.get("classes") or ())
        self._ignored = int(getattr(self.dataset, "ignore_index", IGNORE))
        kept = ("label_map", "reduce_zero_label")
        self.facts = [loaders, self._ignored, *(getattr(self.dataset, key, None) for key in kept)]

    def files(self, index: int) -> tuple[Path, Path]:
        """Image and label map."""
        info = self.dataset.get_data_info(index)
        if not isinstance(info.get("img_path"), str) or not isinstance(info.get("seg_map_path"), str):
            raise UpbenchError(f"{self._file}: image {index} has no label map, or is not one file")
        return Path(info["img_path"]), Path(info["seg_map_path"])

    def image(self, index: int) -> Tensor:
        """`[3, H, W]` bytes, by the pipeline's loader."""
        pixels = self._load(index)["img"]
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            shape = "x".join(map(str, pixels.shape))
            raise UpbenchError(f"{self.files(index)[0]} is {pixels.dtype} {shape}; RGB in bytes is needed")
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1])).permute(2, 0, 1)  # from BGR

    def label(self, index: int) -> Tensor:
        """`[H, W]` uint8 classes, 255 ignored."""
        label = np.asarray(self._load(index, labels_only=self.plain)["gt_seg_map"])
        if label.ndim != 2:
            shape = "x".join(map(str, label.shape))
            raise UpbenchError(f"label map {self.files(index)[1]} must have one channel, it is {shape}")
        return torch.from_numpy(np.where(label == self._ignored, IGNORE, label).astype(np.uint8))

    def _load(self, index: int, labels_only: bool = False) -> dict[str, Any]:
        results: dict[str, Any] = self.dataset.get_data_info(index)
        image, label = results.get("img_path"), results.get("seg_map_path")
        for kind, step in self._steps:
            if labels_only and kind == _PLAIN:
                continue
            try:
                results = step(results)
            except Exception as error:  # loaders of damaged files raise anything
                text = " ".join(str(error).split()) or type(error).__name__
                raise UpbenchError(f"cannot read {label or image}: {text}") from error
        return results


def _leaves(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The datasets in a config, out of their wrappers (several in one, repeated ones)."""
    if "datasets" in config:
        for part in config["datasets"]:
            yield from _leaves(part)
    elif "dataset" in config:
        yield from _leaves(config["dataset"])
    else:
        yield config


def _placed(path: str, file: Path) -> Path:
    """A path of a config: from the working directory, or the nearest folder above it where it exists."""
    for folder in (Path(), *file.absolute().parents):
        if (folder / path).exists():
            return folder / path
    return Path(path)


def _names(files: Sequence[Path]) -> list[str]:
    """Names that tell files apart: stems where these do, else with their folders."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    longer = [str(file.with_suffix("")) for file in files]
    start = len(str(Path(*_common([file.parent.parts for file in files]))))
    return [name[start:].lstrip("/") for name in longer]


def _common(paths: Sequence[Sequence[str]]) -> list[str]:
    same = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        same.append(parts[0])
    return same


@contextmanager
def _mmseg(file: Path) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """A config, and what builds its parts; quiet, and with errors as one line."""
    with warnings.catch_warnings(), _quiet("mmengine"):
        warnings.simplefilter("ignore")
        try:
            with redirect_stdout(io.StringIO()):  # it prints what else could be installed
                import mmseg.datasets  # noqa: F401 (registers its datasets)
            from mmengine.config import Config
            from mmengine.registry import DefaultScope
            from mmseg.registry import DATASETS, TRANSFORMS
        except ImportError as error:
            raise UpbenchError(
                "mmseg:CONFIG.py needs MMSegmentation: pip install 'upbench[mmseg]'"
            ) from error

        def build(dataset: Mapping[str, Any], loaders: Sequence[Mapping[str, Any]]) -> tuple[Any, list[Any]]:
            with DefaultScope.overwrite_default_scope("mmseg"):
                steps = [(str(step["type"]), TRANSFORMS.build(dict(step))) for step in loaders]
                return DATASETS.build(dict(dataset)), steps

        try:
            yield Config.fromfile(str(file)), build
        except UpbenchError:
            raise
        except Exception as error:  # configs are programs
            text = " ".join(str(error).split()) or type(error).__name__
            raise UpbenchError(f"MMSegmentation's config {file}: {text}") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors only, of a logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
