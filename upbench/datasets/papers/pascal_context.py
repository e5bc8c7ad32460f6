"""PASCAL Context: the images of PASCAL VOC 2010 with every pixel labelled, 59 classes and background.

Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR
2014. Label maps are the PNGs that MMSegmentation's converter makes (`SegmentationClassContext`), or the
authors' own of 59 classes (`59_context_labels`). Value 0 is background: a class of its own in 60-class
numbers, ignored in 59-class ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from upbench.contracts.dataset import Archive
from upbench.contracts.sample import IGNORE
from upbench.datasets._layout import split_list
from upbench.datasets._paired import ImageFiles, PairedDataset
from upbench.datasets.papers._names import CONTEXT59
from upbench.errors import UpbenchError

LABELS = ("SegmentationClassContext", "59_context_labels", "../../59_context_labels", "../59_context_labels")


class PascalContext(PairedDataset):
    """PASCAL Context with 60 classes, the first of which is "background" (`Dataset.other_class`)."""

    name = "pascal_context"
    title = "PASCAL Context"
    classes = ("background", *CONTEXT59)
    other_class: int | None = 0
    values = {value: value for value in range(60)}
    counts = {"train": 4998, "val": 5105}
    places = ("VOCdevkit/VOC2010", "VOC2010", "")
    needed = ("JPEGImages", "ImageSets/SegmentationContext")
    layout = "VOCdevkit/VOC2010/{JPEGImages,SegmentationClassContext,ImageSets/SegmentationContext}"
    license = "images: Flickr's terms of use; research"
    source = "https://cs.stanford.edu/~roozbeh/pascal-context/"
    citation = (
        "Mottaghi et al., The Role of Context for Object Detection and Semantic Segmentation, CVPR 2014"
    )
    archives = (
        Archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            "md5:da459979d0c395079b5c75ee67908abb",
        ),
        Archive("https://cs.stanford.edu/~roozbeh/pascal-context/59_context_labels.tar.gz"),
    )
    by_hand = (
        "the lists ImageSets/SegmentationContext/{train,val}.txt (4,998 and 5,105 names) are in no archive: "
        "MMSegmentation's tools/dataset_converters/pascal_context.py makes them, and the label maps",
    )

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        super().__init__(root)
        places = [self.base / folder for folder in LABELS]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise UpbenchError(
                f"dataset '{self.name}': {self.base} has JPEGImages but no SegmentationClassContext, and no "
                "59_context_labels beside it"
            )
        self._labels = found

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`: the list."""
        lists = self.base / "ImageSets/SegmentationContext"
        for name in split_list(self.name, lists / f"{self.folders[split]}.txt"):
            yield ImageFiles(name, self.base / "JPEGImages" / f"{name}.jpg", self._labels / f"{name}.png")


class PascalContext59(PascalContext):
    """PASCAL Context with 59 classes: background is ignored."""

    name = "pascal_context59"
    title = "PASCAL Context (59)"
    folder = "pascal_context"
    classes = CONTEXT59
    other_class = None
    values = {0: IGNORE, **{value: value - 1 for value in range(1, 60)}}
