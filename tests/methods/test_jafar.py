"""JAFAR against the official outputs, with random and with released weights; checkpoints, cost, gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods.jafar import JAFAR, Modulation
from upbench.ops.operator import project
from upbench.testing import assert_close
from upbench.testing.closeness import allowed
from upbench.weights.load import load_method

ROUNDING = allowed(torch.float32)  # of averages of numbers below 1

DIM = 128


@pytest.fixture
def model() -> JAFAR:
    torch.manual_seed(0)
    return JAFAR(channels=12).eval()


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours as the official code saves it: one matrix of projections where C is the width."""
    state = dict(state)
    attention = "cross_decode.cross_attn.attention."
    renamed = {f"{attention}in_proj_bias": _taken(state, "bias")}
    packed = state["attention.value.weight"].shape[1] == len(state["attention.query.weight"])
    if packed:
        renamed[f"{attention}in_proj_weight"] = _taken(state, "weight")
    names = {
        "attention.conv": "cross_decode.conv2d",
        "attention.output": f"{attention}out_proj",
        "attention.query.weight": f"{attention}q_proj_weight",
        "attention.key.weight": f"{attention}k_proj_weight",
        "attention.value.weight": f"{attention}v_proj_weight",
        "attention.query_norm": "cross_decode.cross_attn.norm_q",
        "attention.key_norm": "cross_decode.cross_attn.norm_k",
        "attention.value_norm": "cross_decode.cross_attn.norm_v",
        "feature_encoder": "key_features_encoder",
        "modulation": "sft_key",
        "position.frequencies": "rope.freqs",
    }
    for key, tensor in state.items():
        first = next((name for name in names if key.startswith(name)), "")
        renamed[names.get(first, "") + key[len(first) :]] = tensor
    return renamed


def _taken(state: dict[str, Tensor], kind: str) -> Tensor:
    return torch.cat([state.pop(f"attention.{name}.{kind}") for name in ("query", "key", "value")])


def _weights(folder: Path, case: int) -> dict[str, Tensor]:
    if case == 4:
        return load_file(folder / "../../weights/jafar_vit_small_patch14_dinov2.lvd142m.safetensors")
    stored = load_file(folder / f"case{3 if case == 3 else 1}.safetensors")
    return {key.removeprefix("weights."): t for key, t in stored.items() if key.startswith("weights.")}


@pytest.mark.parametrize("case", range(1, 5))
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "jafar"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        size = tuple(json.loads(file.metadata()["output_size"]))
    features = stored["features"]
    method = load_method("jafar", weights=_weights(folder, case), channels=features.shape[1])
    with torch.inference_mode():
        output = method(stored["image"], features, size)
        operator = method.operator(stored["image"], features, size)
        whole = operator(project(torch.eye(method.channels), features, 1))
        exact = method.double()(stored["image"].double(), features.double(), size)
    for found in (output, whole):
        assert_close(found, stored["output"], reference=exact)


@pytest.mark.parametrize(("channels", "count"), [(32, 538_016), (128, 562_688), (384, 628_480)])
def test_checkpoints_in_both_official_layouts(channels: int, count: int) -> None:
    model = JAFAR(channels)
    assert sum(p.numel() for p in model.parameters()) == count
    state = official(model.state_dict())
    packed = "cross_decode.cross_attn.attention.in_proj_weight"
    assert (packed in state) == (channels == 128)
    loaded = load_method("jafar", weights=state, channels=channels)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert JAFAR.options_from(state) == {"dim": DIM, "channels": channels}


def test_official_names_are_those_of_the_official_files(golden_dir: Path) -> None:
    for case, channels in ((1, 32), (3, 128), (4, 384)):
        assert set(official(JAFAR(channels).state_dict())) == set(_weights(golden_dir / "jafar", case))


def test_official_file_with_the_training_beside(model: JAFAR, tmp_path: Path) -> None:
    content = {"jafar": official(model.state_dict()), "optimizer_jafar": {"state": {}}, "epoch": 1}
    torch.save(content, tmp_path / "model.pth")
    loaded = load_method("jafar", tmp_path / "model.pth", channels=12)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_checkpoints_that_do_not_fit() -> None:
    state = official(JAFAR(16, dim=64).state_dict())
    assert load_method("jafar", weights=state, channels=16).modulation.gamma.weight.shape[0] == 64
    for key in state:  # each is needed, those without effect included
        rest = {k: t for k, t in state.items() if k != key}
        with pytest.raises(UpbenchError, match="lacks"):
            load_method("jafar", weights=rest, channels=16, dim=64)
    with pytest.raises(UpbenchError, match="left over"):
        load_method("jafar", weights={**state, "extra": torch.zeros(1)}, channels=16)
    with pytest.raises(UpbenchError, match="is for 16 channels, asked for 384"):
        load_method("jafar", weights=state)
    wrong = {**state, "sft_key.beta.weight": torch.zeros(64, 32, 1, 1)}
    with pytest.raises(UpbenchError, match=r"modulation\.beta\.weight \[64, 32, 1, 1\] instead of"):
        load_method("jafar", weights=wrong, channels=16)
    with pytest.raises(UpbenchError, match="dim 100 is not a multiple"):
        JAFAR.build(dim=100)


def test_released_weights_are_described() -> None:
    released = {name: entry for name, entry in JAFAR.weights.items() if name != JAFAR.default_weights}
    assert len(released) == 7
    for name, entry in released.items():
        assert entry.remote, name
        assert entry.key == "jafar"
        assert entry.license == "Apache-2.0"
        assert entry.channels == (384 if "small" in entry.backbone else 768)
        assert entry.file == f"{entry.backbone}.pth"


def test_modulation_by_its_formula() -> None:
    layer, keys, features = Modulation(16), torch.randn(2, 16, 3, 4), torch.randn(2, 16, 3, 4)
    grouped = keys.view(2, 8, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normed = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).view(keys.shape)
    gamma, beta = (
        torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], features) for conv in (layer.gamma, layer.beta)
    )
    assert_close(layer(keys, features), gamma * normed + beta)


def test_scale_of_the_features_does_not_change_the_weights(model: JAFAR) -> None:
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 12, 6, 8)
    output = model(image, features, (30, 44))
    assert_close(model(image, 8 * features, (30, 44)), 8 * output)


def test_every_output_is_an_average_of_all_cells(model: JAFAR) -> None:
    image, features = torch.randn(1, 3, 28, 28), torch.rand(1, 12, 5, 3)
    output = model(image, features, (20, 30))
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert ((output >= low - ROUNDING) & (output <= high + ROUNDING)).all()


def test_only_what_has_no_effect_is_frozen(model: JAFAR) -> None:
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    unused = {f"attention.{n}.{kind}" for n in ("value", "output") for kind in ("weight", "bias")}
    assert idle == unused | {"attention.value_norm.weight"}


def expected_macs(image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """By hand, for one image; what is counted is told in `upbench.cost.macs`."""
    pixels, low, high = (a * b for a, b in (image, grid, size))
    blocks = 2 * 2 * DIM * DIM + 4 * 5 * DIM  # two blocks: convolutions and normalisations
    at_image = 3 * DIM + blocks + 2 * (DIM * DIM + blocks) + 3 * DIM  # encoders; the position's addcmul
    features = channels * DIM + blocks
    at_low = features + 4 * DIM + 2 * DIM * DIM + DIM + DIM * DIM  # norm of keys, modulation, projection
    at_high = 4 * DIM + 9 * DIM * DIM + DIM * DIM
    pooling = DIM * (max(pixels, low) * (grid != image) + max(pixels, high) * (size != image))
    attention = high * low * (DIM + channels)
    return pixels * at_image + low * at_low + high * at_high + pooling + attention


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [((112, 84), (8, 6), (112, 84)), ((56, 56), (16, 16), (112, 112)), ((112, 112), (8, 8), (56, 56))],
)
def test_macs_equal_a_hand_count(
    model: JAFAR, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    counted = count_macs(_Bound(model, size), torch.randn(1, 3, *image), torch.randn(1, 12, *grid))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected_macs(image, grid, size, 12), rel=0.01)


def test_random_weights_begin_close_to_the_pixel() -> None:
    """Attention over a plain image falls off with the distance; an average over the map would not."""
    method = load_method("jafar", "none", channels=9)
    image = method.normalize(torch.full((1, 3, 90, 90), 0.5))
    columns = torch.eye(9).view(1, 9, 1, 9).expand(1, 9, 9, 9)  # column of each cell, one-hot
    with torch.no_grad():
        weights = method(image, columns, (90, 90))[0, :, 45]  # [column, pixel]
    own = torch.arange(90) // 10  # the column that a pixel lies in
    assert (weights.argmax(0) == own).float().mean() > 0.75
    assert weights.gather(0, own[None]).mean() > 3 / 9
