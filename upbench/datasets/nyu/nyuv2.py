"""NYU Depth v2, labelled: 1449 rooms from a Kinect, 640x480, with depth and 40 classes.

Silberman, Hoiem, Kohli, Fergus, "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012.
The folder has the official file, `nyu_depth_v2_labeled.mat` with `splits.mat`, or the images one by one, in
`official_splits`. What else lies there decides on the targets: labels (of Gupta et al., CVPR 2013) need
`classMapping40.mat` or `labels40/`, normals `all_normals.pklz`.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.datasets._layout import locate
from upbench.datasets.nyu._copies import (
    ARCHIVES,
    COUNTS,
    LABELLED,
    Copy,
    LabelledFile,
    OfficialSplits,
    camera,
)
from upbench.errors import UpbenchError

_NAMES = """
    wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, blinds, desk,
    shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, refrigerator, television,
    paper, towel, shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub, bag,
    other structure, other furniture, other prop
"""
NYU40 = tuple(name.strip() for name in _NAMES.split(","))
"""Classes of Gupta et al., values 1 to 40."""


class NYUv2(Dataset):
    """NYU Depth v2 with the official split (795 and 654) and the raw depth of the sensor, which has holes."""

    name = "nyuv2"
    title = "NYU Depth v2"
    targets = frozenset({"label", "depth", "normal"})
    classes = NYU40
    eval_splits = ("test",)
    counts = COUNTS
    needs_root = True
    license = "research; ask for citation"
    source = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    citation = "Silberman et al., Indoor Segmentation and Support Inference from RGBD Images, ECCV 2012"
    archives = ARCHIVES
    by_hand = (
        "for the 40 classes: put classMapping40.mat (Gupta et al., CVPR 2013; it comes with their code and "
        f"with many projects) beside {LABELLED}",
    )
    depth_field: ClassVar[str] = "rawDepths"
    values: ClassVar[dict[int, int]] = {0: IGNORE, **{value: value - 1 for value in range(1, 41)}}

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        super().__init__(root)
        self._copy = self._open()
        self.targets = frozenset(self._copy.fields)
        if "label" not in self.targets:
            self.classes = ()
        self._table = torch.full((256,), IGNORE, dtype=torch.uint8)
        for value, index in self.values.items():
            self._table[value] = index

    def _open(self) -> Copy:
        if self.root is not None and (self.root / "official_splits").is_dir():
            return OfficialSplits(self.root)
        layout = f"{LABELLED} and splits.mat, or official_splits/{{train,test}}"
        return LabelledFile(
            locate(self.name, self.root, ("", "nyuv2"), (LABELLED,), layout), self.depth_field
        )

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`: indices from 0, as `nyu_depth_v2_labeled.mat` has the images."""
        if split not in COUNTS:
            raise self.unknown_split(split, list(COUNTS))
        if not (found := self._copy.names(split)):
            raise UpbenchError(f"dataset '{self.name}': split '{split}' in {self.root} has no images")
        return found

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        name = self.names(split)[index]
        found = {field: self._copy.load(split, index, field) for field in ("image", *sorted(self.targets))}
        if "label" in found:
            found["label"] = self._table[found["label"].long()]
        return Sample(name, camera=camera(), **found)

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        return self._copy.size(split, index)

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        return self._copy.fingerprint(
            f"{self.name}/{split}", split, (self.classes, sorted(self.values.items()))
        )


class NYUv2Filled(NYUv2):
    """NYU Depth v2 with in-filled depth, which the authors' colorisation made of the raw one."""

    name = "nyuv2_filled"
    title = "NYU Depth v2 (in-filled)"
    folder = "nyuv2"
    depth_field = "depths"

    def _open(self) -> Copy:
        layout = f"{LABELLED} and splits.mat: no other copy says which depth it has"
        return LabelledFile(
            locate(self.name, self.root, ("", "nyuv2"), (LABELLED,), layout), self.depth_field
        )


class NYUv2Without40(NYUv2):
    """NYU Depth v2 with classes 1 to 39: of "other prop" (40) some copies make "unlabelled"."""

    name = "nyuv2_39"
    title = "NYU Depth v2 (39)"
    folder = "nyuv2"
    classes = NYU40[:39]
    values = {0: IGNORE, 40: IGNORE, **{value: value - 1 for value in range(1, 40)}}
