"""Dense maps that are mixtures of the same few vectors everywhere, as an operator on these vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError


class BasisOperator(Operator):
    """Every output pixel is a weighted sum of the same N vectors, whatever their channels are.

    With a method's dense features of rank N, `SourcedOperator(vectors, BasisOperator(weights))` is a probe's
    way around their C channels.

    Attributes:
        weights: `[B, N, H, W]`.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.output_size = (int(weights.shape[2]), int(weights.shape[3]))

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, 1, K, h, w]`, the vectors as the N = h w cells of a grid, to `[B, K, H, W]`."""
        b, n = int(self.weights.shape[0]), int(self.weights.shape[1])
        if values.ndim != 5 or values.shape[:2] != (b, 1) or values.shape[3] * values.shape[4] != n:
            raise UpbenchError(f"operator takes [{b}, 1, K, h, w] of {n} cells, got {list(values.shape)}")
        dense: Tensor = values[:, 0].flatten(2) @ self.weights.to(values.dtype).flatten(2)
        return dense.view(b, -1, *self.output_size)

    def crop(self, rows: slice, cols: slice) -> BasisOperator:
        """See `Operator`; a view."""
        return BasisOperator(self.weights[:, :, rows, cols])

    def to(self, *args: Any, **kwargs: Any) -> BasisOperator:
        """The operator with its weights moved or cast."""
        return BasisOperator(self.weights.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.numel() * self.weights.element_size()
