"""Upsamplings that work on rows and columns independently: nearest, bilinear, bicubic, Lanczos."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError


class SeparableOperator(Operator):
    """One matrix for rows and one for columns, the same for every image of the batch.

    Attributes:
        rows: `[H, h]`, row i holds the weights of the low-resolution rows for output row i.
        cols: `[W, w]`, the same for columns.
    """

    groups = 1

    def __init__(self, rows: Tensor, cols: Tensor) -> None:
        """Args: rows, cols: The two matrices, `[H, h]` and `[W, w]`.

        Raises:
            UpbenchError: One of them is not a matrix.
        """
        for name, matrix in (("rows", rows), ("cols", cols)):
            if matrix.ndim != 2:
                raise UpbenchError(f"{name} of a separable operator: not a matrix, {list(matrix.shape)}")
        self.rows = rows
        self.cols = cols
        self.output_size = (rows.shape[0], cols.shape[0])

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups (see `Operator`)."""
        low = values.sum(1) if values.shape[1] > 1 else values[:, 0]
        rows = self.rows.to(low.device, low.dtype)
        cols = self.cols.to(low.device, low.dtype)
        return rows @ (low @ cols.T)

    def crop(self, rows: slice, cols: slice) -> SeparableOperator:
        """The operator for a rectangle of output pixels; a view, nothing is copied."""
        return SeparableOperator(self.rows[rows], self.cols[cols])

    def narrowed(self) -> tuple[slice, slice, SeparableOperator]:
        """See `Operator`; on a CPU only, as another device would have to be waited for."""
        if self.rows.device.type != "cpu":
            return slice(None), slice(None), self
        rows, cols = _support(self.rows), _support(self.cols)
        return rows, cols, SeparableOperator(self.rows[:, rows], self.cols[:, cols])

    def to(self, *args: Any, **kwargs: Any) -> SeparableOperator:
        """The operator with its matrices moved or cast (arguments as `Tensor.to`)."""
        return SeparableOperator(self.rows.to(*args, **kwargs), self.cols.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the two matrices."""
        return sum(m.numel() * m.element_size() for m in (self.rows, self.cols))


def _support(matrix: Tensor) -> slice:
    """The columns between the first and the last that are not all 0."""
    used = (matrix != 0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
