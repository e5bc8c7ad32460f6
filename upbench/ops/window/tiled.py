"""Window attention as an operator that keeps neither weights nor queries: for outputs of any size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError
from upbench.ops.window.attention import window_attention

Part = tuple[slice, slice]


class TiledWindows(Operator):
    """Window attention whose queries are computed for the rectangle that is asked for (see `Operator`).

    `crop` costs nothing; calling computes the queries of the crop, their weights and the averages.
    """

    def __init__(
        self,
        queries: Callable[[Part], Tensor],
        keys: Tensor,
        rows: Tensor,
        cols: Tensor,
        *,
        heads: int,
        average_heads: bool = False,
        part: Part | None = None,
    ) -> None:
        """Takes what `window_attention` takes, queries as a function.

        Args:
            queries: Gives `[B, Cq, n, m]` for n rows and m columns of the output; slices have start and stop.
            keys: `[B, Cq, h, w]`.
            rows: `[H, Kr]` int64, the low-resolution rows that each output row sees; -1 for none.
            cols: `[W, Kc]` int64, the same for columns.
            heads: Number of heads.
            average_heads: Whether all channels share the average of the heads' weights.
            part: Rows and columns of the output; all of it by default.
        """
        self.queries = queries
        self.keys = keys
        self.tables = (rows, cols)
        self.heads = heads
        self.average_heads = average_heads
        self.part = part or (slice(0, len(rows)), slice(0, len(cols)))
        self.groups = 1 if average_heads else heads
        self.output_size = (_length(self.part[0]), _length(self.part[1]))

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups; in the dtype of `values`."""
        if values.ndim != 5 or values.shape[1] != self.groups:
            raise UpbenchError(f"operator takes [B, {self.groups}, K, h, w], got {list(values.shape)}")
        dense = self.dense(values.flatten(1, 2))
        return dense if self.groups == 1 else dense.unflatten(1, values.shape[1:3]).sum(1)

    def dense(self, features: Tensor) -> Tensor:
        """See `Operator`."""
        rows, cols = (table[span] for table, span in zip(self.tables, self.part, strict=True))
        return window_attention(
            self.queries(self.part),
            self.keys,
            features,
            rows,
            cols,
            heads=self.heads,
            average_heads=self.average_heads,
        )

    def crop(self, rows: slice, cols: slice) -> TiledWindows:
        """See `Operator`; nothing is computed."""
        part = tuple(
            slice(span.start + inner.start, span.start + inner.stop)
            for span, inner in zip(
                self.part,
                (slice(*s.indices(n)) for s, n in zip((rows, cols), self.output_size, strict=True)),
                strict=True,
            )
        )
        return TiledWindows(
            self.queries,
            self.keys,
            *self.tables,
            heads=self.heads,
            average_heads=self.average_heads,
            part=(part[0], part[1]),
        )


def _length(span: slice) -> int:
    length: int = span.stop - span.start
    return length
