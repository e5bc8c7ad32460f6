"""nearest, bilinear, bicubic and lanczos against loops over their formulas, PyTorch and Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upbench.ops.resample import interpolation_matrix, lanczos_matrix, resize, resize_guidance
from upbench.registry import find_method
from upbench.testing import assert_close
from upbench.testing.closeness import relative_error

NAMES = ["nearest", "bilinear", "bicubic", "lanczos"]
SIZES = [
    (15, 28),
    (13, 17),
    (3, 5),
    (20, 4),
    (5, 7),
    (3, 1),
    (1, 1),
]  # integer, odd, smaller, mixed, same, one


def _nearest(i: int, size: int, out: int) -> dict[int, float]:
    return {math.floor((i + 0.5) * size / out): 1.0}


def _windowed(
    kernel: Callable[[float], float], support: float
) -> Callable[[int, int, int], dict[int, float]]:
    """Weights of a kernel that widens where the axis shrinks, cut off at the border and renormalised."""

    def weights(i: int, size: int, out: int) -> dict[int, float]:
        scale = size / out
        width = max(scale, 1.0)
        raw = {}
        for j in range(size):
            t = (j + 0.5 - (i + 0.5) * scale) / width
            if abs(t) < support:
                raw[j] = kernel(t)
        total = sum(raw.values())
        return {j: value / total for j, value in raw.items()}

    return weights


def _cubic(a: float) -> Callable[[float], float]:
    def kernel(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    return kernel


def _bicubic(i: int, size: int, out: int) -> dict[int, float]:
    if out < size:
        return _windowed(_cubic(-0.5), 2)(i, size, out)
    y = (i + 0.5) * size / out - 0.5
    weights: dict[int, float] = {}
    for j in range(math.floor(y) - 1, math.floor(y) + 3):
        cell = min(max(j, 0), size - 1)  # the border is repeated, not cut
        weights[cell] = weights.get(cell, 0.0) + _cubic(-0.75)(y - j)
    return weights


def _lanczos_kernel(t: float) -> float:
    if t == 0:
        return 1.0
    x = math.pi * t
    return math.sin(x) / x * math.sin(x / 3) / (x / 3)


AXIS = {
    "nearest": _nearest,
    "bilinear": _windowed(lambda t: 1 - abs(t), 1),
    "bicubic": _bicubic,
    "lanczos": _windowed(_lanczos_kernel, 3),
}


def reference(name: str, features: Tensor, output_size: tuple[int, int]) -> Tensor:
    """The method, pixel by pixel, in float64."""
    h, w = features.shape[-2:]
    out = torch.zeros(*features.shape[:2], *output_size, dtype=torch.float64)
    for i in range(output_size[0]):
        for j in range(output_size[1]):
            for a, wa in AXIS[name](i, h, output_size[0]).items():
                for b, wb in AXIS[name](j, w, output_size[1]).items():
                    out[:, :, i, j] += wa * wb * features[:, :, a, b].double()
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_the_formula(name: str, size: tuple[int, int]) -> None:
    features = torch.randn(2, 3, 5, 7)
    out = find_method(name).build()(torch.rand(2, 3, 9, 9), features, size)
    assert_close(out, reference(name, features, size))


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_equals_torch_where_it_grows(name: str) -> None:
    features = torch.randn(1, 4, 6, 5)
    out = find_method(name).build()(torch.rand(1, 3, 9, 9), features, (17, 23))
    assert torch.equal(out, F.interpolate(features, (17, 23), mode=name, align_corners=False))


# Where an axis grows, bicubic is PyTorch's (a = -0.75, border repeated), which differs from Pillow's.
PILLOW = [(name, size) for name in ("bilinear", "lanczos") for size in ((9, 11), (4, 30), (40, 50))]


@pytest.mark.parametrize(("name", "size"), [*PILLOW, ("bicubic", (9, 11))])
def test_equals_pillow(name: str, size: tuple[int, int]) -> None:
    features = torch.randn(1, 1, 21, 26)
    picture = Image.fromarray(features[0, 0].numpy())
    expected = np.asarray(picture.resize(size[::-1], Image.Resampling[name.upper()]))
    out = find_method(name).build()(torch.rand(1, 3, 9, 9), features, size)
    assert_close(out[0, 0].numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_constants_and_half_types(name: str) -> None:
    constant = torch.full((1, 2, 6, 7), 3.25, dtype=torch.bfloat16)
    for size in [(13, 20), (4, 5)]:
        out = find_method(name).build()(torch.rand(1, 3, 9, 9), constant, size)
        assert out.dtype == torch.bfloat16
        assert relative_error(out, constant.new_full(out.shape, 3.25)) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_matrix_rows_sum_to_one(mode: str) -> None:
    for size, out in [(5, 12), (12, 5), (7, 7), (1, 4), (4, 1)]:
        matrix = interpolation_matrix(size, out, mode)  # type: ignore[arg-type]
        assert matrix.shape == (out, size)
        assert_close(matrix.sum(1), torch.ones(out))
        assert_close(lanczos_matrix(size, out).sum(1), torch.ones(out))


def test_resize_returns_a_copy() -> None:
    features = torch.randn(1, 2, 4, 4)
    for mode in ("nearest", "bilinear", "bicubic"):
        out = resize(features, (4, 4), mode)  # type: ignore[arg-type]
        assert torch.equal(out, features)
        assert out.data_ptr() != features.data_ptr()


def test_guidance_is_averaged_where_it_shrinks() -> None:
    image = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert resize_guidance(image, (2, 3))[0, 0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    mixed = resize_guidance(image, (2, 12))
    expected = F.interpolate(F.avg_pool2d(image, (2, 1)), (2, 12), mode="bilinear")
    assert_close(mixed, expected)
    assert resize_guidance(image, (4, 6)) is image
