"""Upsample Anything against the official outputs and against its definition, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.methods.upsample_anything import UpsampleAnything, fit, kernels_of, pull_back
from upbench.ops import gaussians
from upbench.ops.gaussians import GaussianOperator, chunks, reconstruction
from upbench.ops.resample import resize
from upbench.testing import assert_close
from upbench.testing.closeness import relative_error

MAPS = ("sx_raw", "sy_raw", "th_raw", "sr_raw")  # official names, in our order


def golden(golden_dir: Path, case: int) -> dict[str, Tensor]:
    return load_file(golden_dir / "upsample_anything" / f"case{case}.safetensors")


def render(image: Tensor, features: Tensor, maps: Tensor) -> Tensor:
    return GaussianOperator([kernels_of(image[0], maps)])(features.unsqueeze(1))


@pytest.mark.parametrize(("case", "prefix"), [(1, "weights"), (2, "weights"), (3, "final")])
def test_golden_render(golden_dir: Path, case: int, prefix: str) -> None:
    stored = golden(golden_dir, case)
    maps = torch.cat([stored[f"{prefix}.{name}"][0] for name in MAPS])
    output = render(stored["image"], stored["features"], maps)
    exact = render(stored["image"].double(), stored["features"].double(), maps.double())
    # Distances come from products of coordinates, whose parts cancel: less exact than differences.
    assert_close(output, stored["output"], reference=exact, times=16)


def test_golden_optimisation(golden_dir: Path) -> None:
    stored = golden(golden_dir, 3)
    image, features = stored["image"], stored["features"]
    start = UpsampleAnything(steps=0)
    exact = start(image.double(), features.double(), (64, 64))
    assert_close(start(image, features, (64, 64)), stored["output_before_optimisation"], reference=exact)
    losses = fit(image[0], (8, 8)).losses
    assert_close(losses[0], stored["loss"][0])
    assert relative_error(losses, stored["loss"]) < 0.02  # steps amplify what is rounded before
    output = UpsampleAnything()(image, features, (64, 64))
    assert (output - stored["output"]).abs().mean() < 0.03


def photo(height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """`[3, height, width]` smooth noise with an edge."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1)
    image[:, :, width // 3 :] *= 0.5
    return image.to(dtype)


def random_maps(h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard deviations from half a pixel, where the reach is 1 cell, to several."""
    maps = torch.rand(4, h, w, dtype=dtype)
    maps[:2] = maps[:2] * 2.5 - 0.7
    maps[2] = maps[2] * 3 - 1.5
    maps[3] = maps[3] - 2.5
    return maps


def by_definition(image: Tensor, cells: Tensor, maps: Tensor) -> Tensor:
    """Pixel by pixel, offset by offset, straight from the formulas; differentiable in `maps`."""
    (h, w), (_, height, width) = maps.shape[1:], image.shape
    s = height // h
    sx, sy, sr = (maps[i].exp().clamp_min(1e-6) for i in (0, 1, 3))
    theta = torch.pi * torch.tanh(maps[2])
    guide = F.interpolate(image[None], (h, w), mode="bilinear")[0]
    widest = torch.maximum(sx, sy).detach()[None, None]
    reach = (2 * F.interpolate(widest, (height, width), mode="bilinear")[0, 0]).ceil().clamp(1, 8)
    pixels = []
    for y in range(height):
        for x in range(width):
            centre = [round((p + 0.5) / s - 0.5) for p in (y, x)]
            seen = []
            for dy in range(-8, 9):
                for dx in range(-8, 9):
                    if dy * dy + dx * dx <= float(reach[y, x]) ** 2:
                        cell = (centre[0] + dy, centre[1] + dx)
                        seen.append([min(max(p, 0), n - 1) for p, n in zip(cell, (h, w), strict=True)])
            u, v = torch.tensor(seen).T
            ex, ey = x - ((v + 0.5) * s - 0.5), y - ((u + 0.5) * s - 0.5)
            cos, sin = theta[u, v].cos(), theta[u, v].sin()
            along, across = ex * cos + ey * sin, ey * cos - ex * sin
            colour = (image[:, y, x, None] - guide[:, u, v]).square().sum(0)
            logits = (
                -(along**2) / (2 * sx[u, v] ** 2 + 1e-8)
                - across**2 / (2 * sy[u, v] ** 2 + 1e-8)
                - colour / (2 * sr[u, v] ** 2 + 1e-8)
            )
            pixels.append(cells[:, u, v] @ logits.softmax(0))
    return torch.stack(pixels, 1).view(-1, height, width)


@pytest.mark.parametrize("wide", [False, True])
def test_weights_and_their_gradient_by_definition(wide: bool) -> None:
    """Clamped offsets count again, the reach follows the width; the gradient is autograd's."""
    image, maps = photo(6, 10, torch.float64), random_maps(3, 5)
    if wide:
        maps[:2] += 2.5  # as in most fits: everything within 8 cells is seen
    kernels = kernels_of(image, maps)
    assert (kernels.reach is None) == wide
    source = F.interpolate(image[None], (3, 5), mode="bicubic")[0]

    learned = maps.clone().requires_grad_()
    rebuilt = by_definition(image, source, learned)
    expected = (rebuilt - image).abs().mean()
    expected.backward()  # type: ignore[no-untyped-call]

    rendered = GaussianOperator([kernels])(source[None, None])[0]
    single = {"terms": 1, "dtype": torch.float32}  # some constants are rounded to it
    assert_close(rendered, rebuilt.detach(), **single)
    loss, gradient = reconstruction(kernels, source, tuple(chunks(kernels)))
    assert_close(loss, expected.detach(), **single)
    assert_close(pull_back(maps, gradient), learned.grad, **single)


def test_widths_that_are_clamped_have_no_gradient() -> None:
    maps = random_maps(2, 2)
    maps[0, 0, 0], maps[3, 1, 1] = -20.0, -20.0
    pulled = pull_back(maps, torch.ones(4, 2, 2, dtype=torch.float64))
    assert pulled[0, 0, 0] == pulled[3, 1, 1] == 0
    assert pulled[0, 1, 1] != 0


@pytest.mark.parametrize("narrow", [False, True])
def test_chunks_and_crops_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, narrow: bool) -> None:
    """A grid larger than the disc, so that windows of every size occur."""
    image, values = photo(38, 44), torch.randn(1, 1, 3, 19, 22)
    maps = random_maps(19, 22, torch.float32) + (0 if narrow else 3)
    operator = GaussianOperator([kernels_of(image, maps)])
    whole = operator(values)
    part = operator.crop(slice(3, 36), slice(7, 40)).crop(slice(2, 30), slice(0, 20))
    assert part.output_size == (28, 20)
    assert_close(part(values), whole[:, :, 5:33, 7:27])
    monkeypatch.setitem(gaussians._BUDGET, "cpu", 1)  # one block at a time
    assert_close(operator(values), whole)


def test_operator_is_small_and_keeps_its_precision() -> None:
    image = photo(64, 64)
    operator = UpsampleAnything(steps=1).operator(image[None], torch.zeros(1, 1, 8, 8), (64, 64))
    assert isinstance(operator, GaussianOperator)
    assert operator.nbytes() < 2 * image.nbytes
    values = torch.randn(1, 1, 2, 8, 8)
    assert_close(operator.to(torch.float16)(values), operator(values))
    with pytest.raises(UpbenchError, match="operator takes"):
        operator(values[..., :5])


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        image, features = photo(24, 32)[None], torch.randn(1, 4, 3, 4)
        inside = UpsampleAnything(steps=3)(image, features, (24, 32))
    outside = UpsampleAnything(steps=3)(image.clone(), features.clone(), (24, 32))
    assert_close(inside.clone(), outside)


def test_other_sizes_take_the_next_whole_ratio() -> None:
    """30 x 44 from 7 x 9 is native at 35 x 45; the image is brought there, the output resized from there."""
    method, features = UpsampleAnything(steps=2), torch.randn(1, 4, 7, 9)
    image = photo(35, 45)[None]
    native = method(image, features, (35, 45))
    assert_close(method(image, features, (30, 44)), resize(native, (30, 44), "bilinear"))
    smaller = method(image, features, (3, 20))
    assert_close(smaller, resize(method(image, features, (21, 27)), (3, 20), "bilinear"))


def test_fit_rebuilds_the_image_better_and_follows_its_edges() -> None:
    """Features are a function of the colour; an upsampler that sees the edges is nearer to them."""
    image = photo(64, 64)
    losses = fit(image, (8, 8)).losses
    assert losses[-1] < 0.8 * losses[0]
    truth = torch.stack([image[0], image[1] - image[2], image.sum(0).cos()])[None]
    features = F.avg_pool2d(truth, 8)
    error = (UpsampleAnything()(image[None], features, (64, 64)) - truth).abs().mean()
    bilinear = (F.interpolate(features, (64, 64), mode="bilinear") - truth).abs().mean()
    assert error < 0.8 * bilinear


def test_refused_options() -> None:
    for options in ({"steps": -1}, {"lr": 0.0}):
        with pytest.raises(UpbenchError, match="upsample_anything"):
            UpsampleAnything.build(**options)


def test_macs_are_those_of_every_step() -> None:
    """By hand: a 3 x 3 grid lies within one disc, so that each of the pixels sees all nine cells."""
    image, features = photo(12, 12)[None], torch.randn(1, 7, 3, 3)
    pairs = 12 * 12 * 9
    for steps in (0, 4):
        counted = UpsampleAnything(steps=steps).macs(image, features, (12, 12))
        assert counted.total == pairs * (steps * (10 + 4 + 4 + 10) + 10 + 7)
        assert f"{steps} steps" in counted.note
