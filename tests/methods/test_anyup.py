"""AnyUp against the official outputs, with random and with released weights; checkpoints, cost, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.layers.attention import Position, RMSNorm
from upbench.methods import anyup
from upbench.methods.anyup import AnyUp, UnifiedFeatures
from upbench.testing import assert_close
from upbench.weights.load import load_method

DIM = 128


@pytest.fixture
def model() -> AnyUp:
    torch.manual_seed(0)
    return AnyUp(channels=12).eval()


@pytest.mark.parametrize("case", range(1, 6))
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "anyup"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        metadata = file.metadata()
    state = _weights(folder, metadata["weights"])
    method = load_method("anyup", weights=state, channels=stored["features"].shape[1])
    size = tuple(json.loads(metadata["output_size"]))
    with torch.inference_mode():
        output = method(stored["image"], stored["features"], size)
        exact = method.double()(stored["image"].double(), stored["features"].double(), size)
    assert_close(output, stored["output"], reference=exact)


def _weights(folder: Path, where: str) -> dict[str, Tensor]:
    if where.startswith("../../weights/"):
        return load_file(folder / where.split()[0])
    stored = load_file(folder / "case1.safetensors")
    return {key.removeprefix("weights."): t for key, t in stored.items() if key.startswith("weights.")}


def test_parameters_and_checkpoints(model: AnyUp, golden_dir: Path) -> None:
    assert sum(p.numel() for p in model.parameters()) == 878_080
    state = _weights(golden_dir / "anyup", "in this file")
    assert AnyUp.options_from(state) == {"dim": 128, "filter_size": 5}
    assert set(AnyUp.convert_state(state)) == set(model.state_dict())
    for key in state:  # each is needed, those without effect included
        with pytest.raises(UpbenchError, match="lacks"):
            load_method("anyup", weights={k: t for k, t in state.items() if k != key}, dim=128, filter_size=5)
    with pytest.raises(UpbenchError, match="left over"):
        load_method("anyup", weights={**state, "extra": torch.zeros(1)})


def test_unified_features_by_their_definition() -> None:
    """Against loops over positions, taps and the official re-reading of the responses."""
    b, c, h, w, dim, reach = 2, 3, 4, 5, 8, 2
    layer, features = UnifiedFeatures(dim, 5), torch.randn(b, c, h, w)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = torch.empty(b, dim, h, w)
    for y in range(h):
        for x in range(w):
            responses = torch.zeros(b, c, dim)
            taps = 0
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        taps += 1
                        tap = layer.filters[:, 0, dy + reach, dx + reach]
                        responses += unit[:, :, y + dy, x + dx, None] * tap
            responses = (responses / taps).reshape(b, c * dim).reshape(b, dim, c)
            expected[:, :, y, x] = responses.softmax(1).mean(2)
    assert_close(layer(features), expected)


def test_unified_features_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, features = UnifiedFeatures(16, 5), torch.randn(2, 6, 9, 5)
    whole = layer(features)
    monkeypatch.setattr(anyup, "_CHUNK", 2 * 2 * 6 * 16 * 5 * 4)  # two rows
    assert_close(layer(features), whole)
    assert_close(whole.sum(1), torch.ones(2, 9, 5))


def test_position_by_its_formula() -> None:
    layer, x = Position(16), torch.randn(2, 16, 5, 7)
    layer.frequencies.data.copy_(3 * torch.randn(2, 16))  # trained checkpoints mix the axes
    rows, cols = torch.linspace(0, 1, 5).view(1, 5, 1), torch.linspace(0, 1, 7)
    angle = rows * layer.frequencies[0].view(-1, 1, 1) + cols * layer.frequencies[1].view(-1, 1, 1)
    turned = torch.cat([-x[:, 8:], x[:, :8]], 1)
    assert_close(layer(x), x * angle.cos() + turned * angle.sin())


def test_rms_norm_is_the_librarys() -> None:
    layer, x = RMSNorm(6), torch.randn(2, 6, 3, 4)
    layer.weight.data.normal_()
    expected = F.rms_norm(x.movedim(1, 3), (6,), layer.weight).movedim(3, 1)
    assert_close(layer(x), expected)


def test_scale_of_the_features_does_not_change_the_weights(model: AnyUp) -> None:
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 12, 6, 8)
    output = model(image, features, (30, 44))
    assert_close(model(image, 8 * features, (30, 44)), 8 * output)


def test_only_what_has_no_effect_is_frozen(model: AnyUp) -> None:
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    unused = {f"attention.{n}.{kind}" for n in ("value", "output") for kind in ("weight", "bias")}
    assert idle == unused


@pytest.mark.parametrize("options", [{"dim": 100}, {"filter_size": 4}, {"window_ratio": 0.0}])
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UpbenchError, match="anyup"):
        AnyUp.build(**options)


def expected_macs(image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """By hand, for one image; `upbench.cost.macs` says what is counted. Windows without their padding."""
    pixels, low, high = (a * b for a, b in (image, grid, size))
    blocks = 2 * 2 * DIM * DIM + 4 * 5 * DIM  # two blocks: convolutions and normalisations
    at_image = 3 * DIM + blocks + 2 * (DIM * DIM + blocks) + 3 * DIM  # encoders; the position's addcmul
    at_low = 25 * DIM * channels + blocks + 9 * 2 * DIM * DIM + blocks + DIM * DIM
    at_high = 9 * DIM * DIM + DIM * DIM
    pooling = DIM * (max(pixels, low) * (grid != image) + max(pixels, high) * (size != image))
    seen = [sum(_window(n, cells, i) for i in range(n)) for n, cells in zip(size, grid, strict=True)]
    attention = seen[0] * seen[1] * (DIM + channels)
    return pixels * at_image + low * at_low + high * at_high + pooling + attention


def _window(size: int, cells: int, i: int) -> int:
    """Cells within a tenth of an axis from position i."""
    low, high = ((i + 0.5) / size + side for side in (-0.1, 0.1))
    return -int(-min(high, 1) * cells // 1) - int(max(low, 0) * cells)


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [((112, 84), (8, 6), (112, 84)), ((56, 56), (16, 16), (112, 112)), ((112, 112), (8, 8), (56, 56))],
)
def test_macs_equal_a_hand_count(
    model: AnyUp, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    counted = count_macs(_Bound(model, size), torch.randn(1, 3, *image), torch.randn(1, 12, *grid))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected_macs(image, grid, size, 12), rel=0.02)


def test_random_weights_begin_by_comparing_places_of_the_image() -> None:
    """Attention begins local (a box over the window would weigh all cells alike) and looks at the image."""
    method = load_method("anyup", "none", channels=9)
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1  # an edge halfway, in the middle of the fifth of nine columns
    cells = torch.eye(9).view(1, 9, 1, 9).expand(1, 9, 9, 9)  # column of each cell, one-hot
    with torch.no_grad():
        weights = method(method.normalize(image), cells, (64, 64))[0, :, 32]  # [cell, pixel]
    dark, bright = weights[:4, 31].sum(), weights[5:, 31].sum()
    assert dark > 1.5 * bright
