"""Upsamplings that are made in steps, each linear in the values once its weights are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.errors import UpbenchError
from upbench.ops.reassemble import Padding, kernel_side, pad, reassemble_padded
from upbench.ops.resample import interpolation_matrix
from upbench.ops.separable import SeparableOperator


class LinearMap(ABC):
    """One step: values on one grid to another, each channel by itself.

    Attributes:
        output_size: (H, W) of the result.
        groups: How many groups of channels have weights of their own; a group's channels lie together.
    """

    output_size: tuple[int, int]
    groups: int = 1

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """`[B, C, h, w]`, C a multiple of `groups`, to `[B, C, H, W]`. Differentiable."""

    @abstractmethod
    def crop(self, rows: slice, cols: slice) -> tuple[LinearMap, slice, slice]:
        """The map for a rectangle of output pixels (slices with step 1), and the rectangle of the values that
        it takes instead of all of them."""

    @abstractmethod
    def to(self, *args: Any, **kwargs: Any) -> LinearMap:
        """The map with its tensors moved or cast (arguments as `Tensor.to`)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that keeping it costs."""


@dataclass(frozen=True)
class _Axis:
    """An axis of a `KernelMap`.

    Attributes:
        before, after: Cells of padding at its ends.
        start, stop: Which of the pixels that have kernels are asked for.
    """

    before: int
    after: int
    start: int
    stop: int

    def crop(self, pixels: slice, with_kernels: int, scale: int, reach: int) -> tuple[_Axis, slice, slice]:
        """The axis for some of the pixels asked for; which of the `with_kernels` pixels keep their kernels;
        and which cells of the values are needed."""
        start, stop, _ = pixels.indices(self.stop - self.start)
        first, last = (self.start + start) // scale, -(-(self.start + stop) // scale)
        low, high = first - self.before, last + 2 * reach - self.before
        cells = with_kernels // scale + 2 * reach - self.before - self.after
        shift = self.start - scale * first
        axis = _Axis(max(0, -low), max(0, high - cells), start + shift, stop + shift)
        return axis, slice(scale * first, scale * last), slice(max(0, low), min(high, cells))


@dataclass
class KernelMap(LinearMap):
    """Every output pixel has a kernel of its own (see `upbench.ops.reassemble`).

    Attributes:
        kernels: `[B, G, k * k, scale * h, scale * w]`.
        scale: Output pixels per cell.
        padding: What lies outside the map.
        rows, cols: How the axes are padded and cut; by default all around, and not.
    """

    kernels: Tensor
    scale: int
    padding: Padding = "zeros"
    rows: _Axis = field(default=None)  # type: ignore[assignment]
    cols: _Axis = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        reach = kernel_side(self.kernels) // 2
        height, width = map(int, self.kernels.shape[3:])
        self.rows = self.rows or _Axis(reach, reach, 0, height)
        self.cols = self.cols or _Axis(reach, reach, 0, width)
        self.groups = int(self.kernels.shape[1])
        self.output_size = (self.rows.stop - self.rows.start, self.cols.stop - self.cols.start)

    def __call__(self, values: Tensor) -> Tensor:
        """See `LinearMap`."""
        rows, cols = self.rows, self.cols
        padded = pad(values, (cols.before, cols.after, rows.before, rows.after), self.padding)
        dense = reassemble_padded(padded, self.kernels, self.scale)
        return dense[..., rows.start : rows.stop, cols.start : cols.stop]

    def crop(self, rows: slice, cols: slice) -> tuple[KernelMap, slice, slice]:
        """See `LinearMap`; the kernels are a view."""
        reach = kernel_side(self.kernels) // 2
        height, width = map(int, self.kernels.shape[3:])
        row_axis, row_pixels, row_cells = self.rows.crop(rows, height, self.scale, reach)
        col_axis, col_pixels, col_cells = self.cols.crop(cols, width, self.scale, reach)
        kernels = self.kernels[..., row_pixels, col_pixels]
        return replace(self, kernels=kernels, rows=row_axis, cols=col_axis), row_cells, col_cells

    def to(self, *args: Any, **kwargs: Any) -> KernelMap:
        """See `LinearMap`."""
        return replace(self, kernels=self.kernels.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the kernels."""
        return self.kernels.numel() * self.kernels.element_size()


class ChainOperator(Operator):
    """Linear maps one after the other, then perhaps a resize.

    Attributes:
        maps: The steps. Where they have groups of channels, all have as many or one.
        resize: What follows them, or None.
        window: The rows and columns of the values that the first map takes.
    """

    def __init__(
        self,
        maps: Sequence[LinearMap],
        resize: SeparableOperator | None = None,
        window: tuple[slice, slice] = (slice(None), slice(None)),
    ) -> None:
        """Args: see the attributes.

        Raises:
            UpbenchError: No map, or maps with different numbers of groups.
        """
        counts = sorted({m.groups for m in maps} - {1})
        if not maps or len(counts) > 1:
            raise UpbenchError(f"a chain of {len(maps)} maps with {counts} groups of channels")
        self.maps = list(maps)
        self.resize = resize
        self.window = window
        self.groups = counts[0] if counts else 1
        self.output_size = maps[-1].output_size if resize is None else resize.output_size

    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups (see `Operator`)."""
        if values.ndim != 5 or values.shape[1] != self.groups:
            raise UpbenchError(f"operator takes [B, {self.groups}, K, h, w], got {list(values.shape)}")
        x = values[..., self.window[0], self.window[1]].flatten(1, 2)
        for step in self.maps:
            x = step(x)
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).sum(1)
        return x if self.resize is None else self.resize(x.unsqueeze(1))

    def crop(self, rows: slice, cols: slice) -> ChainOperator:
        """See `Operator`; each step is cut to the pixels that the next one needs."""
        resize = self.resize
        if resize is not None:
            resize = resize.crop(rows, cols)
            rows, cols = _used(resize.rows), _used(resize.cols)
            resize = SeparableOperator(resize.rows[:, rows], resize.cols[:, cols])
        maps: list[LinearMap] = []
        for step in reversed(self.maps):
            part, rows, cols = step.crop(rows, cols)
            maps.insert(0, part)
        window = (_within(self.window[0], rows), _within(self.window[1], cols))
        return ChainOperator(maps, resize, window)

    def to(self, *args: Any, **kwargs: Any) -> ChainOperator:
        """See `Operator`."""
        resize = None if self.resize is None else self.resize.to(*args, **kwargs)
        return ChainOperator([m.to(*args, **kwargs) for m in self.maps], resize, self.window)

    def nbytes(self) -> int:
        """Bytes of the steps and of the resize."""
        return sum(m.nbytes() for m in self.maps) + (0 if self.resize is None else self.resize.nbytes())


def resizing(size: tuple[int, int], output_size: tuple[int, int], like: Tensor) -> SeparableOperator | None:
    """`upbench.ops.resample.to_size` as an operator on the device of `like`; None where nothing changes."""
    if size == output_size:
        return None
    rows, cols = (
        interpolation_matrix(n, out, "bilinear", like.device)
        for n, out in zip(size, output_size, strict=True)
    )
    return SeparableOperator(rows, cols)


def _used(matrix: Tensor) -> slice:
    """The columns of a matrix from the first to the last that is not zero."""
    columns = matrix.any(0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1)


def _within(outer: slice, inner: slice) -> slice:
    """`inner`, which counts from the start of `outer`, from zero."""
    start = outer.start or 0
    return slice(start + inner.start, start + inner.stop)
