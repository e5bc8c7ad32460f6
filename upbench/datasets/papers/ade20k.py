"""ADE20K, SceneParsing 150: indoor and outdoor scenes, 150 classes and "other".

Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017. Value 0 in the label maps is other and
unlabelled. Papers disagree on what it is: their 151-class numbers train and count it, 150-class numbers
ignore it. `ade20k` has it as its class "other", which a protocol may ignore; `ade20k_150` ignores it
whatever the protocol says.
"""

from __future__ import annotations

from collections.abc import Iterable

from upbench.contracts.dataset import Archive
from upbench.contracts.sample import IGNORE
from upbench.datasets._paired import ImageFiles, PairedDataset, stems
from upbench.datasets.papers._names import ADE150


class ADE20K(PairedDataset):
    """ADE20K with 151 classes, the first of which is "other" (`Dataset.other_class`)."""

    name = "ade20k"
    title = "ADE20K"
    classes = ("other", *ADE150)
    other_class: int | None = 0
    values = {value: value for value in range(151)}
    folders = {"train": "training", "val": "validation"}
    counts = {"train": 20210, "val": 2000}
    places = ("ADEChallengeData2016", "")
    needed = ("images/training", "annotations/training", "images/validation", "annotations/validation")
    layout = "ADEChallengeData2016/{images,annotations}/{training,validation}"
    license = "images: research and education only; annotations: BSD 3-Clause"
    source = "http://sceneparsing.csail.mit.edu"
    citation = "Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017"
    archives = (
        Archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),
    )

    def find(self, split: str) -> Iterable[ImageFiles]:
        """See `PairedDataset.find`: whatever is in the folders, by name."""
        images = self.base / "images" / self.folders[split]
        labels = self.base / "annotations" / self.folders[split]
        for name in sorted(stems(images, ".jpg") | stems(labels, ".png")):
            yield ImageFiles(name, images / f"{name}.jpg", labels / f"{name}.png")


class ADE20KWithoutOther(ADE20K):
    """ADE20K with 150 classes: value 0 is ignored, as `reduce_zero_label` does."""

    name = "ade20k_150"
    title = "ADE20K (150)"
    folder = "ade20k"
    classes = ADE150
    other_class = None
    values = {0: IGNORE, **{value: value - 1 for value in range(1, 151)}}
