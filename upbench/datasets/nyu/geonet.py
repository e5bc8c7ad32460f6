"""NYU Depth v2 as Probe3D uses it: trained on GeoNet's images, tested on the official test split.

Qi et al., "GeoNet: Geometric Neural Network for Joint Depth and Surface Normal Estimation", CVPR 2018; El
Banani et al., "Probing the 3D Awareness of Visual Foundation Models", CVPR 2024. 30,914 frames of the raw
videos with depth and normals; two of the 30,916 are left out, as there. The test is `nyuv2`'s: raw depth,
and normals by Ladicky et al.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.datasets._content import content_fingerprint
from upbench.datasets._layout import locate
from upbench.datasets._matlab import load_mat
from upbench.datasets._paired import stems
from upbench.datasets.nyu._copies import ARCHIVES, LABELLED, NORMALS, LabelledFile, camera
from upbench.datasets.nyu._normals import axis_signs
from upbench.errors import UpbenchError

BAD = frozenset(
    {
        "library_0006_r-1300708259.539496-3335480784",
        "bedroom_0129_r-1315328302.785180-1089784518",
    }
)
"""Frames that Probe3D leaves out."""

FOLDERS = ("nyu_geonet", "nyuv2_geonet")
_MEANS = (122.175, 116.169, 103.508)


class NYUv2GeoNet(Dataset):
    """NYU Depth v2 with GeoNet's training images: depth and normals, no labels."""

    name = "nyuv2_geonet"
    title = "NYU Depth v2 (GeoNet)"
    targets = frozenset({"depth", "normal"})
    eval_splits = ("test",)
    counts = {"train": 30914, "test": 654}
    needs_root = True
    license = "research; ask for citation"
    source = "https://github.com/xjqi/GeoNet and https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    citation = (
        "Qi et al., GeoNet, CVPR 2018; Silberman et al., ECCV 2012; El Banani et al., Probe3D, CVPR 2024"
    )
    archives = ARCHIVES
    by_hand = (
        "download data1.zip (66 GB) and data2.zip (75 GB) from the page that https://github.com/xjqi/GeoNet "
        "links to",
        "unpack both, and move all .mat files of data1/ and data2/ into one folder nyu_geonet/",
    )

    def __init__(self, root: Path | None = None) -> None:
        """See `Dataset`."""
        super().__init__(root)
        layout = f"nyu_geonet/*.mat and nyuv2/{{{LABELLED},splits.mat,{NORMALS}}}"
        for folder in FOLDERS[1:]:
            if root is not None and (root / folder).is_dir():
                break
        else:
            folder = FOLDERS[0]
        base = locate(self.name, root, ("",), (folder,), layout)
        self._folder = base / folder
        self._test = LabelledFile(locate(self.name, root, ("nyuv2", ""), (LABELLED,), layout), "rawDepths")
        if "normal" not in self._test.fields:
            raise UpbenchError(
                f"dataset '{self.name}': {root} has {LABELLED} but no {NORMALS}; expected {layout}"
            )

    @cached_property
    def _train(self) -> list[str]:
        return sorted(stems(self._folder, ".mat") - BAD)

    def names(self, split: str) -> list[str]:
        """See `Dataset.names`."""
        if split not in self.counts:
            raise self.unknown_split(split, list(self.counts))
        if not (found := self._train if split == "train" else self._test.names(split)):
            raise UpbenchError(f"dataset '{self.name}': split '{split}' in {self._folder} has no .mat files")
        return found

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset.read`."""
        name = self.names(split)[index]
        if split == "test":
            found = {field: self._test.load(split, index, field) for field in ("image", "depth", "normal")}
        else:
            image, depth, normal = read_frame(self._folder / f"{name}.mat")
            found = {"image": image, "depth": depth, "normal": normal * self._signs.view(3, 1, 1)}
        return Sample(name, camera=camera(), **found)

    def size(self, split: str, index: int) -> tuple[int, int]:
        """See `Dataset.size`."""
        return 480, 640

    def fingerprint(self, split: str) -> str:
        """See `Dataset.fingerprint`."""
        title = f"{self.name}/{split}"
        if split == "test":
            return self._test.fingerprint(title, split, ())
        files = [(self._folder / f"{name}.mat",) for name in self.names(split)]
        return content_fingerprint(title, files, (), _check)

    @cached_property
    def _signs(self) -> Tensor:
        names = self._train[:: max(1, len(self._train) // 8)]
        frames = [read_frame(self._folder / f"{name}.mat") for name in names]
        pairs = [(normal.permute(1, 2, 0), depth) for _, depth, normal in frames]
        return axis_signs(pairs, camera().intrinsics[0].tolist(), str(self._folder))


def read_frame(file: Path, data: bytes | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Image `[3, 480, 640]` bytes, depth `[480, 640]` metres, normals `[3, 480, 640]` as they are stored.

    Of the image its mean was subtracted twice; it is added again and cut down to bytes, as in Probe3D.

    Raises:
        UpbenchError: It is damaged, lacks a part, or is too small.
    """
    found = load_mat(file, "img", "depth", "norm", data=data)
    parts = {key: np.asarray(found[key])[:480, :640] for key in ("img", "depth", "norm")}
    for key, shape in (("img", (480, 640, 3)), ("depth", (480, 640)), ("norm", (480, 640, 3))):
        if parts[key].shape != shape:
            raise UpbenchError(f"{file}: '{key}' is {np.shape(found[key])}, at least {shape} is expected")
    bright = parts["img"] + 2 * np.array(_MEANS, parts["img"].dtype)  # in the type that it is stored in
    image = torch.from_numpy(bright.astype(np.uint8)).permute(2, 0, 1)
    depth = torch.from_numpy(parts["depth"].astype(np.float32)).nan_to_num(0, 0, 0).clamp(min=0)
    normal = torch.from_numpy(parts["norm"].astype(np.float32)).permute(2, 0, 1).nan_to_num(0, 0, 0)
    return image, depth, torch.nn.functional.normalize(normal, dim=0)


def _check(files: Sequence[Path], contents: Sequence[bytes]) -> None:
    read_frame(files[0], contents[0])
