"""jbu and guided_filter against loops over the papers' formulas."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.ops.resample import resize_guidance
from upbench.registry import find_method
from upbench.testing import assert_close

SIZES = [(12, 15), (13, 17), (3, 4), (18, 3)]  # integer, odd, smaller, mixed


def jbu_reference(
    image: Tensor, features: Tensor, size: tuple[int, int], radius: int, spatial: float, colour: float
) -> Tensor:
    """Kopf et al. 2007, pixel by pixel, in float64."""
    grid = (features.shape[-2], features.shape[-1])
    high, low = resize_guidance(image, size).double(), resize_guidance(image, grid).double()
    wide = [max(1.0, n / out) for n, out in zip(grid, size, strict=True)]
    reach = [math.ceil(radius * s) for s in wide]
    out = torch.zeros(*features.shape[:2], *size, dtype=torch.float64)
    for i in range(size[0]):
        for j in range(size[1]):
            p = [(i + 0.5) * grid[0] / size[0], (j + 0.5) * grid[1] / size[1]]
            total = torch.zeros(features.shape[0], dtype=torch.float64)
            for y in range(grid[0]):
                for x in range(grid[1]):
                    if abs(y - math.floor(p[0])) > reach[0] or abs(x - math.floor(p[1])) > reach[1]:
                        continue
                    near = sum(
                        (a - b - 0.5) ** 2 / (2 * (spatial * s) ** 2)
                        for a, b, s in zip(p, (y, x), wide, strict=True)
                    )
                    alike = (high[:, :, i, j] - low[:, :, y, x]).square().sum(1) / (2 * colour**2)
                    weight = torch.exp(-near - alike)
                    out[:, :, i, j] += weight[:, None] * features[:, :, y, x].double()
                    total += weight
            out[:, :, i, j] /= total[:, None]
    return out


def guided_reference(
    image: Tensor, features: Tensor, size: tuple[int, int], radius: int, eps: float
) -> Tensor:
    """He et al. 2010 with every window fitted by least squares, in float64; only the resizes are shared."""
    batch, channels, h, w = features.shape
    high, low = resize_guidance(image, size).double(), resize_guidance(image, (h, w)).double()
    fits = torch.zeros(batch, channels, 4, h, w, dtype=torch.float64)

    def window(y: int, x: int) -> tuple[slice, slice]:
        return (
            slice(max(0, y - radius), min(h, y + radius + 1)),
            slice(max(0, x - radius), min(w, x + radius + 1)),
        )

    for b in range(batch):
        for y in range(h):
            for x in range(w):
                rows, cols = window(y, x)
                colours = low[b, :, rows, cols].reshape(3, -1).T
                design = torch.cat([colours, torch.ones(len(colours), 1, dtype=torch.float64)], 1)
                # min sum |a.J + b - p|^2 + N eps |a|^2, its normal equations
                ridge = len(colours) * eps * torch.diag(torch.tensor([1.0, 1, 1, 0], dtype=torch.float64))
                targets = features[b, :, rows, cols].reshape(channels, -1).double().T
                fits[b, :, :, y, x] = torch.linalg.solve(design.T @ design + ridge, design.T @ targets).T
    averaged = torch.zeros_like(fits)
    for y in range(h):
        for x in range(w):
            rows, cols = window(y, x)
            averaged[..., y, x] = fits[..., rows, cols].flatten(3).mean(3)
    shrinks = h > size[0] or w > size[1]
    dense = F.interpolate(averaged.flatten(1, 2), size, mode="bilinear", antialias=shrinks)
    dense = dense.reshape(batch, channels, 4, *size)
    return (dense[:, :, :3] * high[:, None]).sum(2) + dense[:, :, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"radius": 1, "sigma_spatial": 0.5, "sigma_range": 0.3}])
def test_jbu_matches_the_formula(size: tuple[int, int], options: dict[str, Any]) -> None:
    image, features = torch.rand(2, 3, 14, 20), torch.randn(2, 4, 6, 5)
    method: Any = find_method("jbu").build(**options)
    out = method(image, features, size)
    expected = jbu_reference(image, features, size, method.radius, method.sigma_spatial, method.sigma_range)
    assert_close(out, expected, terms=1024)  # exponents of up to 50 amplify roundings


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("radius", "eps"), [(1, 0.01), (2, 0.1)])
def test_guided_filter_matches_the_formula(size: tuple[int, int], radius: int, eps: float) -> None:
    image, features = torch.rand(2, 3, 14, 20), torch.randn(2, 35, 6, 5)  # more channels than one chunk
    out = find_method("guided_filter").build(radius=radius, eps=eps)(image, features, size)
    expected = guided_reference(image, features, size, radius, eps)
    assert_close(out, expected)


@pytest.mark.parametrize("name", ["jbu", "guided_filter"])
def test_keeps_constants(name: str) -> None:
    out = find_method(name).build()(torch.rand(1, 3, 20, 20), torch.full((1, 2, 5, 5), 3.0), (20, 20))
    assert_close(out, torch.full_like(out, 3.0))


@pytest.mark.parametrize("name", ["jbu", "guided_filter"])
def test_is_sharper_than_bilinear_at_an_edge_of_the_image(name: str) -> None:
    """A step in colour that lies inside a cell is found in the output, where bilinear ramps over cells."""
    truth = torch.zeros(1, 1, 48, 48)
    truth[..., 21:] = 1
    image = 0.2 + 0.6 * truth.expand(1, 3, 48, 48)
    features = F.adaptive_avg_pool2d(truth, 6)
    error = {
        n: float((find_method(n).build()(image, features, (48, 48)) - truth).abs().mean())
        for n in (name, "bilinear")
    }
    assert error[name] < 0.6 * error["bilinear"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jbu", {"radius": 0}),
        ("jbu", {"sigma_range": 0.0}),
        ("jbu", {"sigma_spatial": -1.0}),
        ("guided_filter", {"eps": 0.0}),
        ("guided_filter", {"radius": 0}),
    ],
)
def test_refuses_options_out_of_range(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UpbenchError, match=next(iter(options))):
        find_method(name).build(**options)


def test_the_guided_filters_operator_is_kept_whole_and_precise() -> None:
    """A run halves operators, or puts them into files, where memory is short."""
    torch.manual_seed(0)
    image, features = torch.rand(1, 3, 56, 42), torch.randn(1, 5, 4, 3)
    operator = find_method("guided_filter")().operator(image, features, (56, 42))
    assert operator is not None
    assert operator.nbytes() > 3 * 56 * 42 * 4
    file = io.BytesIO()
    torch.save(operator.to(torch.float16), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_close(again(features[:, None]), operator(features[:, None]))
