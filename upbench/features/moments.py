"""Sums over the positions of features: what means, covariances and principal components are made of."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from upbench.features.shards import as_bytes
from upbench.system.cache import replacing


@dataclass(frozen=True)
class Moments:
    """Sums over all positions of some images, of which means and covariances are made.

    Attributes:
        count: Number of positions (h times w, summed over the images).
        sum: `[C]` float64, the sum of the feature vectors.
        outer: `[C, C]` float64, the sum of their outer products.
    """

    count: int
    sum: Tensor
    outer: Tensor

    def copy(self) -> Moments:
        """The same sums in tensors of their own."""
        return Moments(self.count, self.sum.clone(), self.outer.clone())

    @property
    def mean(self) -> Tensor:
        """`[C]` float64."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """`[C, C]` float64, divided by `count` (not by one less)."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)


class RunningMoments:
    """Moments of the first images of a store, which grow image by image.

    Images are added one at a time and in order, so that the result is the same to the bit however the store
    was filled.

    Attributes:
        images: How many images there are in it.
        chain: Checksum of their checksums: what it was computed from.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.images = 0
        self.chain = 0
        self._count = 0
        self._sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._outer = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, features: Tensor, checksum: int) -> None:
        """Adds the next image.

        Args:
            features: `[C, h, w]`, contiguous, as they are stored, on any device.
            checksum: Of the stored image.
        """
        vectors = features.to(self._sum.device).double().flatten(1)
        self._sum += vectors.sum(dim=1)
        self._outer += vectors @ vectors.T
        self._count += vectors.shape[1]
        self.images += 1
        self.chain = chained(self.chain, checksum)

    def moments(self) -> Moments:
        """What has been summed so far, on the CPU."""
        return Moments(self._count, self._sum.cpu().clone(), self._outer.cpu().clone())

    def save(self, path: Path, store: str) -> None:
        """Writes them to a file, which is whole or not there.

        Raises:
            UpbenchError: The disk is full or read-only.
        """
        head = torch.tensor([self.images, self._count, self.chain], dtype=torch.int64)
        tensors = {"head": head, "outer": self._outer.cpu(), "sum": self._sum.cpu()}
        tensors["crc32"] = torch.tensor([_checksum(tensors, store)], dtype=torch.int64)
        data = save(tensors)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path, store: str, channels: int, device: torch.device) -> RunningMoments | None:
        """Reads them from a file; None where it is damaged, of another store, or not there."""
        try:
            tensors = load(path.read_bytes())
            crc32 = int(tensors.pop("crc32"))
            images, count, chain = tensors["head"].tolist()
            running = cls(channels, device)
            running._sum.copy_(tensors["sum"])
            running._outer.copy_(tensors["outer"])
        except Exception:  # whatever safetensors and torch make of a damaged file
            return None
        if crc32 != _checksum(tensors, store):
            return None
        running.images, running._count, running.chain = images, count, chain
        return running


def chained(chain: int, checksum: int) -> int:
    """The chain of checksums with one more."""
    return zlib.crc32(struct.pack("<I", checksum), chain)


def _checksum(tensors: Mapping[str, Tensor], store: str) -> int:
    checksum = zlib.crc32(store.encode())
    for name in ("head", "outer", "sum"):
        checksum = zlib.crc32(as_bytes(tensors[name]), checksum)
    return checksum
