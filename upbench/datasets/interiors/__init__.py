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
from PIL import Image

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Camera, Sample
from upbench.datasets._geometry import Fit
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
    licence = "CC-BY-3.0 (models), CC0 (models, light)"
    source = "rendered by tools.interiors; credits in NOTICE"

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self._folders: dict[str, SceneFolder] = {}
        if root is not None:
            self._folder(self.train_split)  # so that a wrong folder is told at once

    def names(self, split: str) -> list[str]:
        """Seeds of a split's scenes, ascending."""
        return [str(line["seed"]) for line in self._folder(split).index]

    def load(self, split: str, index: int, size: int) -> Sample:
        """Scene `index` of a split as a square of `size` pixels.

        Args:
            split: `train`, `val` or `val_heldout`.
            index: Position in `names(split)`.
            size: Side in pixels; scenes are stored at 448. The image is resized with antialiasing, the ground
                truth is sampled at the pixel centres, so that no depth or normal is an average over a
                boundary.

        Returns:
            All fields of `Sample`; label, depth and normal come from the same surface point of each pixel.

        Raises:
            UpbenchError: unknown split, or a missing or damaged file.
        """
        scene = self._folder(split)[index]
        fit = Fit(scene.depth.shape, size)  # type: ignore[arg-type]
        depth = fit.nearest(torch.from_numpy(scene.depth))
        label = fit.nearest(torch.from_numpy(scene.label))
        normal = fit.nearest(torch.from_numpy(np.ascontiguousarray(scene.normal.transpose(2, 0, 1))))
        return Sample(
            name=str(scene.info["seed"]),
            image=fit.image(Image.fromarray(scene.image)),
            valid=(depth > 0) & (label != IGNORE),
            label=label,
            depth=depth,
            normal=normal,
            camera=Camera(fit.intrinsics(scene.intrinsics)),
        )

    def fingerprint(self, split: str) -> str:
        """Hash over the split's index, which holds the seed, classes and image hash of every scene."""
        return digest("interiors", split, CLASSES, self._folder(split).index)

    def _folder(self, split: str) -> SceneFolder:
        if split not in SPLITS:
            raise self.unknown_split(split, SPLITS)
        if split not in self._folders:
            self._folders[split] = SceneFolder(split, self.root)
        return self._folders[split]
