"""MACs against counts by hand: single operations, and whole methods from their architecture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.upsampler import MacCount
from upbench.cost.macs import HANDLERS, IGNORED, count_macs
from upbench.cost.measure import _macs
from upbench.ops.window.attention import window_attention
from upbench.ops.window.tables import fraction_table
from upbench.registry import find_method, plugins
from upbench.testing import MethodCase


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def count(function: Any, *shapes: tuple[int, ...]) -> MacCount:
    return count_macs(Lambda(function), *(torch.rand(shape) for shape in shapes))


OPERATIONS: dict[str, tuple[Any, list[tuple[int, ...]], int]] = {
    "matrix times batch": (lambda a, b: a @ b, [(7, 5), (2, 3, 5, 4)], 2 * 3 * 7 * 5 * 4),
    "batch times matrix": (lambda a, b: a @ b, [(2, 3, 7, 5), (5, 4)], 2 * 3 * 7 * 5 * 4),
    "matrix times vector": (lambda a, b: a @ b, [(7, 5), (5,)], 35),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)], 120),
    "baddbmm": (lambda a, b, c: torch.baddbmm(a, b, c), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
    "addmm": (torch.addmm, [(3, 5), (3, 4), (4, 5)], 60),
    "out=": (lambda a, b: torch.matmul(a, b, out=torch.empty(3, 5)), [(3, 4), (4, 5)], 60),
    "linear": (F.linear, [(6, 4), (5, 4), (5,)], 120),
    "einsum": (lambda a, b: torch.einsum("bchw,bkc->bkhw", a, b), [(2, 3, 4, 5), (2, 6, 3)], 2 * 3 * 20 * 6),
    "einsum that sums an index of one operand": (
        lambda a, b: torch.einsum("ab,ac->a", a, b),
        [(3, 4), (3, 5)],
        60,
    ),
    "einsum that permutes": (lambda a: torch.einsum("ab->ba", a), [(3, 4)], 0),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1], [0])), [(3, 4), (4, 5)], 60),
    "multiply and sum": (lambda a, b: (a * b).sum(1), [(3, 4, 5), (3, 4, 5)], 60),
    "plain sum": (lambda a: a.sum(1), [(3, 4)], 0),
    "addcmul": (lambda a, b, c: a.addcmul(b, c), [(3, 4)] * 3, 12),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), [(2, 4, 6, 5), (8, 4, 3, 3)], 2 * 30 * 8 * 36),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=4), [(1, 4, 6, 5), (8, 1, 1, 1)], 30 * 8),
    "padding='same'": (
        lambda x, w: F.conv2d(x, w, padding="same"),
        [(1, 4, 6, 5), (8, 4, 3, 3)],
        30 * 8 * 36,
    ),
    "transposed": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        [(1, 4, 6, 5), (4, 3, 2, 2)],
        30 * 4 * 3 * 4,
    ),
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 3, 10, 4), (2, 3, 7, 4), (2, 3, 7, 6)],
        2 * 3 * 10 * 7 * (4 + 6),
    ),
    "nearest": (lambda x: F.interpolate(x, (8, 9), mode="nearest-exact"), [(2, 3, 4, 5)], 2 * 3 * 72),
    "bilinear": (lambda x: F.interpolate(x, (8, 9), mode="bilinear"), [(2, 3, 4, 5)], 2 * 3 * 72 * 4),
    "bicubic": (lambda x: F.interpolate(x, (8, 9), mode="bicubic"), [(2, 3, 4, 5)], 2 * 3 * 72 * 16),
    "antialiased": (
        lambda x: F.interpolate(x, (4, 3), mode="bilinear", antialias=True),
        [(1, 2, 8, 12)],
        2 * (8 * 3 * 8 + 4 * 3 * 4),
    ),
    "average pooling": (lambda x: F.avg_pool2d(x, 3, 1, 1), [(1, 2, 6, 6)], 2 * 36 * 9),
    "adaptive pooling": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), [(1, 2, 6, 6)], 72),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(1, 4, 6, 6), (4,), (4,)], 144 * 5),
    "rms norm": (lambda x, w: F.rms_norm(x, (4,), w), [(3, 4), (4,)], 60),
    "inverse": (lambda x: torch.linalg.inv(x + 3 * torch.eye(3)), [(5, 3, 3)], 5 * 27),
    "solve": (lambda a, b: torch.linalg.solve(a + 3 * torch.eye(3), b), [(5, 3, 3), (5, 3, 2)], 5 * (9 + 18)),
    "cdist": (torch.cdist, [(2, 3, 4), (2, 5, 4)], 2 * 15 * 4),
    "softmax": (lambda x: x.softmax(1), [(3, 4)], 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str) -> None:
    function, shapes, expected = OPERATIONS[name]
    counted = count(function, *shapes)
    assert counted.total == expected
    assert counted.uncounted == ()


class Product(torch.autograd.Function):
    """A custom function of the older style."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scale = 2
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class SeparateProduct(torch.autograd.Function):
    """The same with `setup_context`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("not needed without gradients")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("function", [Product, SeparateProduct])
def test_custom_autograd_functions_count_as_what_they_do(function: Any) -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    counted = count(lambda a, b: function.apply(a, b), (3, 4), (4, 5))
    assert (counted.total, counted.uncounted) == (60, ())
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_loops_count_every_round() -> None:
    def chunks(a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(6, 5)
        for i in range(0, 6, 2):
            out[i : i + 2] = a[i : i + 2] @ b
        return out

    assert count(chunks, (6, 4), (4, 5)).total == 6 * 4 * 5


def test_unknown_operations_are_named() -> None:
    counted = count(lambda a: torch.linalg.svd(a)[0] @ a, (3, 3))
    assert counted.uncounted == ("aten::linalg_svd",)
    assert counted.total == 27


def test_nothing_is_both_counted_and_ignored() -> None:
    assert not set(HANDLERS) & IGNORED - {"aten::sum"}


Size = tuple[int, int]
GEOMETRIES = [  # image, features, output
    ((70, 84), (10, 12), (70, 84)),
    ((40, 50), (9, 10), (33, 45)),
    ((40, 50), (9, 10), (7, 30)),
    ((28, 28), (9, 10), (56, 56)),
]


def count_method(name: str, channels: int, image: Size, features: Size, output: Size) -> MacCount:
    case = MethodCase(find_method(name), channels=channels)
    inputs = torch.rand(1, 3, *image), torch.randn(1, channels, *features)
    counted, notes = _macs(case.method, inputs, output, case.backbone)
    assert counted is not None, notes
    return counted


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", sorted(plugins("method")))
def test_no_operation_of_a_method_goes_uncounted(name: str, geometry: tuple[Size, Size, Size]) -> None:
    counted = count_method(name, 16, *geometry)
    assert counted.uncounted == ()
    assert counted.total > 0


def raysup_by_hand(channels: int, image: Size, features: Size, output: Size) -> dict[str, float]:
    """From the description of the architecture: kernel areas 1, 3, 3, 4; 2, 1, 1, 1 blocks; 64 channels; 6x6
    window."""
    pixels = math.prod(image)
    conv = norm = 0
    for area, blocks in ((1, 2), (3, 1), (3, 1), (4, 1)):
        conv += area * 3 * 64 + blocks * 2 * area * 64 * 64
        norm += blocks * 2 * 64 * 5
    pools = 256 * pixels * (1 + (output != image))
    # every output pixel: 36 keys of 4 heads x 64, and 36 values of C channels
    return {
        "conv": conv * pixels,
        "group_norm": norm * pixels,
        "adaptive_avg_pool2d": pools,
        "bmm": math.prod(output) * 36 * (256 + channels),
    }


def cells_seen(size: int, cells: int) -> int:
    """AnyUp's window mask along an axis, summed over positions: a tenth of the axis on either side."""
    total = 0
    for i in range(size):
        p = np.float32(i + 0.5) / np.float32(size)
        low, high = (np.clip(p + np.float32(s * 0.1), 0, 1) * np.float32(cells) for s in (-1, 1))
        total += math.ceil(high) - math.floor(low)
    return total


def anyup_by_hand(channels: int, image: Size, features: Size, output: Size) -> dict[str, float]:
    """From the description of the architecture, width 128."""
    pixels, cells, queries = math.prod(image), math.prod(features), math.prod(output)
    square = 128 * 128
    blocks = 4 * square  # two residual blocks of two 1x1 convolutions
    conv = pixels * (3 * 128 + blocks)  # image encoder
    conv += 2 * pixels * (square + blocks)  # query and key encoders
    conv += cells * (channels * 128 * 25 + blocks)  # 5x5 filters on every channel
    conv += cells * (9 * 2 * square + blocks)  # aggregation
    conv += queries * (9 * square + square) + cells * square  # 3x3 on queries; projections
    norm = 4 * 128 * 5 * (3 * pixels + 2 * cells)
    pools = 128 * pixels * (1 + (output != image))
    window = cells_seen(output[0], features[0]) * cells_seen(output[1], features[1])
    return {
        "conv": conv,
        "group_norm": norm,
        "adaptive_avg_pool2d": pools,
        "bmm": window * (128 + channels),
    }


@pytest.mark.parametrize(
    ("name", "by_hand"), [("raysup", raysup_by_hand), ("anyup", anyup_by_hand)], ids=["raysup", "anyup"]
)
@pytest.mark.parametrize("geometry", [((112, 112), (8, 8), (112, 112)), ((84, 112), (6, 8), (84, 112))])
def test_equals_the_count_by_hand(name: str, by_hand: Any, geometry: tuple[Size, Size, Size]) -> None:
    counted = count_method(name, 384, *geometry)
    expected = by_hand(384, *geometry)
    assert counted.total == pytest.approx(sum(expected.values()), rel=0.02)
    for operation in ("group_norm", "adaptive_avg_pool2d"):
        assert counted.by_operator[operation] == expected[operation]


def test_masked_products_are_counted() -> None:
    """Queries of a tile share their cells: AnyUp's windows at 32 -> 448 cost up to half as much again."""
    table = fraction_table(448, 32, 0.1)
    counted = count(
        lambda q, k, v: window_attention(q, k, v, table, table, heads=1),
        (1, 4, 448, 448),
        *[(1, 4, 32, 32)] * 2,
    )
    held = cells_seen(448, 32) ** 2 * (4 + 4)
    assert held < counted.by_operator["bmm"] < 1.5 * held


def test_the_papers_gflops_of_raysup_are_twice_its_convolutions() -> None:
    """40.67 GFLOPs at 448: 2 x (MACs + bias additions) of the encoder, nothing else."""
    counted = count_method("raysup", 16, (56, 56), (8, 8), (56, 56))
    per_pixel = counted.by_operator["conv"] / 56**2
    biases = 64 * (4 + 2 * 5)  # four stems and five blocks of two convolutions
    assert 2 * (per_pixel + biases) * 448**2 / 1e9 == pytest.approx(40.67, abs=0.005)
