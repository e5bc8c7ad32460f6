"""Tiles against the whole output; files; bounded memory; refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import upbench.layers.guidance as guidance
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.dense.tiles import DEFAULT_BUDGET, upsample_tiles, upsample_to
from upbench.errors import UpbenchError
from upbench.ops.pooling import pool_part, pooled_span
from upbench.ops.separable import SeparableOperator
from upbench.registry import plugins
from upbench.testing import assert_close
from upbench.weights.load import load_method

SIZES = [  # image, features, output
    ((56, 70), (4, 5), (56, 70)),
    ((61, 45), (7, 6), (90, 101)),
    ((64, 64), (8, 8), (33, 20)),
    ((9, 7), (3, 3), (40, 41)),
]
SMALL = 1000  # bytes: nothing is kept


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks for images of a few pixels."""
    monkeypatch.setattr(guidance, "_LEAST", 150)
    monkeypatch.setattr(guidance, "_WIDEST", 17)


def inputs(image: tuple[int, int], features: tuple[int, int], batch: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, *image), torch.randn(batch, 8, *features)


def joined(method: Upsampler, image: Tensor, features: Tensor, size: tuple[int, int], **options) -> Tensor:
    head = options.get("project")
    out = torch.full((features.shape[0], features.shape[1] if head is None else len(head), *size), torch.nan)
    for rows, cols, values in upsample_tiles(method, image, features, size, **options):
        assert bool(out[:, :, rows, cols].isnan().all()), "tiles overlap"
        out[:, :, rows, cols] = values
    return out


def in_float64(
    method: Upsampler, image: Tensor, features: Tensor, size: tuple[int, int], **options
) -> Tensor:
    """The whole output, against which both the whole and the tiles of it in float32 are measured."""
    return copy.deepcopy(method).double()(image.double(), features.double(), size, **options)


def names() -> list[str]:
    return [name for name, cls in plugins("method").items() if not cls.uses_backbone]


# In float64 they are other functions: frequencies of e^10, and a fit whose steps amplify roundings.
SINGLE = {"loftup", "upsample_anything"}


@pytest.mark.parametrize("name", names())
def test_every_method_equals_its_forward(name: str):
    method = load_method(name, weights="none", channels=8)
    image, features = inputs((56, 42), (4, 3))
    head, bias = torch.randn(3, 8), torch.randn(3)

    def classified(dense: Tensor) -> Tensor:
        return torch.einsum("kc,bcij->bkij", head.to(dense), dense) + bias[:, None, None]

    with torch.no_grad():
        whole = method(image, features, (64, 50))
        exact = None if name in SINGLE else in_float64(method, image, features, (64, 50))
        tiles = joined(method, image, features, (64, 50), tile=(20, 17))
        projected = joined(method, image, features, (64, 50), tile=23, project=head, bias=bias)
    assert_close(tiles, whole, reference=exact)
    assert_close(projected, classified(whole), reference=None if exact is None else classified(exact))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("budget", [DEFAULT_BUDGET, SMALL])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["raysup", "anyup", "naf"])
def test_encodings_in_parts(name: str, sizes: tuple, budget: int):
    method = load_method(name, weights="none", channels=8)
    image, features = inputs(sizes[0], sizes[1], batch=2)
    with torch.no_grad():
        whole, exact = method(image, features, sizes[2]), in_float64(method, image, features, sizes[2])
    tiles = joined(method, image, features, sizes[2], tile=(19, 33), memory_budget=budget)
    assert_close(tiles, whole, reference=exact)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "dual", "position": "rope"},
        {"encoder": "multi", "position": "sinrays", "ray_coordinates": "plucker"},
    ],
)
def test_ablations_and_cameras(options: dict):
    method = load_method("raysup", weights="none", channels=8, **options)
    image, features = inputs((40, 52), (5, 6), batch=2)
    pose = torch.eye(4).repeat(2, 1, 1)
    pose[0, :3, 3] = torch.tensor([0.3, -0.2, 0.5])
    camera = Camera(torch.tensor([[50.0, 40.0, 25.0, 21.0], [60.0, 60.0, 27.0, 19.0]]), pose)
    with torch.no_grad():
        whole = method(image, features, (44, 60), camera=camera)
        camera64 = Camera(camera.intrinsics.double(), pose.double())
        exact = in_float64(method, image, features, (44, 60), camera=camera64)
    for budget in (DEFAULT_BUDGET, SMALL):
        tiles = joined(method, image, features, (44, 60), tile=25, memory_budget=budget, camera=camera)
        assert_close(tiles, whole, reference=exact)


def test_the_default_tile_follows_the_budget():
    method = load_method("bilinear", channels=8)
    image, features = inputs((32, 32), (4, 4))
    sizes = {}
    for budget in (DEFAULT_BUDGET, 4_000_000, SMALL):
        tiles = list(upsample_tiles(method, image, features, (300, 200), memory_budget=budget))
        sizes[budget] = [tuple(tile.values.shape[2:]) for tile in tiles]
    assert sizes[DEFAULT_BUDGET] == [(300, 200)]
    assert len(sizes[4_000_000]) > 1
    assert sizes[SMALL][0] == (32, 32)


def test_files(tmp_path: Path):
    method = load_method("raysup", channels=8)
    image, features = inputs((32, 48), (4, 6), batch=2)
    with torch.no_grad():
        whole = method(image, features, (30, 44)).numpy()
    for name, tile in (("squares", 16), ("rows", (7, 44))):
        path = tmp_path / f"{name}.npy"
        upsample_to(path, method, image, features, (30, 44), tile=tile)
        stored = np.load(path, mmap_mode="r")
        assert stored.dtype == np.float32
        assert_close(stored, whole)
    half = tmp_path / "half.npy"
    upsample_to(half, method, image, features, (30, 44), dtype="float16")
    assert_close(np.load(half), whole.astype(np.float64), terms=1)
    array = np.zeros_like(whole)
    upsample_to(array, method, image, features, (30, 44), tile=16)
    assert_close(array, whole)


def test_bfloat16_goes_to_float32_files(tmp_path: Path):
    method = load_method("raysup", channels=8).to(torch.bfloat16)
    image, features = (x.to(torch.bfloat16) for x in inputs((32, 32), (6, 6)))
    path = tmp_path / "features.npy"
    upsample_to(path, method, image, features, (32, 32), tile=20)
    with torch.no_grad():
        whole = method(image, features, (32, 32)).float().numpy()
    stored = np.load(path)
    assert stored.dtype == np.float32
    assert_close(stored, whole, terms=1, dtype=torch.bfloat16)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method = load_method("bilinear", channels=8)
    image, features = inputs((32, 32), (16, 16))
    crops = []
    crop = SeparableOperator.crop

    def fails(self: SeparableOperator, rows: slice, cols: slice) -> SeparableOperator:
        crops.append((rows, cols))
        if len(crops) > 2:
            assert list(tmp_path.iterdir()) != []  # it is being written
            raise KeyboardInterrupt
        return crop(self, rows, cols)

    monkeypatch.setattr(SeparableOperator, "crop", fails)
    with pytest.raises(KeyboardInterrupt):
        upsample_to(tmp_path / "x.npy", method, image, features, (32, 32), tile=16)
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_bounded():
    """1024 channels at 256 x 256 are 268 MB; streaming them takes a fraction of that."""
    code = """
import torch
from upbench import load_method, upsample_tiles
from upbench.cost.peakmemory import LINUX, _Meter
torch.set_num_threads(1)
method = load_method("raysup", channels=1024)
image, features = torch.rand(1, 3, 96, 96), torch.randn(1, 1024, 16, 16)
def run(size):
    for tile in upsample_tiles(method, image, features, (size, size), memory_budget=32 << 20):
        pass
run(64)
meter = _Meter()
run(256)
print(meter.how == LINUX, meter.peak())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    exact, peak = done.stdout.split()
    if exact != "True":
        pytest.skip("the system does not tell a process's peak memory")

    assert int(peak) < 130e6


def test_pooling_of_parts():
    x = torch.randn(2, 3, 37, 23)
    for size in ((37, 23), (5, 7), (80, 24), (36, 22), (37, 1), (111, 46)):
        whole = torch.nn.functional.adaptive_avg_pool2d(x, size)
        for rows, cols in (
            (slice(0, size[0]), slice(0, size[1])),
            (slice(size[0] // 3, size[0]), slice(0, 1)),
        ):
            spans = pooled_span(37, size[0], rows), pooled_span(23, size[1], cols)
            part = pool_part(x[:, :, spans[0], spans[1]], (37, 23), size, rows, cols)
            assert_close(part, whole[:, :, rows, cols])


def test_a_linear_method_without_an_operator_is_computed_as_a_whole(whole: Upsampler):
    image, features = inputs((32, 32), (4, 4))
    tiles = upsample_tiles(whole, image, features, (64, 64), tile=16)
    expected = whole(image, features, (64, 64))
    for rows, cols, values in tiles:
        assert_close(values, expected[:, :, rows, cols])
    with pytest.raises(UpbenchError, match=r"computes its output as a whole, 0\.03 GB for 8 channels"):
        upsample_tiles(whole, image, features, (1024, 1024), memory_budget=1_000_000)


@pytest.fixture
def whole() -> Iterator[Upsampler]:
    class Whole(Upsampler):
        name = "whole"
        linear = True

        def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
            return F.interpolate(features, output_size, mode="bilinear") * image.mean()

    yield Whole()
    del Upsampler.registered["whole"]


def test_refusals(tmp_path: Path):
    method = load_method("bilinear", channels=8)
    image, features = inputs((32, 32), (4, 4))
    head = torch.randn(3, 8)
    for message, options in (
        (r"projection must be \[K, 8\]", {"project": torch.randn(3, 7)}),
        (r"bias \[4\] does not go", {"project": head, "bias": torch.randn(4)}),
        (r"bias \[3\] does not go", {"bias": torch.randn(3)}),
        ("at least one pixel", {"tile": 0}),
        ("takes no camera", {"camera": Camera(torch.ones(1, 4))}),
    ):
        with pytest.raises(UpbenchError, match=message):
            upsample_tiles(method, image, features, (32, 32), **options)
    with pytest.raises(UpbenchError, match="got \\[2, 3, 32, 32\\] and \\[1, 8, 4, 4\\]"):
        upsample_tiles(method, image.repeat(2, 1, 1, 1), features, (32, 32))
    with pytest.raises(UpbenchError, match="output size must be"):
        upsample_tiles(method, image, features, (0, 32))
    with pytest.raises(UpbenchError, match=r"target is \[1, 8, 8, 8\], the output \[1, 8, 32, 32\]"):
        upsample_to(torch.zeros(1, 8, 8, 8), method, image, features, (32, 32))
    with pytest.raises(UpbenchError, match=r"to \.npy files"):
        upsample_to(tmp_path / "x.npz", method, image, features, (32, 32))
    with pytest.raises(UpbenchError, match="float16 or float32, not int8"):
        upsample_to(tmp_path / "x.npy", method, image, features, (32, 32), dtype="int8")
    with pytest.raises(UpbenchError, match="cannot write"):
        upsample_to(tmp_path / "none" / "x.npy", method, image, features, (32, 32))


def test_encoders_that_know_no_parts(monkeypatch: pytest.MonkeyPatch):
    method = load_method("raysup", channels=8)
    method.encoder.add_module("center", torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), torch.nn.Tanh()))
    image, features = inputs((32, 32), (4, 4))
    list(upsample_tiles(method, image, features, (32, 32)))
    with pytest.raises(UpbenchError, match="an encoder with Tanh cannot be computed in parts"):
        upsample_tiles(method, image, features, (32, 32), memory_budget=SMALL)
