"""`interiors`: small rooms and tabletops, path traced, with exact labels, depth and normals.

The scenes come packed with the package (`data/`), so that every machine has labelled images; they were made
by `tools.interiors`, and a folder of more of them can be given as `interiors:/path`.

Three splits that share no scene: `train`; `val`, other rooms with furniture of all models; and `val_heldout`,
other rooms in which every model of the classes that are parted (all but `SHARED_CLASSES`, see
`tools.interiors.models`) is one that training never shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Camera, Sample
from upbench.system.cache import digest

from .classes import CLASSES
from .files import SPLITS
from .scenes import SceneFolder


class Interiors(Dataset):
    """Rendered interiors with semantic labels (18 classes), metric depth and camera-space normals.

    Args:
        root: Folder that the renderer or the packer wrote; None for the scenes of the package.

    Raises:
        UpbenchError: The folder has no such scenes.
    """

    name = "interiors"
    title = "Interiors"
    targets = frozenset({"label", "depth", "normal"})
    classes = CLASSES
    train_split = "train"
    eval_splits = ("val", "val_heldout")
    counts = {"train": 96, "val": 24, "val_heldout": 24}
    license = "CC-BY-3.0 (models), CC0 (models, light)"
    source = "rendered by tools.interiors; credits in NOTICE"

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self._folders: dict[str, SceneFolder] = {}
        if root is not None:
            self.counts = {}  # other scenes, as many as there are
            self._folder(self.train_split)  # so that a wrong folder is told at once

    def names(self, split: str) -> list[str]:
        """Seeds of a split's scenes, ascending."""
        return [str(line["seed"]) for line in self._folder(split).index]

    def read(self, split: str, index: int) -> Sample:
        """Scene `index` of a split at the size that it was rendered at (448 pixels in the package's own).

        Returns:
            All fields of `Sample`; label, depth and normal come from the same surface point of each pixel.

        Raises:
            UpbenchError: An unknown split, or a missing or damaged file.
        """
        scene = self._folder(split)[index]
        depth, label = torch.from_numpy(scene.depth), torch.from_numpy(scene.label)
        return Sample(
            name=str(scene.info["seed"]),
            image=torch.from_numpy(scene.image).permute(2, 0, 1),
            valid=(depth > 0) & (label != IGNORE),
            label=label,
            depth=depth,
            normal=torch.from_numpy(np.ascontiguousarray(scene.normal.transpose(2, 0, 1))),
            camera=Camera(torch.tensor([scene.intrinsics], dtype=torch.float32)),
        )

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        side = int(self._folder(split).index[index]["size"])
        return side, side

    def fingerprint(self, split: str) -> str:
        """Hash over the split's index, which holds the seed, classes and image hash of every scene.

        Raises:
            UpbenchError: A file that the index names is missing.
        """
        self._folder(split).check()
        return digest("interiors", split, CLASSES, self._folder(split).index)

    def _folder(self, split: str) -> SceneFolder:
        if split not in SPLITS:
            raise self.unknown_split(split, SPLITS)
        if split not in self._folders:
            self._folders[split] = SceneFolder(split, self.root)
        return self._folders[split]
