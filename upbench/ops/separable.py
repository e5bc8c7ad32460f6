"""Upsamplings that work on rows and columns independently: nearest, bilinear, bicubic, Lanczos."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError

Spans = tuple[tuple[int, int], ...]
"""For each row of a matrix, its first column that is not 0 and the one after its last."""


class SeparableOperator(Operator):
    """One matrix for rows and one for columns, the same for every image of the batch or one for each.

    Attributes:
        rows: `[H, h]`, row i holds the weights of the low-resolution rows for output row i; or `[B, H, h]`.
        cols: `[W, w]`, the same for columns; or `[B, W, w]`.
    """

    groups = 1

    def __init__(self, rows: Tensor, cols: Tensor) -> None:
        """Args: rows, cols: The two matrices, `[H, h]` and `[W, w]`, or as many as there are images.

        Raises:
            UpbenchError: One of them is not a matrix.
        """
        for name, matrix in (("rows", rows), ("cols", cols)):
            if matrix.ndim not in (2, 3):
                raise UpbenchError(f"{name} of a separable operator: not a matrix, {list(matrix.shape)}")
        self.rows = rows
        self.cols = cols
        self.output_size = (int(rows.shape[-2]), int(cols.shape[-2]))

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups (see `Operator`)."""
        low = values.sum(1) if values.shape[1] > 1 else values[:, 0]
        rows = self.rows.to(low.device, low.dtype)
        cols = self.cols.to(low.device, low.dtype)
        if rows.ndim == 3:
            return _each(rows, cols, low)
        return rows @ (low @ cols.T)

    def crop(self, rows: slice, cols: slice) -> SeparableOperator:
        """The operator for a rectangle of output pixels; a view, nothing is copied."""
        return SeparableOperator(self.rows[..., rows, :], self.cols[..., cols, :])

    def narrowed(self) -> tuple[slice, slice, SeparableOperator]:
        """See `Operator`; on a CPU only, as another device would have to be waited for."""
        if self.rows.device.type != "cpu" or self.rows.ndim == 3:
            return slice(None), slice(None), self
        rows, cols = _hull(self._row_spans), _hull(self._col_spans)
        return rows, cols, SeparableOperator(self.rows[:, rows], self.cols[:, cols])

    def cropped_each(
        self, crops: Sequence[tuple[slice, slice]], features: Sequence[Tensor]
    ) -> tuple[SeparableOperator, Tensor]:
        """See `Operator`."""
        row_windows = _windows([_hull(self._row_spans[r]) for r, _ in crops], int(self.rows.shape[1]))
        col_windows = _windows([_hull(self._col_spans[c]) for _, c in crops], int(self.cols.shape[1]))
        rows = torch.stack([self.rows[r, w] for (r, _), w in zip(crops, row_windows, strict=True)])
        cols = torch.stack([self.cols[c, w] for (_, c), w in zip(crops, col_windows, strict=True)])
        low = [f[0, :, r, c] for f, r, c in zip(features, row_windows, col_windows, strict=True)]
        return SeparableOperator(rows, cols), torch.stack(low)

    def to(self, *args: Any, **kwargs: Any) -> SeparableOperator:
        """The operator with its matrices moved or cast (arguments as `Tensor.to`)."""
        return SeparableOperator(self.rows.to(*args, **kwargs), self.cols.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the two matrices."""
        return sum(m.numel() * m.element_size() for m in (self.rows, self.cols))

    @cached_property
    def _row_spans(self) -> Spans:
        return _spans(self.rows)

    @cached_property
    def _col_spans(self) -> Spans:
        return _spans(self.cols)


def _each(rows: Tensor, cols: Tensor, low: Tensor) -> Tensor:
    """`[B, H, h]` and `[B, W, w]` on `[B, K, h, w]`: two products a batch, not two for each of B * K maps."""
    b, k, h, w = low.shape
    tall = (rows @ low.transpose(1, 2).reshape(b, h, k * w)).view(b, -1, w)  # [B, H * K, w]
    made = (tall @ cols.mT).view(b, rows.shape[1], k, cols.shape[1])
    return made.transpose(1, 2)


def _spans(matrix: Tensor) -> Spans:
    """See `Spans`; (0, 1) of a row that is 0 everywhere."""
    used = (matrix != 0).cpu().tolist()
    return tuple(
        (row.index(True), len(row) - row[::-1].index(True)) if True in row else (0, 1) for row in used
    )


def _hull(spans: Spans) -> slice:
    """The columns that one of the rows uses, and those between them."""
    return slice(min(first for first, _ in spans), max(last for _, last in spans))


def _windows(needed: Sequence[slice], length: int) -> list[slice]:
    """Slices of one length within `length` cells, each around what is needed."""
    side = max(s.stop - s.start for s in needed)
    starts = [min(s.start, length - side) for s in needed]
    return [slice(start, start + side) for start in starts]
