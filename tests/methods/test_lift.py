"""LiFT against the official outputs; repetition, other sizes, checkpoints, cost, gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.lift import LiFT
from upbench.testing import assert_close
from upbench.weights.load import load_method


@pytest.fixture
def model() -> LiFT:
    """With running statistics that are not those of a fresh batch norm."""
    torch.manual_seed(0)
    model = LiFT(channels=16)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 64), torch.randn(2, 16, 4, 4), (8, 8))
    return model.eval()


@pytest.mark.parametrize("case", range(1, 5))
def test_golden(golden_dir: Path, case: int) -> None:
    """Patches of 16 and 8 pixels (no adaptive pooling there), and 14 (LoftUp's variant)."""
    folder = golden_dir / "lift"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = stored if metadata["weights"] == "in this file" else load_file(folder / "case1.safetensors")
    state = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    method = load_method("lift", weights=state, channels=stored["features"].shape[1])
    size = tuple(json.loads(metadata["output_size"]))
    with torch.inference_mode():
        output = method(stored["image"], stored["features"], size)
        exact = method.double()(stored["image"].double(), stored["features"].double(), size)
    assert_close(output, stored["output"], reference=exact)


@pytest.mark.parametrize(("channels", "count"), [(64, 72_560), (48, 54_456), (384, 1_187_280)])
def test_parameters(channels: int, count: int) -> None:
    assert sum(p.numel() for p in LiFT(channels).parameters()) == count
    assert LiFT.native_ratio == 2


def test_repeated_on_ever_larger_images(model: LiFT) -> None:
    """As the official iteration: each step takes the output of the last and an image of twice the size."""
    image, features = torch.randn(1, 3, 48, 64), torch.randn(1, 16, 3, 4)
    expected, larger = features, image
    with torch.no_grad():
        for _ in range(3):
            expected = model.step(larger, expected)
            larger = F.interpolate(larger, (2 * larger.shape[2], 2 * larger.shape[3]), mode="bilinear")
        assert_close(model(image, features, (24, 32)), expected)


def test_other_sizes_are_resized_from_the_next_power_of_two(model: LiFT) -> None:
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 16, 3, 4)
    with torch.no_grad():
        four, eight = (model(image, features, (n * 3, n * 4)) for n in (4, 8))
        assert_close(
            model(image, features, (13, 16)), F.interpolate(eight, (13, 16), mode="bilinear", antialias=True)
        )
        assert_close(
            model(image, features, (9, 16)), F.interpolate(four, (9, 16), mode="bilinear", antialias=True)
        )
        assert model(image, features, (2, 2)).shape == (1, 16, 2, 2), "smaller than the features"


def test_checkpoints(model: LiFT, tmp_path: Path) -> None:
    """Plain state dicts, as they are published, and those of several GPUs."""
    for name, prefix in (("lift_dino_vits16.pth", ""), ("wrapped.pth", "module.")):
        torch.save({prefix + k: t for k, t in model.state_dict().items()}, tmp_path / name)
        loaded = load_method("lift", tmp_path / name, channels=16)
        for ours, theirs in zip(loaded.buffers(), model.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(UpbenchError, match="for 16 channels, asked for 32"):
        load_method("lift", tmp_path / "wrapped.pth", channels=32)
    state = model.state_dict()
    with pytest.raises(UpbenchError, match=r"lacks image_convs_1\.4\.running_var"):
        load_method(
            "lift", {k: t for k, t in state.items() if k != "image_convs_1.4.running_var"}, channels=16
        )
    with pytest.raises(UpbenchError, match="scale_adapter left over"):
        load_method("lift", {**state, "scale_adapter": torch.ones(1)}, channels=16)


def test_published_weights_are_used_where_a_user_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UPBENCH_WEIGHTS", raising=False)
    with pytest.raises(UpbenchError, match=r"fetch lift_dino_vits16\.pth from https://drive"):
        load_method("lift", "lift_dino_vits16")
    torch.save(LiFT(384).state_dict(), tmp_path / "lift_dino_vits16.pth")
    monkeypatch.setenv("UPBENCH_WEIGHTS", str(tmp_path))
    assert load_method("lift", "lift_dino_vits16").channels == 384


def step_macs(pixels: int, cells: int, c: int) -> int:
    """One doubling of `cells` cells with an image of `pixels` pixels, by hand; 2 a pixel for a batch norm."""
    half, between = c // 2, (c + 32) // 2
    image = pixels // 4 * (27 * 32 + 2 * 32) + pixels // 16 * (9 * 32 * 32 + 2 * 32)
    image += cells * (9 * 32 * 32 + 2 * 32)
    up = cells * (c + 32) * between * 4
    convolutions = 4 * cells * (9 * (between + 32) * half + 9 * half * half + 2 * 2 * half + half * c)
    return image + up + convolutions


def test_macs_equal_a_hand_count() -> None:
    """Three doublings of 6 x 8, then a resize to 45 x 60, which shrinks: taps of two passes."""
    method, c = LiFT(32).eval(), 32
    expected = sum(step_macs(4**i * 96 * 128, 4**i * 48, c) for i in range(3))
    expected += 3 * 4 * (4 + 16) * 96 * 128  # bilinear interpolation of the image
    expected += c * (48 * 60 * 3 + 45 * 60 * 3)
    counted = count_macs(_Bound(method, (45, 60)), torch.randn(1, 3, 96, 128), torch.randn(1, c, 6, 8))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected, rel=0.02)
