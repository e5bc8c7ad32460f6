"""Room for tensors that stay in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 32_000_000
"""Bytes that are taken from the system at a time."""

_ALIGNED = 64


class Arena:
    """Copies of tensors, side by side in large blocks, within a budget.

    Thousands of small tensors that stay, allocated between larger ones that come and go, leave a heap full of
    holes: it grew to twice what was kept.

    Attributes:
        budget: Bytes that may still be taken.
    """

    def __init__(self, budget: float) -> None:
        """Args: budget: Bytes of all tensors together."""
        self.budget = budget
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensors: list[Tensor]) -> list[Tensor] | None:
        """Copies of tensors on the CPU, or None where there is no room for all of them."""
        size = sum(math.ceil(tensor.nbytes / _ALIGNED) * _ALIGNED for tensor in tensors)
        if size > self.budget:
            return None
        self.budget -= size
        if self._used + size > len(self._block):
            self._block = torch.empty(max(BLOCK, size), dtype=torch.uint8)
            self._used = 0
        return [self._copy(tensor) for tensor in tensors]

    def _copy(self, tensor: Tensor) -> Tensor:
        start, count = self._used, tensor.nbytes
        self._used += math.ceil(count / _ALIGNED) * _ALIGNED
        copy = self._block[start : start + count].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
