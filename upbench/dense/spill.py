"""Keeps the operators or dense maps of a split's images: in memory within a budget, the rest in files.

At 448 pixels one image's attention weights take 115 MB and a second or more to compute; the probe's training
asks for each of them a hundred times.
"""

from __future__ import annotations

import os
import pickle
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from upbench.contracts.operator import Operator, SourcedOperator
from upbench.system.cache import abandoned, cache_dir, locked

DISK_RESERVE = 5_000_000_000
"""Bytes of the disk that are left free."""


class Store:
    """Operators and dense maps of some images.

    What does not fit the budget goes to files that are mapped into memory, so that the system's cache holds
    what it can of them and a crop reads its own part alone. A file has no name from the moment that it is
    mapped (where the system allows that): nothing is left behind, however the process ends.

    Attributes:
        budget: Bytes of memory.
        count: How many images may come.
        used: Bytes of memory that are taken.
        spilled: Bytes in files.
    """

    def __init__(self, budget: int, count: int, spill: bool = True) -> None:
        """Args: budget, count: See the class; spill: Whether to use files for what does not fit."""
        self.budget = budget
        self.count = count
        self.used = 0
        self.spilled = 0
        self._spill = spill
        self._items: dict[int, Operator | Tensor] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._items

    def get(self, index: int) -> Operator | Tensor | None:
        """What is kept of an image, or None."""
        return self._items.get(index)

    def offer(self, index: int, item: Operator | Tensor) -> Operator | Tensor:
        """Keeps an item where there is room, and returns it as it is kept.

        What is not kept is returned in the same precision as its neighbours, so that a result does not
        depend on which images happened to fit.
        """
        if size_of(item) * self.count > self.budget:
            item = _halve(item)
        size = size_of(item)
        if self.used + size <= self.budget:
            self._items[index] = item
            self.used += size
            return item
        mapped = self._to_file(item, size) if self._spill else None
        if mapped is None:
            return item
        self._items[index] = mapped
        self.spilled += size
        return mapped

    def _to_file(self, item: Operator | Tensor, size: int) -> Operator | Tensor | None:
        """The item in a file that is mapped, or None where that cannot be: a disk that is too full, an
        operator that is a function."""
        folder = cache_dir("scratch")
        if not self.spilled:
            _remove_old(folder)
        if shutil.disk_usage(folder).free - size < DISK_RESERVE:
            self._spill = False
            return None
        name = str(folder / f"{uuid.uuid4().hex}.pt")
        try:
            with locked(Path(name), 0o600):
                torch.save(item, name)
                # Our own file, written just now: it may hold classes, not tensors alone.
                mapped: Operator | Tensor = torch.load(name, mmap=True, weights_only=False)
        except (OSError, RuntimeError, AttributeError, pickle.PicklingError):
            self._spill = False  # torch tells of a full disk by either of the first two, pickle by the others
            return None
        finally:
            with suppress(OSError):  # not every system lets go of the name of a mapped file
                os.unlink(name)
        return mapped


def _remove_old(folder: Path) -> None:
    """Removes files that a process left which was killed while it wrote, a day ago or earlier."""
    for path in folder.glob("*.pt"):
        if abandoned(path):
            with suppress(OSError):
                path.unlink()


def size_of(item: Operator | Tensor) -> int:
    """Bytes of an operator's tensors or of a dense map."""
    return item.nbytes() if isinstance(item, Operator) else item.numel() * item.element_size()


def _halve(item: Operator | Tensor) -> Operator | Tensor:
    """In float16, unless values are too large for it."""
    if isinstance(item, SourcedOperator):
        return SourcedOperator(_halve_tensor(item.sources), item.operator.to(torch.float16))
    return item.to(torch.float16) if isinstance(item, Operator) else _halve_tensor(item)


def _halve_tensor(item: Tensor) -> Tensor:
    half = item.half()
    return half if bool(half.isfinite().all()) else item
