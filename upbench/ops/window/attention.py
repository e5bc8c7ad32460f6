"""Attention from a dense grid of queries to windows of a low-resolution map.

Both axes have a table of the cells that each output row (column) sees; a window is the product of the two.

    queries q on the output grid             keys k, values v on the low-resolution grid
    [H, W] = [6, 8]                          [h, w] = [3, 4]

      j  0 1 2 3 4 5 6 7                             0    1    2    3
    i   +---------------+                          +----+----+----+----+
    0   |. . . . . . . .|                        0 |    | ## | ## | ## | <-+
    1   |. . . . . . . .|                          +----+----+----+----+   |
    2   |. . . . . . . .|    sees the cells ##   1 |    | ## | ## | ## | <-+-- rows[3] = [0, 1, 2]
    3   |. . . . . Q . .|  ------------------->    +----+----+----+----+   |
    4   |. . . . . . . .|                        2 |    | ## | ## | ## | <-+
    5   |. . . . . . . .|                          +----+----+----+----+
        +---------------+                                 ^    ^    ^
                                                          +----+----+----- cols[5] = [1, 2, 3]

    rows [H, Kr], indexed by i               cols [W, Kc], indexed by j; an entry of -1 is no cell

    out[i, j] = sum over a < Kr, b < Kc of v[rows[i, a], cols[j, b]] * softmax(q[i, j] . k[same cell])

(What RaysUp's table of a kernel of 3 gives at this size: `tables.neighbourhood_table(6, 3, 3)[3]`.)
Neighbouring queries see almost the same cells. Those of a tile, n rows by m columns of the output, share one
list of cells per axis (`tables.Tiling`), so logits and averages are batched matrix products of a few hundred
queries with a few dozen keys; the keys and values are never brought to the output grid.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError
from upbench.ops.window.backends import NAMES, preferred
from upbench.ops.window.tables import Tiling, tiling

_BUDGET = {"cpu": 32 * 2**20}  # on a CPU about what its caches serve well
_BUDGET_ELSEWHERE = 1 << 30
_BUDGET_TRACED = 256 * 2**20  # every strip becomes a part of the graph


class QueryRows:
    """Queries `[B, Cq, H, W]` that are made a strip of rows at a time, when attention comes to it.

    Attributes:
        shape: [B, Cq, H, W].
        heads: How many groups of channels there are; attention must have as many.
        dtype: Of the strips.
        device: Where they are.
    """

    requires_grad = False
    ndim = 4

    def __init__(
        self, shape: tuple[int, int, int, int], heads: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Args: as the attributes."""
        self.shape = torch.Size(shape)
        self.heads = heads
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """Writes rows start..stop-1.

        Args:
            out: `[B, heads, R, n, T, m, D]` with R n = stop - start, T m = W; any strides, but D contiguous.
            start: First row.
            stop: First row that is not asked for.
        """

    def rows(self, start: int, stop: int) -> Tensor:
        """`[B, Cq, stop - start, W]`, channels last in memory."""
        b, channels, _, width = self.shape
        order = (b, stop - start, width, self.heads, channels // self.heads)
        out = torch.empty(order, dtype=self.dtype, device=self.device)
        self.fill(out.permute(0, 3, 1, 2, 4)[:, :, None, :, None], start, stop)
        return out.flatten(3).permute(0, 3, 1, 2)

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize


def window_attention(
    q: Tensor | QueryRows,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    heads: int,
    average_heads: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Softmax attention of every output pixel to its window of low-resolution cells.

    Heads split channels contiguously: head n owns channels [n D, (n + 1) D).

    Args:
        q: `[B, Cq, H, W]`; a `QueryRows` makes strips of them when they are needed.
        k: `[B, Cq, h, w]`.
        v: `[B, Cv, h, w]`.
        rows: `[H, Kr]` int64, the low-resolution rows that each output row sees; -1 for none.
        cols: `[W, Kc]` int64, the same for columns.
        heads: Number of heads; divides Cq and, without `average_heads`, Cv.
        average_heads: The softmax weights are averaged over heads, and the average is applied to all of v.
        scale: Factor on the logits; (Cq / heads) ** -0.5 by default.
        backend: One of `BACKENDS`, or "auto": what `use_backend` or UPBENCH_ATTENTION asks for, else
            "triton" on CUDA where it is installed and knows the dtypes, else "torch".
        memory_budget: Bytes of working memory to stay near, beside the output; without gradients only.

    Returns:
        `[B, Cv, H, W]` in the dtype of v.

    Raises:
        UpbenchError: Shapes that do not fit, a position without cells, a backend that does not exist or that
            cannot compute this.
    """
    _check(q, k, rows, cols, heads)
    if v.shape[0] != k.shape[0] or v.shape[2:] != k.shape[2:]:
        raise UpbenchError(f"values {list(v.shape)} do not lie on the grid of the keys {list(k.shape)}")
    if not average_heads and v.shape[1] % heads:
        raise UpbenchError(f"{v.shape[1]} value channels cannot be split over {heads} heads")
    backend = preferred(backend)
    if backend == "auto":
        backend = _fastest(q, k, v, rows, cols, heads, average_heads)
    if isinstance(q, QueryRows) and backend != "torch":
        q = q.rows(0, int(q.shape[2]))
    run = BACKENDS[backend]
    scale = (int(q.shape[1]) // heads) ** -0.5 if scale is None else scale
    return run(q, k, v, rows, cols, heads, average_heads, scale, memory_budget)


def window_operator(
    q: Tensor | QueryRows,
    k: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    heads: int,
    average_heads: bool = False,
    scale: float | None = None,
    memory_budget: int | None = None,
) -> WindowOperator:
    """The same attention as an operator on any values: softmax weights are computed once and kept.

    Args: as for `window_attention`. The weights carry no gradient.
    """
    _check(q, k, rows, cols, heads)
    with torch.no_grad():
        queries = _Queries(q, k, rows, cols, heads, scale)
        r, c = queries.rows, queries.cols
        groups = 1 if average_heads else heads
        window = groups * r.window * c.window
        kept = k.new_empty(int(q.shape[0]), r.count, c.count, window, r.size * c.size)
        for first, last in queries.strips(memory_budget):
            weights = queries.weights(first, last, average_heads)
            kept[:, first:last] = weights.reshape(kept[:, first:last].shape)
    return WindowOperator(kept, r, c, groups)


class WindowOperator(Operator):
    """Kept attention weights, as an operator (see `Operator`).

    Attributes:
        weights: `[B, Tr, Tc, groups * Kr * Kc, n * m]`, the softmax weights of each tile of n x m pixels.
        rows, cols: How each axis is cut into tiles.
    """

    def __init__(self, weights: Tensor, rows: Tiling, cols: Tiling, groups: int) -> None:
        self.weights = weights
        self.rows = rows
        self.cols = cols
        self.groups = groups
        self.output_size = (rows.length, cols.length)

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups; in the dtype of `values`."""
        if values.ndim != 5 or values.shape[1] != self.groups:
            raise UpbenchError(f"operator takes [B, {self.groups}, K, h, w], got {list(values.shape)}")
        b, g, c, h, w = values.shape
        cells = values.permute(0, 3, 4, 1, 2).reshape(b, h, w, g * c)
        # The groups' sum is part of the product: [K, groups * cells] x [groups * cells, pixels].
        tiles = _gather(cells, self.rows, self.cols, 0, self.rows.count, g)
        tiles = tiles.reshape(-1, self.weights.shape[3], c)
        dense = torch.bmm(tiles.transpose(1, 2), self.weights.to(values.dtype).flatten(0, 2))
        return _join(dense, self.rows, self.cols, 0, self.rows.count, b)

    def crop(self, rows: slice, cols: slice) -> WindowOperator:
        """The operator for a rectangle of output pixels; a view of the tiles that it touches."""
        r, row_tiles = self.rows.crop(*rows.indices(self.output_size[0])[:2])
        c, col_tiles = self.cols.crop(*cols.indices(self.output_size[1])[:2])
        return WindowOperator(self.weights[:, r, c], row_tiles, col_tiles, self.groups)

    def to(self, *args: Any, **kwargs: Any) -> WindowOperator:
        """The operator with its weights moved or cast; float16 halves what keeping it costs."""
        weights = self.weights.to(*args, **kwargs)
        return WindowOperator(
            weights, self.rows.on(weights.device), self.cols.on(weights.device), self.groups
        )

    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.numel() * self.weights.element_size()


class _Queries:
    """Queries and keys of one call, and how their axes are cut into tiles."""

    def __init__(
        self,
        q: Tensor | QueryRows,
        k: Tensor,
        rows: Tensor,
        cols: Tensor,
        heads: int,
        scale: float | None,
    ) -> None:
        self.q = q
        self.heads = heads
        self.rows = tiling(rows, int(k.shape[2]), q.device)
        self.cols = tiling(cols, int(k.shape[3]), q.device)
        scale = (int(q.shape[1]) // heads) ** -0.5 if scale is None else scale
        self.keys = (k * scale).permute(0, 2, 3, 1).contiguous()

    def strips(self, budget: int | None, channels: int = 0) -> Iterator[tuple[int, int]]:
        """Runs of tile rows whose working memory stays near `budget` bytes."""
        budget = budget or _BUDGET.get(self.q.device.type, _BUDGET_ELSEWHERE)
        pixels = int(self.q.shape[0]) * self.rows.size * self.cols.count * self.cols.size
        window = self.rows.window * self.cols.window
        per_row = pixels * (int(self.q.shape[1]) + channels + 2 * self.heads * window) * self.q.element_size()
        step = max(1, budget // per_row)
        for first in range(0, self.rows.count, step):
            yield first, min(first + step, self.rows.count)

    def weights(self, first: int, last: int, average: bool) -> Tensor:
        """Softmax weights of tile rows first..last-1, `[B * R * T * groups, Kr * Kc, n * m]`."""
        tiles = _gather(self.keys, self.rows, self.cols, first, last, self.heads)
        queries = _split(self.q, self.rows, self.cols, first, last, self.heads)
        logits = torch.bmm(tiles.flatten(0, 3), queries)
        bias = _bias(self.rows, self.cols, first, last)
        shape = (int(self.q.shape[0]), -1, self.heads, *logits.shape[1:])
        if bias is not None:
            logits = (logits.view(shape) + bias.to(logits.dtype)).view(logits.shape)
        precise = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.softmax(logits, 1, dtype=precise)
        return weights.view(shape).mean(2).flatten(0, 1) if average else weights


def _torch_backend(
    q: Tensor | QueryRows,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    heads: int,
    average_heads: bool,
    scale: float,
    memory_budget: int | None,
) -> Tensor:
    """Batched products over tiles; strips of tile rows keep the working memory small."""
    queries = _Queries(q, k, rows, cols, heads, scale)
    groups = 1 if average_heads else heads
    values = v.permute(0, 2, 3, 1).contiguous()
    b, channels = int(v.shape[0]), int(v.shape[1])
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))

    def averages(first: int, last: int) -> Tensor:
        weights = queries.weights(first, last, average_heads)
        tiles = _gather(values, queries.rows, queries.cols, first, last, groups).flatten(0, 3)
        return torch.bmm(tiles.transpose(1, 2), weights.to(v.dtype)).to(v.dtype)

    def strip(first: int, last: int) -> Tensor:
        return _join(averages(first, last), queries.rows, queries.cols, first, last, b)

    if tracked:  # everything is kept for the backward pass anyway
        return strip(0, queries.rows.count).contiguous()
    if torch.compiler.is_compiling():  # a graph of few nodes, which writes nothing in place
        strips = queries.strips(memory_budget or _BUDGET_TRACED, channels)
        return torch.cat([strip(first, last) for first, last in strips], 2)
    out = v.new_empty(b, channels, queries.rows.length, queries.cols.length)
    for first, last in queries.strips(memory_budget, channels):
        start, stop = queries.rows.span(first, last)
        _write(averages(first, last), out[:, :, start:stop], queries.rows, queries.cols, first, last)
    return out


def _reference_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    heads: int,
    average_heads: bool,
    scale: float,
    memory_budget: int | None,
) -> Tensor:
    """Every pixel's keys and values gathered; what the others are tested against."""
    allowed = (rows >= 0)[:, None, :, None] & (cols >= 0)[None, :, None, :]
    index = (rows.clamp(min=0)[:, None, :, None], cols.clamp(min=0)[None, :, None, :])
    b, c, height, width = q.shape
    keys = k[:, :, index[0], index[1]].reshape(b, heads, c // heads, height, width, -1)
    values = v[:, :, index[0], index[1]].reshape(
        b, 1 if average_heads else heads, -1, height, width, keys.shape[-1]
    )
    logits = (q.reshape(b, heads, c // heads, height, width, 1) * keys).sum(2) * scale
    weights = logits.masked_fill(~allowed.flatten(2), float("-inf")).softmax(-1)
    if average_heads:
        weights = weights.mean(1, keepdim=True)
    return (weights.unsqueeze(2) * values).sum(-1).reshape(b, v.shape[1], height, width)


def _triton_backend(*arguments: Any) -> Tensor:
    from upbench.ops.window import triton_window

    return triton_window.attend(*arguments)


def _natten_backend(*arguments: Any) -> Tensor:
    from upbench.ops.window import natten_window

    return natten_window.attend(*arguments)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "torch": _torch_backend,
    "triton": _triton_backend,
    "natten": _natten_backend,
    "reference": _reference_backend,
}
assert tuple(BACKENDS) == NAMES


def _fastest(
    q: Tensor | QueryRows, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, heads: int, average: bool
) -> str:
    """The backend to take where none is asked for."""
    if isinstance(q, QueryRows) or not q.is_cuda:
        return "torch"
    from upbench.ops.window import triton_window

    return "torch" if triton_window.refusal(q, k, v, rows, cols, heads, average) else "triton"


def _check(q: Tensor | QueryRows, k: Tensor, rows: Tensor, cols: Tensor, heads: int) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2]:
        raise UpbenchError(f"queries {list(q.shape)} and keys {list(k.shape)} must share batch and channels")
    if heads < 1 or q.shape[1] % heads:
        raise UpbenchError(f"{q.shape[1]} query channels cannot be split over {heads} heads")
    for axis, table, size in (("row", rows, q.shape[2]), ("column", cols, q.shape[3])):
        if table.ndim != 2 or table.shape[0] != size:
            raise UpbenchError(f"{axis} table {list(table.shape)} does not fit queries {list(q.shape)}")


def _split(x: Tensor | QueryRows, rows: Tiling, cols: Tiling, first: int, last: int, heads: int) -> Tensor:
    """Pixels of tile rows first..last-1: `[B, heads * D, H, W]` to `[B * R * T * heads, D, n * m]`."""
    b, c = int(x.shape[0]), int(x.shape[1])
    start, stop = rows.span(first, last)
    padding = (*cols.padding(0, cols.count), *rows.padding(first, last))
    shape = (b, heads, c // heads, last - first, rows.size, cols.count, cols.size)
    if isinstance(x, QueryRows) and x.heads == heads and not any(padding):
        order = (b, shape[3], cols.count, heads, rows.size, cols.size, shape[2])
        filled = torch.empty(order, dtype=x.dtype, device=x.device)
        x.fill(filled.permute(0, 3, 1, 4, 2, 5, 6), start, stop)
        return filled.view(-1, rows.size * cols.size, shape[2]).transpose(1, 2)
    strip = x.rows(start, stop) if isinstance(x, QueryRows) else x[:, :, start:stop]
    if any(padding):
        strip = F.pad(strip, padding)
    # Copied in the order that it lies in memory; the product takes either.
    if strip.stride(1) == 1:
        tiles = strip.permute(0, 2, 3, 1).reshape(b, *shape[3:], *shape[1:3]).permute(0, 1, 3, 5, 2, 4, 6)
        return tiles.reshape(-1, rows.size * cols.size, c // heads).transpose(1, 2)
    tiles = strip.reshape(shape).permute(0, 3, 5, 1, 2, 4, 6)
    return tiles.reshape(-1, c // heads, rows.size * cols.size)


def _join(tiles: Tensor, rows: Tiling, cols: Tiling, first: int, last: int, b: int) -> Tensor:
    """The inverse of `_split`, without the pixels outside of the axes: `[B, C, stop - start, W]`."""
    tiles = _pixels(tiles, rows, cols, first, last, b)
    strip = tiles.reshape(b, int(tiles.shape[1]), (last - first) * rows.size, cols.count * cols.size)
    (top, bottom), (left, right) = rows.padding(first, last), cols.padding(0, cols.count)
    if not (top or bottom or left or right):  # a slice, even of everything, costs two passes backwards
        return strip
    return strip[:, :, top : strip.shape[2] - bottom, left : strip.shape[3] - right]


def _write(tiles: Tensor, out: Tensor, rows: Tiling, cols: Tiling, first: int, last: int) -> None:
    """The same, copied once, into rows of `out` `[B, C, stop - start, W]`."""
    if any((*rows.padding(first, last), *cols.padding(0, cols.count))):
        out.copy_(_join(tiles, rows, cols, first, last, int(out.shape[0])))
        return
    places = out.unflatten(2, (last - first, rows.size)).unflatten(4, (cols.count, cols.size))
    places.copy_(_pixels(tiles, rows, cols, first, last, int(out.shape[0])))


def _pixels(tiles: Tensor, rows: Tiling, cols: Tiling, first: int, last: int, b: int) -> Tensor:
    """`[B * R * T, C, n * m]` (or groups of channels apart) as `[B, C, R, n, T, m]`."""
    tiles = tiles.reshape(b, last - first, cols.count, -1, rows.size, cols.size)
    return tiles.permute(0, 3, 1, 4, 2, 5)


def _gather(cells: Tensor, rows: Tiling, cols: Tiling, first: int, last: int, heads: int) -> Tensor:
    """The cells that each tile sees: `[B, h, w, heads * D]` to `[B, R, T, heads, Kr * Kc, D]`."""
    b, c = int(cells.shape[0]), int(cells.shape[3])
    r = rows.cells[first:last, None, None, :, None] * int(cells.shape[2])
    place = (r + cols.cells[:, None, None, :]) * heads + torch.arange(heads, device=r.device)[:, None, None]
    across = torch.arange(b, device=r.device)[:, None] * (int(cells.shape[1]) * int(cells.shape[2]) * heads)
    seen = cells.reshape(-1, c // heads).index_select(0, (across + place.flatten()).flatten())
    return seen.view(b, last - first, cols.count, heads, rows.window * cols.window, c // heads)


def _bias(rows: Tiling, cols: Tiling, first: int, last: int) -> Tensor | None:
    """Log multiplicities of tile rows first..last-1, `[R * T, 1, Kr * Kc, n * m]`; None if all are once."""
    if rows.bias is None and cols.bias is None:
        return None
    parts = []
    for tiles in (rows, cols):
        zero = tiles.cells.new_zeros((tiles.count, tiles.size, tiles.window), dtype=torch.float64)
        parts.append(zero if tiles.bias is None else tiles.bias)
    r = parts[0][first:last].transpose(1, 2)[:, None, :, None, :, None]  # [R, 1, Kr, 1, n, 1]
    c = parts[1].transpose(1, 2)[None, :, None, :, None, :]  # [1, T, 1, Kc, 1, m]
    return (r + c).reshape(-1, 1, rows.window * cols.window, rows.size * cols.size)
