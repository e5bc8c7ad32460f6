"""Multiply-accumulates (MACs) of a forward pass, counted by fvcore with a handler for whatever has any.

What is counted follows fvcore, so that numbers are comparable with the ones that papers obtain from it:

* products: matrix products, convolutions, `einsum`, attention, linear solves; one multiply-add is one MAC. A
  product that is written as a multiplication followed by a sum is counted as well.
* interpolation: taps per output element (nearest 1, bilinear 4, bicubic 16); antialiased, both passes.
* average pooling: one per element that is read (adaptive pooling: one per element of its input).
* normalisation layers: 5 per element with affine parameters, 4 without (batch norm in eval mode 2 or 1).
* custom autograd functions and loops: as the operations they are made of.

Not counted, as in fvcore: elementwise arithmetic, activations, softmax, plain sums and means, comparisons,
and the movement of data (`IGNORED`). An operation that is in neither list is reported by name.

The numbers are those of the operations that were carried out, padding and masked positions included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from upbench.contracts.upsampler import MacCount

Handler = Callable[[list[Any], list[Any]], float]

_ELEMENTWISE = """
    abs add bitwise_and bitwise_or ceil celu clamp clamp_max clamp_min complex cos div dropout elu erf exp
    exp2 expm1 feature_dropout floor floor_divide fmod gelu glu hardsigmoid hardswish hardtanh isfinite isinf
    isnan le leaky_relu log log10 log1p log2 log_softmax logical_and logical_not logical_or logical_xor lt
    maximum minimum mish mul nan_to_num ne neg pow reciprocal relu6 round rsqrt rsub selu sgn sigmoid sign
    silu sin sinc softmax softplus sqrt square sub tan tanh threshold true_divide trunc where xlogy
    """


_REDUCTIONS = """
    adaptive_max_pool2d all amax amin any argmax argmin count_nonzero cumprod cumsum linalg_norm
    linalg_vector_norm logsumexp max_pool2d max_pool2d_with_indices mean min norm std std_mean var var_mean
    """


_DATA_MOVEMENT = """
    alias argsort as_strided broadcast_tensors bucketize clone diag diagonal diff empty_like empty_strided
    expand_as eye fill flip im2col index_add index_fill index_put index_select item lift lift_fresh linspace
    masked_select meshgrid movedim mT new_ones numel numpy_T one_hot ones_like pad pixel_shuffle
    pixel_unshuffle rand rand_like randint randn randn_like randperm reflection_pad1d reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
    resolve_conj scalar_tensor scatter scatter_add searchsorted sort swapaxes T take take_along_dim tile topk
    tril triu unflatten unfold unique unsafe_chunk unsafe_split view_as hstack vstack zero
    """


# Beside what fvcore itself ignores. A product of two operands with a sum after it is caught at the sum
# (`_sum`).
IGNORED = frozenset(
    f"aten::{name}{in_place}"
    for name in (_ELEMENTWISE + _REDUCTIONS + _DATA_MOVEMENT).split()
    for in_place in ("", "_")
)


def count_macs(model: nn.Module, *inputs: Tensor) -> MacCount:
    """Traces `model(*inputs)` once and counts.

    Args:
        model: In eval mode; its forward takes tensors only.
        inputs: At the sizes to be counted, on the model's device.

    Raises:
        Exception: Whatever tracing the model raises (Python control flow on traced values, for instance).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore and torch.jit warn of their own future
        from fvcore.nn import FlopCountAnalysis

        with torch.no_grad(), _unrolled_functions():
            analysis = FlopCountAnalysis(model, inputs)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            analysis.set_op_handle(**HANDLERS)  # type: ignore[arg-type]
            counted = analysis.by_operator()
            unknown = analysis.unsupported_ops()
    by_operator = {name: round(float(n)) for name, n in sorted(counted.items())}
    uncounted = tuple(sorted(name for name in unknown if name not in IGNORED))
    return MacCount(sum(by_operator.values()), by_operator, uncounted)


class _Context:
    """Stands in for the context of an autograd function whose backward will never run."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps nothing."""

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        """Does nothing."""


@contextmanager
def _unrolled_functions() -> Iterator[None]:
    """Lets custom autograd functions run as plain code; a trace shows each as one opaque operation
    otherwise."""
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        separate = any(
            "setup_context" in base.__dict__ for base in cls.__mro__[: cls.__mro__.index(function)]
        )
        return cls.forward(*args, **kwargs) if separate else cls.forward(_Context(len(args)), *args, **kwargs)

    function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        function.apply = original


def _shape(value: Any) -> list[int]:
    """Sizes of a traced tensor."""
    from fvcore.nn.jit_handles import get_shape

    shape: list[int] | None = get_shape(value)
    if shape is None:
        raise ValueError("an operand whose shape the trace does not know")
    return shape


def _integers(value: Any) -> list[int]:
    """A traced list of integers, or a single one."""
    if value.node().kind() == "prim::ListConstruct":
        return [int(v.toIValue()) for v in value.node().inputs()]
    constant = value.toIValue()
    return list(constant) if isinstance(constant, (list, tuple)) else [int(constant)]


def _matrix_product(inputs: list[Any], outputs: list[Any]) -> float:
    """Any product of two operands that contracts the last axis of the first; broadcasting included."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _added_product(inputs: list[Any], outputs: list[Any]) -> float:
    """`addmm`, `baddbmm`, `addmv`: the product's operands come second and third."""
    return prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _summed_product(inputs: list[Any], outputs: list[Any]) -> float:
    """`addbmm`: a batch of products, summed."""
    return prod(_shape(inputs[1])) * _shape(inputs[2])[-1]


def _einsum(inputs: list[Any], outputs: list[Any]) -> float:
    """Two operands: one MAC for every combination of their indices, unless nothing is multiplied."""
    from fvcore.nn.jit_handles import einsum_flop_jit

    equation = inputs[0].toIValue().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    shapes = [_shape(v) for v in inputs[1].node().inputs()]
    if len(terms) == 1:
        return 0.0  # a permutation or a sum
    if len(terms) > 2 or "." in equation:
        return float(einsum_flop_jit(inputs, outputs))
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return prod(sizes.values())


def _tensordot(inputs: list[Any], outputs: list[Any]) -> float:
    shape = _shape(inputs[0])
    return prod(_shape(outputs[0])) * prod(shape[d] for d in _integers(inputs[2]))


def _attention(inputs: list[Any], outputs: list[Any]) -> float:
    """`scaled_dot_product_attention`: queries by keys and weights by values; masked positions included."""
    q, k, v = (_shape(i) for i in inputs[:3])
    return prod(_shape(outputs[0])[:-1]) * k[-2] * (q[-1] + v[-1])


def _same_convolution(inputs: list[Any], outputs: list[Any]) -> float:
    """Convolution with `padding="same"` or "valid"."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _per_output(count: float) -> Handler:
    return lambda inputs, outputs: count * prod(_shape(outputs[0]))


def _antialiased(taps: int) -> Handler:
    """Two passes: columns at input height, then rows; `taps` where an axis grows, more where it shrinks."""

    def handler(inputs: list[Any], outputs: list[Any]) -> float:
        (b, c, h, w), (_, _, out_h, out_w) = _shape(inputs[0]), _shape(outputs[0])
        across, down = (ceil(taps * max(1.0, n / out)) for n, out in ((w, out_w), (h, out_h)))
        return b * c * (h * out_w * across + out_h * out_w * down)

    return handler


def _average_pool(inputs: list[Any], outputs: list[Any]) -> float:
    kernel = _integers(inputs[1])
    area = prod(kernel) if len(kernel) == len(_shape(outputs[0])) - 2 else kernel[0] ** 2
    return prod(_shape(outputs[0])) * area


def _adaptive_pool(inputs: list[Any], outputs: list[Any]) -> float:
    return max(prod(_shape(inputs[0])), prod(_shape(outputs[0])))


def _sum(inputs: list[Any], outputs: list[Any]) -> float:
    """A sum counts where it is the second half of a product: (a * b).sum(...)."""
    producer = inputs[0].node().kind()
    return prod(_shape(inputs[0])) if producer in ("aten::mul", "aten::mul_") else 0.0


def _solve(inputs: list[Any], outputs: list[Any]) -> float:
    """LU factorisation and two substitutions per right-hand side."""
    matrix, right = _shape(inputs[0]), _shape(inputs[1])
    n = matrix[-1]
    return prod(matrix[:-2]) * (n**3 / 3 + n * n * (right[-1] if len(right) == len(matrix) else 1))


def _matrix_power(factor: float) -> Handler:
    """`factor` n^3 for every n x n matrix."""

    def handler(inputs: list[Any], outputs: list[Any]) -> float:
        shape = _shape(inputs[0])
        return factor * prod(shape) * shape[-1]

    return handler


def _distances(inputs: list[Any], outputs: list[Any]) -> float:
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _rms_norm(inputs: list[Any], outputs: list[Any]) -> float:
    from fvcore.nn.jit_handles import norm_flop_counter

    return float(norm_flop_counter(2)(inputs, outputs))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(
        ("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::inner", "aten::linear"),
        _matrix_product,
    ),
    **dict.fromkeys(("aten::outer", "aten::ger", "aten::kron"), _per_output(1)),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmv"), _added_product),
    **dict.fromkeys(("aten::addbmm", "aten::addbmm_"), _summed_product),
    **dict.fromkeys(
        ("aten::addcmul", "aten::addcmul_", "aten::addcdiv", "aten::addcdiv_", "aten::lerp", "aten::lerp_"),
        _per_output(1),
    ),
    "aten::einsum": _einsum,
    "aten::tensordot": _tensordot,
    "aten::scaled_dot_product_attention": _attention,
    "aten::_convolution_mode": _same_convolution,
    **dict.fromkeys(("aten::upsample_nearest1d", "aten::upsample_nearest2d"), _per_output(1)),
    **dict.fromkeys(("aten::_upsample_nearest_exact1d", "aten::_upsample_nearest_exact2d"), _per_output(1)),
    "aten::upsample_linear1d": _per_output(2),
    "aten::upsample_bilinear2d": _per_output(4),
    "aten::upsample_bicubic2d": _per_output(16),
    "aten::_upsample_bilinear2d_aa": _antialiased(2),
    "aten::_upsample_bicubic2d_aa": _antialiased(4),
    **dict.fromkeys(("aten::grid_sampler", "aten::grid_sampler_2d"), _per_output(4)),
    **dict.fromkeys(("aten::avg_pool1d", "aten::avg_pool2d"), _average_pool),
    **dict.fromkeys(("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d"), _adaptive_pool),
    "aten::rms_norm": _rms_norm,
    "aten::sum": _sum,
    "aten::cdist": _distances,
    "aten::linalg_solve": _solve,
    **dict.fromkeys(("aten::linalg_inv", "aten::inverse"), _matrix_power(1.0)),
    **dict.fromkeys(("aten::linalg_cholesky", "aten::linalg_lu", "aten::linalg_det"), _matrix_power(1 / 3)),
}
