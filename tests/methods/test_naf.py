"""NAF against the official outputs; positions, small maps, checkpoints, cost, gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.naf import NAF, _limited
from upbench.ops.operator import project
from upbench.testing import assert_close
from upbench.testing.closeness import allowed
from upbench.weights.load import load_method

ROUNDING = allowed(torch.float32)  # of averages of numbers below 1


def official(state: dict[str, Tensor], head: int = 64) -> dict[str, Tensor]:
    """A state of ours under the official key names, with the table of periods that is stored there."""
    names = {"pixel": "encoder", "context": "sem_encoder"}
    renamed = {"image_encoder.rope.periods": 100 ** (torch.arange(head // 4) / (head // 4))}
    for key, tensor in state.items():
        _, branch, rest = key.split(".", 2)
        renamed[f"image_encoder.{names[branch]}.{rest}"] = tensor
    return renamed


@pytest.fixture
def model() -> NAF:
    torch.manual_seed(0)
    return NAF(channels=16, dim=64).eval()


@pytest.mark.parametrize("case", range(1, 5))
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "naf"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        size = tuple(json.loads(file.metadata()["output_size"]))
    weights = load_file(folder / "case1.safetensors")
    state = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    method = load_method("naf", weights=state, channels=stored["features"].shape[1])
    with torch.inference_mode():
        output = method(stored["image"], stored["features"], size)
        operator = method.operator(stored["image"], stored["features"], size)
        whole = operator(project(torch.eye(method.channels), stored["features"], operator.groups))
        exact = method.double()(stored["image"].double(), stored["features"].double(), size)
    for found in (output, whole):
        assert_close(found, stored["output"], reference=exact)


def test_parameters_and_checkpoints(model: NAF) -> None:
    assert sum(p.numel() for p in NAF().parameters()) == 662_528
    state = official(model.state_dict(), 16)
    same = load_method("naf", weights=state, channels=16)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    other = NAF(dim=128, blocks=3)
    found = NAF.options_from(NAF.convert_state(official(other.state_dict(), 32)))
    assert found == {"dim": 128, "blocks": 3}
    lacking = {key: t for key, t in state.items() if "sem_encoder.1.norm2.bias" not in key}
    with pytest.raises(UpbenchError, match=r"lacks encoder\.context\.1\.norm2\.bias"):
        load_method("naf", weights=lacking, channels=16)
    with pytest.raises(UpbenchError, match="left over"):
        load_method("naf", weights={**state, "extra": torch.zeros(1)}, channels=16)
    with pytest.raises(UpbenchError, match="periods"):
        load_method("naf", weights={**state, "image_encoder.rope.periods": torch.ones(4)}, channels=16)


def test_files_as_they_are_published(model: NAF, tmp_path: Path) -> None:
    """A plain pickled state dict, also one of a model that was wrapped for several GPUs."""
    for name, prefix in (("naf_release.pth", ""), ("wrapped.pth", "module.")):
        torch.save({prefix + k: t for k, t in official(model.state_dict(), 16).items()}, tmp_path / name)
        loaded = load_method("naf", weights=tmp_path / name, channels=16)
        assert torch.equal(loaded.encoder["pixel"][0].weight, model.encoder["pixel"][0].weight)


def test_positions_turn_forwards(model: NAF) -> None:
    """A head of constant (1, 0) becomes the cosine and the sine of the angles themselves."""
    for branch in model.encoder.values():
        nn.init.zeros_(branch[-1].conv2.weight)
        bias = branch[-1].conv2.bias
        with torch.no_grad():
            bias.copy_((torch.arange(32) % 16 < 8).float())  # heads of 16: first half 1, second 0
    queries, _ = model.encode(torch.zeros(1, 3, 12, 20), (3, 4), (6, 10))
    y, x = 2 * 1.5 / 6 - 1, 2 * 7.5 / 10 - 1  # row 1, column 7
    angles = [2 * math.pi * place / 100 ** (m / 4) for place in (y, x) for m in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert_close(queries[0, :, 1, 7], torch.tensor(expected * 4))


def test_keys_are_pooled_after_the_rotation(model: NAF) -> None:
    queries, keys = model.encode(torch.randn(1, 3, 24, 32), (3, 4), (12, 16))
    assert_close(keys, F.avg_pool2d(queries, 4))


@pytest.mark.parametrize(
    ("image", "output", "expected"),
    [((160, 150), (33, 40), (132, 132)), ((132, 160), (33, 40), (132, 160)), ((50, 400), (20, 40), (50, 80))],
)
def test_large_images_are_resized_first(
    image: tuple[int, int], output: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Both axes by the smaller output side, as in the official code."""
    assert _limited(torch.zeros(1, 3, *image), output).shape[2:] == expected


@pytest.mark.parametrize(
    ("grid", "size"), [((3, 2), (30, 20)), ((1, 1), (9, 7)), ((8, 8), (4, 3)), ((12, 12), (5, 30))]
)
def test_maps_smaller_than_the_window(model: NAF, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """The window shrinks to the map; every output is an average of its values."""
    features = torch.rand(1, 16, *grid)
    output = model(torch.randn(1, 3, 28, 28), features, size)
    assert output.shape == (1, 16, *size)
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert ((output >= low - ROUNDING) & (output <= high + ROUNDING)).all()
    if grid == (1, 1):
        assert_close(output, features.expand(output.shape))


def test_a_window_of_one_cell_is_the_nearest_neighbour() -> None:
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 16, 6, 8)
    output = NAF(dim=64, kernel_size=1).eval()(image, features, (42, 56))
    assert_close(output, F.interpolate(features, (42, 56), mode="nearest-exact"))


@pytest.mark.parametrize("options", [{"dim": 100}, {"dim": 0}, {"kernel_size": 0}, {"blocks": 0}])
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UpbenchError, match="naf"):
        NAF.build(**options)


def expected_macs(image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """By hand, for whole ratios and one image; what is counted is told in `upbench.cost.macs`."""
    pixels, low, high = (a * b for a, b in (image, grid, size))
    encoder = sum(taps * (3 * 128 + 4 * 128 * 128) + 4 * 5 * 128 for taps in (1, 9))
    pooling = 256 * (max(pixels, high) * (size != image) + max(high, low) * (size != grid))
    rotation = 256 * high  # one addcmul per channel
    attention = high * 9 * 9 * (256 + channels)
    return pixels * encoder + pooling + rotation + attention


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [((90, 108), (10, 12), (90, 108)), ((60, 60), (10, 10), (120, 120)), ((120, 120), (10, 10), (60, 60))],
)
def test_macs_equal_a_hand_count(
    image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    """The smallest tile is a cell's pixels, so that no masked position is counted."""
    method = NAF(channels=16).eval()
    counted = count_macs(_Bound(method, size), torch.randn(1, 3, *image), torch.randn(1, 16, *grid))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected_macs(image, grid, size, 16), rel=0.02)


@pytest.mark.parametrize("dim", [64, 256])
def test_random_weights_begin_close_to_bilinear_interpolation(dim: int) -> None:
    """What the initial bias is for: without it, attention begins as a box over the whole window."""
    fine = F.interpolate(torch.randn(1, 8, 6, 6), (32, 32), mode="bicubic")
    coarse = F.adaptive_avg_pool2d(fine, 16)
    method = load_method("naf", "none", channels=8, dim=dim)
    image = method.normalize(F.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear"))

    def error() -> float:
        with torch.no_grad():
            return float((method(image, coarse, (32, 32)) - fine).square().mean())

    ours = error()
    for branch in method.encoder.values():
        nn.init.zeros_(branch[-1].conv2.bias)
    assert ours < 0.25 * error()
