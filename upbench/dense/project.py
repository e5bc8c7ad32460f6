"""A linear probe applied through operators, for a batch of frames that each have their own.

    low-resolution features  [b, C, h, w]  ──W──►  [b, groups, K, h, w]  ──operator──►  [b, K, H, W]

W comes first, as it commutes with the operator: K numbers a pixel are upsampled instead of C. The K outputs
    at the
output's size are by far the largest tensors of a training, so that the number of passes over them is what
counts: every operator's result is copied once, into its place in the batch, and the bias is added on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from upbench.contracts.operator import Operator
from upbench.dense.method import OPERATOR, sound
from upbench.ops.operator import project


@dataclass(frozen=True)
class Part:
    """Frames that share an operator, or dense features.

    Attributes:
        places: Where in the batch they stand.
        view: From the features to the output: an `Operator`, or dense features `[b, C, H, W]`.
        features: `[b, C, h, w]` float32.
    """

    places: Sequence[int]
    view: Operator | Tensor
    features: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the output."""
        if isinstance(self.view, Operator):
            return self.view.output_size
        return int(self.view.shape[-2]), int(self.view.shape[-1])

    def outputs(self, weight: Tensor) -> Tensor:
        """`[b, K, H, W]` of a probe without bias: `[K, C]`, or `[b, K, C]`.

        Raises:
            UpbenchError: The operator gives something else.
        """
        if not isinstance(self.view, Operator):
            dense = self.view.to(weight.dtype)
            made: Tensor = (weight @ dense.flatten(2)).unflatten(2, dense.shape[2:])
            return made
        features = self.view.takes(self.features)
        rows, cols, view = self.view.narrowed()
        made = view(project_each(weight, features[:, :, rows, cols], view.groups))
        return sound(made, features, (len(features), weight.shape[-2], *self.size), OPERATOR)


def project_each(weight: Tensor, features: Tensor, groups: int) -> Tensor:
    """`project`, with one probe for all frames (`[K, C]`) or one for each (`[b, K, C]`)."""
    if weight.ndim == 2:
        return project(weight, features, groups)
    b, c, h, w = features.shape
    k = weight.shape[1]
    grouped = features.reshape(b, groups, c // groups, h * w)
    split = weight.reshape(b, k, groups, c // groups).transpose(1, 2)
    return (split @ grouped).reshape(b, groups, k, h, w)


def project_parts(parts: Sequence[Part], count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A probe's outputs for a batch; differentiable with respect to weight and bias.

    Args:
        parts: Of the batch; together they have every place once.
        count: B, how many frames there are.
        weight: `[K, C]`, or `[B, K, C]`.
        bias: `[K]`, `[B, K]`, or None.

    Returns:
        `[B, K, H, W]` with the largest H and W; zeros beyond a smaller frame.
    """
    each = weight if weight.ndim == 3 else weight.expand(count, *weight.shape)
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(count, *bias.shape)
    tracked = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not tracked:
        return _gathered(parts, count, each, bias)
    result: Tensor = _Projection.apply(list(parts), count, each, bias)
    return result


def _gathered(parts: Sequence[Part], count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor | None = None
    for part in parts:
        made = part.outputs(_of(weight, part.places))
        out = _placed(out, made, part, parts, count, bias)
    assert out is not None
    return out


def _of(values: Tensor, places: Sequence[int]) -> Tensor:
    """Rows of a batch; a view where they are neighbours."""
    first, last = places[0], places[-1]
    if list(places) == list(range(first, last + 1)):
        return values[first : last + 1]
    return torch.stack([values[place] for place in places])


def _placed(
    out: Tensor | None, made: Tensor, part: Part, parts: Sequence[Part], count: int, bias: Tensor | None
) -> Tensor:
    """Copies a part's outputs to their places, with the bias."""
    if out is None:
        height, width = max(p.size[0] for p in parts), max(p.size[1] for p in parts)
        ragged = any(p.size != (height, width) for p in parts)
        shape = (count, int(made.shape[1]), height, width)
        out = made.new_zeros(shape) if ragged else made.new_empty(shape)
    (h, w), places = part.size, part.places
    for row, place in enumerate(places):
        target = out[place, :, :h, :w]
        if bias is None:
            target.copy_(made[row])
        else:
            torch.add(made[row], bias[place][:, None, None], out=target)
    return out


class _Projection(torch.autograd.Function):
    """`_gathered` with gradients: the graph of each part is made inside, and its large result let go of."""

    @staticmethod
    def forward(ctx: Any, parts: list[Part], count: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor | None = None
        edges: list[tuple[Part, Tensor, GradientEdge]] = []
        for part in parts:
            own = _of(weight, part.places).detach().requires_grad_()
            with torch.enable_grad():
                made = part.outputs(own)
            edges.append((part, own, get_gradient_edge(made)))
            out = _placed(out, made.detach(), part, parts, count, None if bias is None else bias.detach())
            del made
        assert out is not None
        ctx.edges, ctx.shape, ctx.has_bias = edges, weight.shape, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor | None]:
        grad = grads[0]
        weight = grad.new_zeros(ctx.shape)
        bias = grad.new_zeros(ctx.shape[:2]) if ctx.has_bias else None
        for part, own, edge in ctx.edges:
            (h, w), places = part.size, list(part.places)
            incoming = _of(grad, places)[:, :, :h, :w]  # what is beyond a smaller frame is no output
            (found,) = torch.autograd.grad((edge,), (own,), (incoming,))
            sums = incoming.sum((2, 3)) if bias is not None else None
            for row, place in enumerate(places):  # a list as an index would have to wait for the device
                weight[place] = found[row]
                if bias is not None and sums is not None:
                    bias[place] = sums[row]
        ctx.edges = None
        return None, None, weight, bias
