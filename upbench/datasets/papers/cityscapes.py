"""Cityscapes: streets of 50 cities from a car, 2048x1024, 19 classes.

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016. Label maps are
the ones of the archive (`*_labelIds.png`), or those that cityscapesScripts makes (`*_labelTrainIds.png`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from upbench.contracts.sample import IGNORE
from upbench.datasets._paired import ImageFiles, PairedDataset, entries, stems
from upbench.datasets.papers._names import CITYSCAPES19

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Value in `*_labelIds.png` of each of the 19 classes; 0 to 33 but for these are ignored."""

VALUES = dict.fromkeys(range(34), IGNORE) | {value: i for i, value in enumerate(LABEL_IDS)}
_IMAGE, _IDS, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


class Cityscapes(PairedDataset):
    """Cityscapes, fine annotations."""

    name = "cityscapes"
    title = "Cityscapes"
    classes = CITYSCAPES19
    values = VALUES
    counts = {"train": 2975, "val": 500}
    needed = ("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val")
    layout = "{leftImg8bit,gtFine}/{train,val}/CITY/*_{leftImg8bit,gtFine_labelIds}.png"
    license = "non-commercial research (Cityscapes' terms of use)"
    source = "https://www.cityscapes-dataset.com"
    citation = "Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016"
    by_hand = (
        "register at https://www.cityscapes-dataset.com/register/ (an address of a university or a company)",
        "download leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB) from "
        "https://www.cityscapes-dataset.com/downloads/, or with `pip install cityscapesscripts` and "
        "`csDownload leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip`",
        "unpack both into one folder: it then has leftImg8bit/ and gtFine/",
    )

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`: what the cities' folders hold; train ids only without label ids."""
        images, labels = self.base / "leftImg8bit" / split, self.base / "gtFine" / split
        for city in sorted(entries(images) | entries(labels)):
            drawn, trained = stems(labels / city, _IDS), stems(labels / city, _TRAIN_IDS)
            for name in sorted(stems(images / city, _IMAGE) | drawn | trained):
                label = _TRAIN_IDS if name in trained - drawn else _IDS
                yield ImageFiles(name, images / city / (name + _IMAGE), labels / city / (name + label))

    def values_in(self, file: Path) -> Mapping[int, int]:
        """See `PairedDataset.values_in`."""
        return {i: i for i in range(19)} if file.name.endswith(_TRAIN_IDS) else self.values
