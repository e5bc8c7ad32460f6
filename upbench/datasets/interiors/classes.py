"""Classes of `interiors`: what the renderer labels, and what the benchmark asks for.

The label images hold *raw* classes, the 24 kinds of thing that the renderer tells apart. Some of them are
rare (a bed is in one room out of seven), so that an IoU over two dozen images would be a coin toss. The
benchmark therefore merges them to 18 classes, each of which is in at least ten validation scenes. Merging
happens when a
scene is loaded: another table needs no new rendering.
"""

from __future__ import annotations

IGNORE_INDEX = 255
"""Label of a pixel that counts nowhere: no surface was hit."""

RAW_CLASSES: tuple[str, ...] = (
    "wall", "floor", "ceiling", "window", "door", "picture", "rug", "bed", "sofa", "armchair", "chair",
    "table", "cabinet", "lamp", "plant", "screen", "vase", "bottle", "tableware", "food", "box", "toy",
    "clothing", "appliance",
)  # fmt: skip
"""Names of the values in the stored label images, in their order."""

MERGED: dict[str, tuple[str, ...]] = {
    "wall": ("wall",),
    "floor": ("floor",),
    "ceiling": ("ceiling",),
    "window_door": ("window", "door"),
    "picture": ("picture",),
    "rug": ("rug",),
    "bed_sofa": ("bed", "sofa"),
    "chair": ("chair", "armchair"),
    "table": ("table",),
    "cabinet": ("cabinet",),
    "lamp": ("lamp",),
    "plant": ("plant",),
    "device": ("screen", "appliance"),
    "vessel": ("vase", "bottle"),
    "tableware": ("tableware",),
    "food": ("food",),
    "box": ("box",),
    "belongings": ("toy", "clothing"),
}
"""Merged class -> the raw classes in it; its order is the order of the labels that the loader returns."""

CLASSES: tuple[str, ...] = tuple(MERGED)
"""Names of the labels that the loader returns."""


def merge_table() -> list[int]:
    """256 entries: the merged label of every raw label; everything unlisted becomes `IGNORE_INDEX`."""
    table = [IGNORE_INDEX] * 256
    for merged, raw_names in enumerate(MERGED.values()):
        for name in raw_names:
            table[RAW_CLASSES.index(name)] = merged
    return table
