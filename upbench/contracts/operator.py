"""Upsamplings as linear operators: what a linear probe commutes with.

An operator A takes low-resolution values to the output grid. Methods with several attention heads average
different channels with different weights: their operator has `groups` > 1, and channel c of the C features
belongs to group c // (C / groups).

A 1x1 probe W (`[K, C]`) on the upsampled features equals the operator on projected features: with W_g the
columns of group g,  W . A(f) = sum_g A_g(W_g f_g).  So the operator takes `[B, groups, K, h, w]` and sums
over groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upbench.errors import UpbenchError


class Operator(ABC):
    """A linear upsampling of B images.

    Attributes:
        output_size: (H, W) of the result.
        groups: How many groups of channels are averaged with weights of their own.
    """

    output_size: tuple[int, int]
    groups: int = 1

    @abstractmethod
    def __call__(self, values: Tensor) -> Tensor:
        """`[B, groups, K, h, w]` to `[B, K, H, W]`, summed over groups. Differentiable."""

    @abstractmethod
    def crop(self, rows: slice, cols: slice) -> Operator:
        """The same operator for a rectangle of output pixels only (slices with step 1)."""

    def narrowed(self) -> tuple[slice, slice, Operator]:
        """The rectangle of low-resolution cells that the operator looks at, and itself on that rectangle:
        what a crop does not see need not be projected. Everything, by default."""
        return slice(None), slice(None), self

    def cropped_each(
        self, crops: Sequence[tuple[slice, slice]], features: Sequence[Tensor]
    ) -> tuple[Operator, Tensor] | None:
        """One operator for a rectangle of its own of each of B images, where this one serves all of them and
        can be cut so; None, by default, where it cannot.

        Args:
            crops: B rectangles of output pixels, of one size.
            features: B times `[1, C, h, w]`.

        Returns:
            The operator, and `[B, C, h', w']`, what it is to be applied to: of each image the cells that its
            rectangle looks at, and as many beside them as make the windows equal.
        """
        return None

    def dense(self, features: Tensor) -> Tensor:
        """The upsampled features: `[B, C, h, w]` to `[B, C, H, W]`, each group with its own weights."""
        if self.groups == 1:
            return self(features.unsqueeze(1))
        b, c, h, w = features.shape
        parts = []
        for group, part in enumerate(features.chunk(self.groups, 1)):
            values = features.new_zeros(b, self.groups, c // self.groups, h, w)
            values[:, group] = part
            parts.append(self(values))
        return torch.cat(parts, 1)

    def takes(self, features: Tensor) -> Tensor:
        """`[B, C, h, w]` what it is to be applied to: the features that its method was given, or others
        that the method made of the image (`SourcedOperator`)."""
        return features

    def to(self, *args: Any, **kwargs: Any) -> Operator:
        """The operator with its tensors moved or cast (arguments as `Tensor.to`)."""
        return self

    def nbytes(self) -> int:
        """Bytes that keeping it costs."""
        return 0


class FunctionOperator(Operator):
    """Any function of `[B, K, h, w]` that is linear and the same for every channel.

    Attributes:
        function: The function.
        full_size: (H, W) of what it returns.
        window: Rows and columns of that which are the result.
        held: Bytes that the function holds, such as its image.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        output_size: tuple[int, int],
        window: tuple[slice, slice] | None = None,
        held: int = 0,
    ) -> None:
        self.function = function
        self.held = held
        self.full_size = output_size
        self.window = window or (slice(0, output_size[0]), slice(0, output_size[1]))
        rows, cols = self.window
        self.output_size = (rows.stop - rows.start, cols.stop - cols.start)

    def __call__(self, values: Tensor) -> Tensor:
        """See `Operator`; the crop is taken after the whole output was computed."""
        return self.function(values.sum(1))[..., self.window[0], self.window[1]]

    def crop(self, rows: slice, cols: slice) -> FunctionOperator:
        """See `Operator`."""
        top, left = self.window[0].start, self.window[1].start
        r0, r1, _ = rows.indices(self.output_size[0])
        c0, c1, _ = cols.indices(self.output_size[1])
        window = (slice(top + r0, top + r1), slice(left + c0, left + c1))
        return FunctionOperator(self.function, self.full_size, window, self.held)

    def nbytes(self) -> int:
        """Bytes that the function holds."""
        return self.held


class SourcedOperator(Operator):
    """An operator with the features that it is applied to: of methods that compute features of their own.

    Attributes:
        sources: `[B, C, h', w']`, which stand in the place of the features that the method was given.
        operator: From their grid to the output's.
    """

    def __init__(self, sources: Tensor, operator: Operator) -> None:
        self.sources = sources
        self.operator = operator
        self.output_size = operator.output_size
        self.groups = operator.groups

    def __call__(self, values: Tensor) -> Tensor:
        """See `Operator`; `values` on the grid of `sources`."""
        return self.operator(values)

    def takes(self, features: Tensor) -> Tensor:
        """The sources, in the dtype of `features`.

        Raises:
            UpbenchError: The features have another C: they are not of the backbone that the method runs.
        """
        if features.shape[1] != self.sources.shape[1]:
            raise UpbenchError(
                f"features have {features.shape[1]} channels, the backbone that the method runs has "
                f"{self.sources.shape[1]}"
            )
        return self.sources.to(features.dtype)

    def crop(self, rows: slice, cols: slice) -> SourcedOperator:
        """See `Operator`; the sources stay whole."""
        return SourcedOperator(self.sources, self.operator.crop(rows, cols))

    def to(self, *args: Any, **kwargs: Any) -> SourcedOperator:
        """See `Operator`; the sources are moved or cast, too."""
        return SourcedOperator(self.sources.to(*args, **kwargs), self.operator.to(*args, **kwargs))

    def nbytes(self) -> int:
        """Bytes of the sources and of the operator."""
        return self.sources.numel() * self.sources.element_size() + self.operator.nbytes()
