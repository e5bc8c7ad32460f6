"""The samples of a split, read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample

SAMPLE_BYTES = 1_500_000_000
"""What all samples of a dataset may keep; those beyond are read anew."""


class Samples(Sequence[Sample]):
    """The samples of a split at one size, read when asked for and kept while they fit a budget."""

    def __init__(self, dataset: Dataset, split: str, size: int, limit: int | None, budget: int) -> None:
        """Args: as `Dataset.load`; limit: at most so many; budget: bytes to keep samples in."""
        self._dataset, self._split, self._size = dataset, split, size
        self._length = len(dataset.names(split)[:limit])
        self._budget = budget
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self._length:
            raise IndexError(index)
        sample = self._kept.get(index)
        if sample is None:
            sample = self._dataset.load(self._split, index, self._size)
            size = sum(part.nbytes for part in vars(sample).values() if isinstance(part, Tensor))
            if size <= self._budget:
                self._budget -= size
                self._kept[index] = sample
        return sample
