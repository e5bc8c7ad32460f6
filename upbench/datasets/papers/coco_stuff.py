"""COCO-Stuff: photographs of COCO 2017 with things and stuff, in 27 coarse or 171 fine classes.

Caesar, Uijlings, Ferrari, "COCO-Stuff: Thing and Stuff Classes in Context", CVPR 2018. The papers on
upsamplers use the 27 coarse classes on the images that `Coco164kFull_Stuff_Coarse.txt` lists (97,702 and
4,172; the lists of IIC, Ji et al. 2019): neither the shorter list `..._Coarse_7.txt` of PiCIE and STEGO,
nor all images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from upbench.contracts.dataset import Archive
from upbench.contracts.sample import IGNORE
from upbench.datasets._layout import split_list
from upbench.datasets._paired import ImageFiles, PairedDataset, entries, stems
from upbench.datasets.papers._names import (
    COCO_STUFF27,
    COCO_STUFF182,
    COCO_STUFF_COARSE,
    COCO_STUFF_UNUSED,
)
from upbench.errors import UpbenchError

LIST = "Coco164kFull_Stuff_Coarse.txt"
_USED = [value for value in range(182) if value not in COCO_STUFF_UNUSED]
_IMAGES = (
    Archive(
        "http://images.cocodataset.org/zips/train2017.zip",
        "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
        folder="images",
        size=19_336_861_798,
    ),
    Archive(
        "http://images.cocodataset.org/zips/val2017.zip",
        "md5:442b8da7639aecaf257c1dceb8ba8c80",
        folder="images",
        size=815_585_330,
    ),
    Archive(
        "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
        folder="annotations",
    ),
)


class COCOStuff171(PairedDataset):
    """COCO-Stuff with 171 classes: all images of COCO 2017, `train2017` and `val2017`."""

    name = "coco_stuff171"
    title = "COCO-Stuff (171)"
    folder = "coco_stuff27"
    classes = tuple(COCO_STUFF182[value] for value in _USED)
    values = {value: _USED.index(value) if value in _USED else IGNORE for value in range(182)}
    folders = {"train": "train2017", "val": "val2017"}
    counts = {"train": 118287, "val": 5000}
    places = ("dataset", "", "COCOStuff/dataset", "COCOStuff")
    needed = ("images/train2017", "annotations/train2017", "images/val2017", "annotations/val2017")
    layout = "[dataset/]{images,annotations}/{train2017,val2017}"
    license = "images: Flickr's terms of use; annotations: CC BY 4.0"
    source = "https://github.com/nightrome/cocostuff"
    citation = "Caesar, Uijlings, Ferrari, COCO-Stuff: Thing and Stuff Classes in Context, CVPR 2018"
    archives: ClassVar[Sequence[Archive]] = _IMAGES

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`."""
        images, labels = (self.base / kind / self.folders[split] for kind in ("images", "annotations"))
        for name in self._listed(split, images, labels):
            yield ImageFiles(name, images / f"{name}.jpg", labels / f"{name}.png")

    def _listed(self, split: str, images: Path, labels: Path) -> Iterable[str]:
        return sorted(stems(images, ".jpg") | stems(labels, ".png"))


class COCOStuff27(COCOStuff171):
    """COCO-Stuff with 27 coarse classes, on the images that the papers on upsamplers use."""

    name = "coco_stuff27"
    title = "COCO-Stuff (27)"
    folder = ""
    classes = COCO_STUFF27
    values = dict(enumerate(COCO_STUFF_COARSE))
    counts = {"train": 97702, "val": 4172}
    layout = f"{COCOStuff171.layout} and curated/{{train2017,val2017}}/{LIST}"
    citation = (
        f"{COCOStuff171.citation}; lists: Ji, Henriques, Vedaldi, Invariant Information Clustering, ICCV 2019"
    )
    archives = (*_IMAGES, Archive("https://www.robots.ox.ac.uk/~xuji/datasets/COCOStuff164kCurated.tar.gz"))

    def _listed(self, split: str, images: Path, labels: Path) -> Iterable[str]:
        folder = self.folders[split]
        roots = [base / lists for base in (self.base, self.base.parent) for lists in _LISTS]
        for root in roots:
            if (file := root / folder / LIST).is_file():
                return split_list(self.name, file)
        others = sorted({e for root in roots for e in entries(root / folder) if e.startswith("Coco164k")})
        seen = (
            f"found {', '.join(others)}, which are other images" if others else f"in {self.base} or above it"
        )
        raise UpbenchError(
            f"dataset '{self.name}': no list curated/{folder}/{LIST}: {seen}; see docs/datasets.md"
        )


_LISTS = ("curated", "curated/curated", "COCO/COCOStuff164k/curated", "COCO/CocoStuff164k/curated")
"""Where the lists end up when their archive is unpacked."""
