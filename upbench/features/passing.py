"""Where features come from: a store on disk, or the backbone each time that they are asked for.

An image that is flipped has other features, not flipped ones. A training with flips sees each image as many
times as there are epochs, about half of them mirrored: a store of both takes two passes of the backbone for
each image and twice the disk, whatever the number of epochs and methods; computed each time, a pass for each
step that sees it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.features.moments import Moments, RunningMoments
from upbench.features.shards import DTYPES
from upbench.features.store import RESERVE, FeatureStore, amount
from upbench.system.cache import cache_dir
from upbench.system.progress import bar

MEMORY_SHARE = 0.5
"""Of the machine's memory: what its cache of files is taken to hold of a store."""


@dataclass(frozen=True)
class Choice:
    """Where the features of a training split come from.

    Attributes:
        stored: Whether they are computed once and kept on disk.
        why: In words.
    """

    stored: bool
    why: str


def choose(
    images: int,
    shape: tuple[int, int, int],
    dtype: str,
    device: torch.device | str,
    *,
    flips: bool,
) -> Choice:
    """Where the features of a training split should come from.

    On a CPU a pass of a backbone takes a hundred times as long as reading what it gives: features are stored
    wherever the disk has room. A GPU makes them about as fast as a disk delivers them: there they are stored
    where the memory of the machine holds the files, too.

    Args:
        images: How many there are.
        shape: (C, h, w) of an image's features.
        dtype: What they are stored as.
        device: Where the backbone runs.
        flips: Whether mirrored images are seen, too.
    """
    channels, height, width = shape
    total = images * channels * height * width * DTYPES[dtype].itemsize * (2 if flips else 1)
    variants = "plain and mirrored" if flips else "plain"
    size = f"{amount(total)}, {variants}"
    free = max(0, shutil.disk_usage(cache_dir("features")).free - RESERVE)
    if total > free:
        return Choice(False, f"computed each time: {size}, do not fit the disk's {amount(free)}")
    if torch.device(device).type != "cpu" and total > MEMORY_SHARE * _memory():
        return Choice(False, f"computed each time: {size}, more than the machine's memory serves")
    return Choice(True, f"stored ({size}): one pass of the backbone for each variant")


def _memory() -> int:
    """Bytes of the machine's memory."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


class PassingFeatures(FeatureStore):
    """Features as a store would give them, computed whenever they are asked for; nothing is kept but the last
    batch, whose class tokens are asked for after it."""

    _latest: dict[int, tuple[Tensor, Tensor | None]]

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def on_disk(self) -> int:
        """All that will ever be."""
        return len(self)

    @property
    def nbytes(self) -> int:
        """Nothing is on disk."""
        return 0

    def shape(self, index: int) -> tuple[int, int, int]:
        """See `FeatureStore`."""
        channels, height, width = self._made([index])[index][0].shape
        return int(channels), int(height), int(width)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """See `FeatureStore`."""
        found = self._made(indices)
        shapes = {found[index][0].shape for index in indices}
        if len(shapes) != 1:
            raise UpbenchError(f"no batch of features of several sizes: {sorted(map(list, shapes))}")
        return torch.stack([found[index][0] for index in indices]).float()

    def token(self, index: int) -> Tensor:
        """See `FeatureStore`."""
        token = self._made([index])[index][1]
        if token is None:
            raise UpbenchError("features are computed without class tokens")
        return token.float()

    def moments(self) -> Moments:
        """See `FeatureStore`; in one pass over all images."""
        if self._moments is None:
            running = RunningMoments(self._channels, self._sums_device)
            with bar(f"moments of {self._what}", len(self)) as progress:
                for index in range(len(self)):
                    running.add(self._made([index])[index][0], 0)
                    progress.advance()
            self._moments = running.moments()
        return self._moments

    def _made(self, indices: Sequence[int]) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Features and class tokens of some images, in the store's dtype, on the device."""
        latest: dict[int, tuple[Tensor, Tensor | None]] = self.__dict__.get("_latest", {})
        missing = [index for index in dict.fromkeys(indices) if index not in latest]
        if missing:
            made = {index: latest[index] for index in indices if index in latest}
            images = self._extractor.read(missing)
            try:
                for some, features, tokens in self._extractor.batches(missing, images):
                    for place, index in enumerate(some):
                        made[index] = features[place], None if tokens is None else tokens[place]
            finally:
                images.close()
            self._latest = latest = made
        return latest
