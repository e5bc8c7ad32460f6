"""LoftUp against the official outputs; the colours' range, output sizes, checkpoints, cost, gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods import loftup
from upbench.methods.loftup import LoftUp, Waves
from upbench.testing import assert_close
from upbench.testing.closeness import relative_error
from upbench.weights.load import load_method


@pytest.fixture
def model() -> LoftUp:
    torch.manual_seed(0)
    return LoftUp(channels=16).eval()


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours as the official code saves it."""
    state = dict(state)
    renamed = {}
    for layer in range(2):
        theirs = f"upsampler.ca_transformer.layers.{layer}."
        for kind in ("weight", "bias"):
            names = (f"layers.{layer}.{name}.{kind}" for name in ("query", "key", "value"))
            renamed[f"{theirs}0.attention.in_proj_{kind}"] = torch.cat([state.pop(n) for n in names])
            for ours, name in (
                ("output", "0.attention.out_proj"),
                ("query_norm", "0.norm_q"),
                ("key_norm", "0.norm_kv"),
                ("mlp.0", "1.net.0"),
                ("mlp.1", "1.net.1"),
                ("mlp.3", "1.net.4"),
            ):
                renamed[f"{theirs}{name}.{kind}"] = state.pop(f"layers.{layer}.{ours}.{kind}")
    names = {
        "feature_norm": "channelnorm.norm",
        "cell_waves": "upsampler.lr_pe",
        "pixel_waves": "upsampler.fourier_feat.1",
        "stem_norm": "upsampler.first_conv.0.norm",
        **{f"stem.{i}": f"upsampler.first_conv.{i + 1}" for i in range(5)},
        "norm": "upsampler.ca_transformer.norm",
        "head": "upsampler.final_conv.0",
        "output_norm": "upsampler.final_conv.1",
    }
    for key, tensor in state.items():
        module, kind = key.rsplit(".", 1)
        renamed[f"{names[module]}.{kind}"] = tensor
    return renamed


def _weights(folder: Path, case: int) -> dict[str, Tensor]:
    stored = load_file(folder / f"case{3 if case == 3 else 1}.safetensors")
    return {key.removeprefix("weights."): t for key, t in stored.items() if key.startswith("weights.")}


@pytest.mark.parametrize("case", [1, 2, 3])
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "loftup"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        size = tuple(json.loads(file.metadata()["output_size"]))
    method = load_method("loftup", weights=_weights(folder, case), channels=stored["features"].shape[1])
    with torch.inference_mode():
        output = method(stored["image"], stored["features"], size)
    # No float64: frequencies of e^10 are what they are in float32.
    assert_close(output, stored["output"])


@pytest.mark.parametrize(
    ("channels", "count"), [(32, 151_702), (48, 222_166), (384, 4_303_894), (768, 15_051_286)]
)
def test_parameters(channels: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in LoftUp(channels).parameters()) == count


def test_checkpoints(model: LoftUp, tmp_path: Path) -> None:
    state = official(model.state_dict())
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_method("loftup", tmp_path / "pytorch_model.bin", channels=16)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    assert LoftUp.options_from(state) == {"channels": 16}
    for key in state:
        with pytest.raises(UpbenchError, match="lacks"):
            load_method("loftup", weights={k: t for k, t in state.items() if k != key}, channels=16)
    with pytest.raises(UpbenchError, match="left over"):
        load_method("loftup", weights={**state, "extra": torch.zeros(1)}, channels=16)
    with pytest.raises(UpbenchError, match="is for 16 channels, asked for 384"):
        load_method("loftup", weights=state)
    wrong = {**state, "upsampler.final_conv.0.weight": torch.zeros(16, 20, 1, 1)}
    with pytest.raises(UpbenchError, match=r"head\.weight \[16, 20, 1, 1\] instead of \[16, 36, 1, 1\]"):
        load_method("loftup", weights=wrong, channels=16)


def test_official_names_are_those_of_the_official_files(golden_dir: Path) -> None:
    assert set(official(LoftUp(32).state_dict())) == set(_weights(golden_dir / "loftup", 1))


def test_released_weights_are_described() -> None:
    assert len({entry.file for entry in LoftUp.weights.values()}) == len(LoftUp.weights)
    for name, entry in LoftUp.weights.items():
        assert entry.source == f"https://huggingface.co/haiwen/loftup-{name}/resolve/main/pytorch_model.bin"
        assert entry.channels in (384, 512, 768)
        assert entry.license == "MIT"


def test_refusals() -> None:
    with pytest.raises(UpbenchError, match="18 channels are not a multiple of 4"):
        LoftUp.build(18)
    with pytest.raises(UpbenchError, match="did you mean 'image'"):
        LoftUp.build(colour_range="imag")


def test_waves_by_their_definition() -> None:
    """Element m of the flattened biases goes to frequency m // 5 and component m % 5: no transposition."""
    layer, points = Waves(5, 20), torch.rand(3, 5)
    waves = layer(points)
    assert waves.shape == (3, 200)
    for frequency in (0, 7, 19):
        for component in range(5):
            m = 5 * frequency + component
            angle = points[:, component] * math.exp(-2 + 12 * frequency / 19)
            for first, bias, function in ((0, layer.biases[0], torch.sin), (100, layer.biases[1], torch.cos)):
                expected = function(angle + bias[m // 20, m % 20])
                size = float(angle.abs().max().clamp(min=1))  # up to e^10
                assert_close(waves[:, first + m], expected, terms=1, scale=size)


def test_colours_are_scaled_over_the_batch_or_by_image() -> None:
    """By default images of a batch influence one another; with the option they keep the contract."""
    image, features = torch.randn(2, 3, 24, 32), torch.randn(2, 16, 6, 8)
    image[1] *= 3
    both = {}
    for colour_range in ("batch", "image"):
        torch.manual_seed(0)
        method = LoftUp(16, colour_range=colour_range).eval()
        with torch.no_grad():
            both[colour_range] = method(image, features, (24, 32))
            alone = method(image[:1], features[:1], (24, 32))
        if colour_range == "image":
            assert_close(both[colour_range][:1], alone)
        else:
            assert relative_error(both[colour_range][:1], alone) > 0.01


def test_constant_colours(model: LoftUp) -> None:
    """A range of zero is taken for 1e-4, as in the official code: no division by zero."""
    output = model(torch.ones(1, 3, 24, 32), torch.randn(1, 16, 6, 8), (24, 32))
    assert output.isfinite().all()


@pytest.mark.parametrize("size", [(40, 56), (12, 20), (24, 33)])
def test_another_size_is_that_of_the_resized_image(model: LoftUp, size: tuple[int, int]) -> None:
    image, features = torch.randn(1, 3, 24, 32), torch.randn(1, 16, 6, 8)
    resized = F.interpolate(image, size, mode="bilinear", align_corners=False)
    assert_close(model(image, features, size), model(resized, features, size))


def test_strips_do_not_change_the_output(model: LoftUp, monkeypatch: pytest.MonkeyPatch) -> None:
    image, features = torch.randn(2, 3, 24, 32), torch.randn(2, 16, 6, 8)
    whole = model(image, features, (24, 32))  # with gradients: in one go
    monkeypatch.setitem(loftup._BUDGET, "cpu", 6 * 2 * 32 * 36 * 4 * 5)
    strips = list(loftup._strips(torch.zeros(2, 24, 32, 36)))
    assert [s.stop - s.start for s in strips] == [5, 5, 5, 5, 4]
    with torch.no_grad():
        assert_close(model(image, features, (24, 32)), whole)


def expected_macs(image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """By hand, for one image; what is counted is told in `upbench.cost.macs`."""
    low, high = grid[0] * grid[1], size[0] * size[1]
    dim, inputs = channels + 20, 203
    stem = 5 * inputs + 9 * inputs * dim + 9 * dim * dim + 2 * 2 * dim
    layer = 2 * dim * dim + 2 * dim * low + 2 * dim * channels + 2 * 5 * dim
    end = 5 * dim + dim * channels + 5 * channels
    cells = 5 * channels + 2 * (5 * dim + 2 * dim * dim)
    resize = 4 * 3 * high * (size != image)
    return high * (stem + 2 * layer + end) + low * cells + resize


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [((56, 42), (8, 6), (56, 42)), ((28, 28), (8, 8), (56, 56)), ((56, 56), (4, 4), (28, 28))],
)
def test_macs_equal_a_hand_count(
    model: LoftUp, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    counted = count_macs(_Bound(model, size), torch.randn(1, 3, *image), torch.randn(1, 16, *grid))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected_macs(image, grid, size, 16), rel=0.01)
