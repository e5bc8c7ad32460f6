"""KITTI semantics: 200 street scenes of KITTI 2015 with the labels of Cityscapes, 1242x375, 19 classes.

Alhaija et al., "Augmented Reality Meets Computer Vision", IJCV 2018. Only `training` has labels, and the
owners split it no further: every fifth image, from the first on, is `val` here (40 of 200), the others are
`train`.
"""

from __future__ import annotations

from collections.abc import Iterable

from upbench.contracts.dataset import Archive
from upbench.datasets._paired import ImageFiles, PairedDataset, stems
from upbench.datasets.papers._names import CITYSCAPES19
from upbench.datasets.papers.cityscapes import VALUES


class KITTISemantics(PairedDataset):
    """KITTI's pixel-level semantics. The split into `train` and `val` is upbench's."""

    name = "kitti_semantics"
    title = "KITTI semantics"
    classes = CITYSCAPES19
    values = VALUES
    counts = {"train": 160, "val": 40}
    places = ("", "data_semantics", "kitti_semantics")
    needed = ("training/image_2", "training/semantic")
    layout = "training/{image_2,semantic}/*.png"
    license = "CC BY-NC-SA 3.0"
    source = "https://www.cvlibs.net/datasets/kitti/eval_semseg.php?benchmark=semantics2015"
    citation = "Alhaija et al., Augmented Reality Meets Computer Vision, IJCV 2018"
    archives = (Archive("https://s3.eu-central-1.amazonaws.com/avg-kitti/data_semantics.zip"),)

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`. An image's number says its split, in partial copies, too."""
        images, labels = self.base / "training/image_2", self.base / "training/semantic"
        for name in sorted(stems(images, ".png") | stems(labels, ".png")):
            digits = name.partition("_")[0]
            fifth = digits.isdigit() and int(digits) % 5 == 0
            if fifth == (split == "val"):
                yield ImageFiles(name, images / f"{name}.png", labels / f"{name}.png")
