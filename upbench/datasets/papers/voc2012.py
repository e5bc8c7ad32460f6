"""PASCAL VOC 2012: photographs of everyday scenes, 20 classes and background.

Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV 2015. The trained
split of `voc2012_aug` has the annotations of Hariharan et al., "Semantic Contours from Inverse Detectors",
ICCV 2011 (SBD), besides: as files of SBD itself (`cls/*.mat`), or as the PNGs that most projects hand on
(`SegmentationClassAug`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.dataset import Archive
from upbench.datasets._layout import split_list
from upbench.datasets._matlab import load_mat
from upbench.datasets._paired import ImageFiles, PairedDataset, stems
from upbench.datasets.papers._names import VOC21
from upbench.errors import UpbenchError

VOC = Archive(
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "md5:6cd6e144f989b92b3379bac3b3de84fd",
    size=1_999_639_040,
)
SBD = Archive(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
)


class VOC2012(PairedDataset):
    """PASCAL VOC 2012, trained on `train` (1464 images). 255, borders and difficult objects, is ignored."""

    name = "voc2012"
    title = "PASCAL VOC 2012"
    classes = VOC21
    values = {value: value for value in range(21)}
    counts = {"train": 1464, "val": 1449}
    places = ("VOCdevkit/VOC2012", "VOC2012", "")
    needed = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass")
    layout = "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}"
    license = "images: Flickr's terms of use; research"
    source = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/"
    citation = "Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 2015"
    archives: ClassVar[Sequence[Archive]] = (VOC,)

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`: the official list."""
        return [self._pair(name) for name in self._listed(split)]

    def _listed(self, split: str) -> list[str]:
        return split_list(self.name, self.base / "ImageSets/Segmentation" / f"{self.folders[split]}.txt")

    def _pair(self, name: str, label: Path | None = None) -> ImageFiles:
        own = self.base / "SegmentationClass" / f"{name}.png"
        return ImageFiles(name, self.base / "JPEGImages" / f"{name}.jpg", label or own)


class VOC2012Augmented(VOC2012):
    """PASCAL VOC 2012, trained on `train_aug`: 10,582 images with the annotations of SBD besides VOC's own.

    Images of VOC's `train` have VOC's label maps. The list is `trainaug.txt` (`train_aug.txt`) where there is
    one, else all of SBD and of `train` that is not in `val`, which is the same.
    """

    name = "voc2012_aug"
    title = "PASCAL VOC 2012 (aug)"
    folder = "voc2012"
    train_split = "train_aug"
    folders = {"train": "train", "val": "val", "train_aug": "trainaug"}
    counts = {"train": 1464, "val": 1449, "train_aug": 10582}
    citation = f"{VOC2012.citation}; Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011"
    archives = (VOC, SBD)

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        super().__init__(root)
        assert root is not None
        places = [place / folder for place in (root, self.base) for folder in _SBD]
        self._sbd = next((place for place in places if (place / "cls").is_dir()), None)
        if self._sbd is None and not (self.base / "SegmentationClassAug").is_dir():
            raise UpbenchError(
                f"dataset '{self.name}': {self.base} has no SegmentationClassAug, and {root} no SBD "
                "(benchmark_RELEASE/dataset/cls); without either voc2012 would do"
            )

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`."""
        if split != "train_aug":
            return super().find(split)
        own = set(self._listed("train"))
        return [self._pair(name, None if name in own else self._augmented(name)) for name in self._all(own)]

    def read_label(self, file: Path, data: bytes | None = None) -> Tensor:
        """See `PairedDataset.read_label`: also files of SBD."""
        if file.suffix != ".mat":
            return super().read_label(file, data)
        content = load_mat(file, "GTcls", data=data)
        try:
            values = content["GTcls"]["Segmentation"][0, 0]
        except (IndexError, KeyError, ValueError) as error:
            raise UpbenchError(f"cannot read {file}: it is no file of SBD with GTcls.Segmentation") from error
        return torch.from_numpy(np.array(values, dtype=np.uint8))

    def _all(self, own: set[str]) -> list[str]:
        lists = self.base / "ImageSets/Segmentation"
        for file in (lists / "trainaug.txt", lists / "train_aug.txt"):
            if file.is_file():
                return split_list(self.name, file)
        if self._sbd is None:
            drawn = stems(self.base / "SegmentationClassAug", ".png")
        else:
            drawn = stems(self._sbd / "cls", ".mat")
        return sorted((own | drawn) - set(self._listed("val")))

    def _augmented(self, name: str) -> Path:
        drawn = self.base / "SegmentationClassAug" / f"{name}.png"
        return drawn if self._sbd is None or drawn.is_file() else self._sbd / "cls" / f"{name}.mat"


_SBD = (
    "benchmark_RELEASE/dataset",
    "SBD",
    "sbd",
    "SBD/dataset",
    "VOCaug/dataset",
    "../VOCaug/dataset",
    "dataset",
)
