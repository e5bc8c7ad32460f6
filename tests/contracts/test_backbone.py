"""Methods that run the backbone: how they get it, what it costs, how runs and probes treat them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from probing import CHANNELS, CROPS, SIZE, dense_logits, logits, probe, split, view
from torch import Tensor

from upbench.cli.dispatch import main
from upbench.contracts.operator import SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler, extras
from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound, cost_key, measure
from upbench.cost.peakmemory import LINUX, UNIX
from upbench.dense.method import MethodCall
from upbench.dense.spill import Store
from upbench.dense.tiles import upsample_tiles, upsample_to
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.features import backbones
from upbench.ops.resample import interpolation_operator
from upbench.registry import find_method, load_plugin_file
from upbench.run import loop as runner
from upbench.testing import ContractError, assert_close, check_method, tiny_backbone
from upbench.train.config import TrainConfig
from upbench.weights.load import load_method

SIZES: dict[str, Any] = {
    "channels": 16,
    "image_size": (32, 32),
    "feature_size": (8, 8),
    "output_size": (32, 32),
}

PLUGIN = """
import torch.nn.functional as F
from upbench import Upsampler

class Rerun(Upsampler):
    name = "rerun"
    uses_backbone = True

    def forward(self, image, features, output_size):
        image01 = self.backbone.fit(self.denormalize(image))
        return F.interpolate(self.backbone(image01), output_size).to(features.dtype)

class Blind(Upsampler):
    name = "blind"
    linear = True

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """The file above, registered while the test runs."""
    before = dict(Upsampler.registered)
    file = tmp_path / "rerun.py"
    file.write_text(PLUGIN)
    load_plugin_file(file)
    yield file
    Upsampler.registered.clear()
    Upsampler.registered.update(before)


class Sourced(Upsampler):
    """Features of its own on a grid twice as fine, from the image alone."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        operator = self.operator(image, features, output_size)
        return operator(operator.takes(features).unsqueeze(1))

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SourcedOperator:
        self.asked += 1
        grid = (2 * features.shape[-2], 2 * features.shape[-1])
        low = F.adaptive_avg_pool2d(image, grid).mean(1, keepdim=True)
        sources = low * torch.arange(1, features.shape[1] + 1).view(1, -1, 1, 1)
        return SourcedOperator(sources, interpolation_operator(sources, output_size, "bilinear"))


def call(method: Upsampler, **given: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return method(torch.randn(1, 3, 32, 32), torch.zeros(1, 16, 8, 8), (32, 32), **given)


# ------------------------------------------------------------------------------------------ the argument


def test_a_backbone_gives_its_channels_by_name_too() -> None:
    assert load_method("large_image", backbone=tiny_backbone(12)).channels == 12
    assert load_method("large_image", backbone="efficientnet_lite0").channels == 320
    with pytest.raises(
        UpbenchError, match="'large_image' is asked for 384 channels, but backbone 'tiny-vit-12"
    ):
        load_method("large_image", channels=384, backbone=tiny_backbone(12))
    assert load_method("bilinear", backbone=tiny_backbone(12)).channels == 12
    assert load_method("bilinear").channels == 384


@pytest.mark.parametrize("name", ["large_image", "strided", "shift_average"])
def test_without_a_backbone_it_says_what_is_missing(name: str) -> None:
    for method in (load_method(name, channels=16), load_method(name, backbone=tiny_backbone())):
        with pytest.raises(
            UpbenchError, match=rf"method '{name}' runs the backbone itself and has none: call it with backb"
        ):
            call(method)


def test_a_method_does_not_keep_it() -> None:
    backbone = tiny_backbone()
    method = load_method("strided", backbone=backbone)
    before = set(method.__dict__)
    first = call(method, backbone=backbone)
    assert set(method.__dict__) == before
    assert list(method.modules()) == [method]
    assert torch.equal(call(method.bfloat16(), backbone=backbone), first)  # the image stays in float32


def test_what_a_function_takes_is_what_it_is_given() -> None:
    backbone, camera = tiny_backbone(), Camera(torch.ones(1, 4))
    for name, functions in {
        "strided": {"forward": ["backbone"], "operator": ["backbone"], "tile_operator": ["backbone"]},
        "featup_implicit": {"macs": ["backbone"]},
        "raysup": {"forward": ["camera"], "operator": ["camera"], "macs": []},
        "bilinear": {"forward": [], "operator": [], "tile_operator": []},
    }.items():
        method = load_method(name, "none")
        for function, expected in functions.items():
            assert list(extras(method, function, camera=camera, backbone=backbone)) == expected
    assert extras(load_method("strided"), camera=camera) == {}
    with pytest.raises(UpbenchError, match="method 'bilinear' runs no backbone"):
        load_method("bilinear").attach_backbone(backbone)


def test_tiles_of_a_method_that_runs_the_backbone(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    method: Any = load_method("strided", backbone=backbone)
    image, features = torch.randn(1, 3, 32, 32), torch.zeros(1, 16, 8, 8)
    with torch.no_grad():
        expected = method(image, features, (32, 32), backbone=backbone)
    for tile in upsample_tiles(method, image, features, (32, 32), tile=20, backbone=backbone):
        assert_close(tile.values, expected[..., tile.rows, tile.cols])
    whole = torch.empty(1, 16, 32, 32)
    upsample_to(whole, method, image, features, (32, 32), backbone=backbone)
    assert_close(whole, expected)


def test_a_linear_method_without_an_operator_of_its_own() -> None:
    """It has none: its forward needs the backbone, which values that are upsampled later do not bring."""

    class Mixed(Upsampler):
        linear = uses_backbone = True

        def forward(self, image: Any, features: Any, output_size: Any, backbone: Any = None) -> Tensor:
            self.given(backbone)
            return F.interpolate(features, output_size)

    features = torch.randn(1, 16, 8, 8)
    assert Mixed(16).operator(torch.rand(1, 3, 32, 32), features, (32, 32)) is None
    tiles = upsample_tiles(Mixed(16), torch.rand(1, 3, 32, 32), features, (32, 32), backbone=tiny_backbone())
    assert torch.equal(torch.cat([tile.values for tile in tiles], 2), F.interpolate(features, (32, 32)))


# ------------------------------------------------------------------------------------------ the first edition


def test_a_plugin_of_the_first_edition_finds_it_attached(plugin: Path) -> None:
    """Whoever calls it does so by `extras`; `load_method` has it ready to be called without."""
    backbone = tiny_backbone()
    image, features = torch.rand(1, 3, 32, 32), torch.zeros(1, 16, 8, 8)
    method = load_method("rerun", backbone=backbone)
    with torch.no_grad():
        expected = F.interpolate(backbone(method.denormalize(image)), (32, 32))
        assert torch.equal(method(image, features, (32, 32)), expected)
        bare = load_method("rerun", channels=16)
        with pytest.raises(
            UpbenchError, match=r"'rerun' runs the backbone itself.*load_method\('rerun', back"
        ):
            bare(image, features, (32, 32))
        assert extras(bare, backbone=backbone) == {}
        assert torch.equal(bare(image, features, (32, 32)), expected)
    tile = next(
        upsample_tiles(load_method("rerun", channels=16), image, features, (32, 32), backbone=backbone)
    )
    assert torch.equal(tile.values, expected)
    check_method(find_method("rerun"))


def test_what_is_attached_is_no_part_of_the_method(plugin: Path) -> None:
    backbone = tiny_backbone()
    method = load_method("rerun", backbone=backbone)
    assert not list(method.parameters())
    assert not method.state_dict()
    assert list(method.modules()) == [method]
    method.train().requires_grad_(True).bfloat16()
    assert method.backbone is backbone
    assert not backbone.training
    assert {(p.dtype, p.requires_grad) for p in backbone.parameters()} == {(torch.float32, False)}
    assert copy.deepcopy(method).backbone is backbone
    again = pickle.loads(pickle.dumps(load_method("rerun", backbone=backbone)))
    assert again.backbone is not backbone
    assert_close(call(again), call(load_method("rerun", backbone=backbone)))


def test_denormalize_undoes_normalize() -> None:
    method = load_method("bilinear")
    image01 = torch.rand(2, 3, 5, 7)
    assert_close(method.denormalize(method.normalize(image01)), image01)
    half = method.denormalize(method.normalize(image01).bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, image01, terms=1, dtype=torch.bfloat16)
    assert method.denormalize(torch.full((1, 3, 1, 1), 9.0)).max() == 1


def test_training_refuses_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from upbench.train.loop import train

    monkeypatch.setattr(find_method("strided"), "trainable", True)
    config = TrainConfig("strided", (str(tmp_path),), str(tmp_path / "w.safetensors"), steps=1)
    with pytest.raises(
        UpbenchError, match="'strided' runs the backbone itself; such methods cannot be trained"
    ):
        train(config)


def test_the_contract_finds_what_is_done_to_a_backbone() -> None:
    class Free(Upsampler):
        uses_backbone = True

        def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
            return F.interpolate(features, output_size).clone()

    class Breaks(Free):
        def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
            self.backbone.model.patch_embed.proj.stride = (2, 2)
            return super().forward(image, features, output_size)

    class Opens(Free):
        def forward(
            self, image: Tensor, features: Tensor, output_size: tuple[int, int], backbone: Any = None
        ) -> Tensor:
            backbone.model.patch_embed.proj.stride = (2, 2)
            return super().forward(image, features, output_size)

    class Holds(Free):
        def forward(
            self, image: Tensor, features: Tensor, output_size: tuple[int, int], backbone: Any = None
        ) -> Tensor:
            self.held = backbone
            return super().forward(image, features, output_size)

    class Keeps(Free):
        def attach_backbone(self, backbone: Any) -> None:
            super().attach_backbone(backbone)
            self.kept = backbone

    for cls, words in (
        (Free, "works without one"),
        (Breaks, "a module of the backbone was changed"),
        (Opens, "a module of the backbone was changed"),
        (Holds, "parameters of the backbone are among those of the method"),
        (Keeps, "parameters of the backbone are among those of the method"),
    ):
        cls.name = cls.__name__.lower()
        with pytest.raises(ContractError, match=words):
            check_method(cls)


# ------------------------------------------------------------------------------------------ probes


@pytest.mark.parametrize("crop", CROPS)
def test_a_probe_goes_before_features_of_the_methods_own(crop: Any) -> None:
    up = view(Sourced(CHANNELS))
    weight, bias = probe()
    assert_close(logits(up, 2, weight, bias, crop), dense_logits(up, 2, weight, bias, crop))


def test_sources_are_kept_and_halved_within_the_budget() -> None:
    weight, bias = (part.detach() for part in probe())
    roomy = view(Sourced(CHANNELS))
    exact = [logits(roomy, index, weight, bias) for index in (0, 0, 1)]
    assert roomy.call.method.asked == 2  # type: ignore[attr-defined]
    one = 8 * CHANNELS * SIZE  # far below the sources of one image
    tight = view(Sourced(CHANNELS), budget=one)
    assert roomy.nbytes() > 0
    assert tight.keeps()
    assert tight.nbytes() == 0
    rough = logits(tight, 0, weight, bias)
    assert 0 < float((rough - exact[0]).abs().max()) < 0.01 * float(exact[0].abs().max())


def test_a_probe_of_a_method_that_runs_the_backbone() -> None:
    """`strided` at every pixel, from an operator whose sources are the backbone's."""
    backbone = tiny_backbone(CHANNELS)
    call = MethodCall(load_method("strided", backbone=backbone), backbone=backbone)
    images, features = split()
    up = UpsampledSplit(call, images, features)
    weight, bias = probe()
    image = images.framed(1).image[None]
    with torch.no_grad():
        dense = call.method(call.guidance(image), features.batch([1]), (SIZE, SIZE), backbone=backbone)[0]
        expected = torch.einsum("kc,chw->khw", weight, dense) + bias[:, None, None]
        assert_close(logits(up, 1, weight, bias), expected)


def test_sources_too_large_for_half_precision_stay_as_they_are() -> None:
    sources = torch.full((1, 4, 8, 8), 1e5)
    item = SourcedOperator(sources, interpolation_operator(sources, (16, 16), "bilinear"))
    kept = Store(item.nbytes(), 2, spill=False).offer(0, item)
    assert isinstance(kept, SourcedOperator)
    assert kept.sources.dtype == torch.float32
    assert kept.operator.rows.dtype == torch.float16  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------ cost


@pytest.mark.parametrize("name", ["large_image", "strided", "shift_average"])
def test_macs_hold_every_pass_through_the_backbone(name: str) -> None:
    backbone = tiny_backbone()
    method = load_method(name, backbone=backbone)
    cost = measure(method, **SIZES, seconds=0, memory=False, backbone=backbone)
    assert cost.uncounted == ()
    assert cost.parameters == 0
    assert "include passes through the backbone tiny-vit-16-4" in cost.warnings[0]
    alone = count_macs(backbone, torch.rand(1, 3, 32, 32)).total
    if name == "shift_average":
        assert cost.macs is not None
        placing = 16 * (16 * 16 * 32 + 32 * 16 * 32)  # columns, then rows
        assert cost.macs == 4 * alone + placing
    if name == "large_image":
        inputs = torch.rand(1, 3, 32, 32), torch.rand(1, 16, 8, 8)
        by_operator = count_macs(_Bound(method, (32, 32), {"backbone": backbone}), *inputs).by_operator
        larger = count_macs(backbone, torch.rand(1, 3, 64, 64)).by_operator
        assert by_operator["scaled_dot_product_attention"] == larger["scaled_dot_product_attention"]
        assert by_operator["linear"] == larger["linear"]


@pytest.mark.parametrize("name", ["strided", "rerun"])
def test_memory_is_measured_with_the_backbone_there(plugin: Path, name: str) -> None:
    method = load_method(name, channels=16)
    cost = measure(method, **SIZES, seconds=0, macs=False, backbone=tiny_backbone())
    assert cost.memory_method in (LINUX, UNIX)
    assert cost.peak_memory_bytes is not None


def test_a_measurement_is_known_by_the_backbone_where_that_matters() -> None:
    keys = {cost_key("strided", **SIZES, backbone=name) for name in ("a", "b", "")}
    assert len(keys) == 3
    assert len({cost_key("bilinear", **SIZES, backbone=name) for name in ("a", "b", "")}) == 1


def test_measuring_without_a_backbone_says_so() -> None:
    with pytest.raises(UpbenchError, match="runs the backbone itself and has none"):
        measure(load_method("strided", channels=16), **SIZES, seconds=0, memory=False)


# ------------------------------------------------------------------------------------------ runs


def test_profile_takes_a_backbone(toy: Any, plugin: Path, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    words = f"profile --methods rerun,blind --backbone tiny --size 32 --device cpu --plugin {plugin} --out"
    assert main([*words.split(), str(file)]) == 0
    costs = json.loads(file.read_text())
    assert [(c["method"], c["channels"], c["feature_size"]) for c in costs] == [
        ("rerun", 6, [4, 4]),
        ("blind", 6, [4, 4]),
    ]
    assert "backbone tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods rerun", "method 'rerun' runs the backbone itself: name one with --backbone"),
        ("--methods re*", "no method is left"),
        ("--methods blind --backbone tiny --channels 7", "backbone 'tiny' has channels 6, asked for 7"),
        ("--methods blind --backbone tiny --stride 4", "backbone 'tiny' has stride 8, asked for 4"),
    ],
)
def test_profile_refuses(toy: Any, plugin: Path, capsys: Any, words: str, message: str) -> None:
    assert main(f"profile {words} --size 32 --device cpu --plugin {plugin}".split()) == 2
    assert message in capsys.readouterr().err


def test_profile_leaves_them_out_of_a_wildcard(toy: Any, plugin: Path, capsys: Any) -> None:
    assert main(f"profile --methods bl*,re* --size 32 --device cpu --plugin {plugin}".split()) == 0
    printed = capsys.readouterr()
    assert "blind" in printed.out
    assert "rerun" not in printed.out
    assert "rerun left out" in printed.err


def test_a_run_gives_each_cell_its_backbone(toy: Any, plugin: Path, tmp_path: Path) -> None:
    """The method is the backbone itself and nearest interpolation, so it ties with `blind`."""
    plugins = [str(toy.PLUGIN), str(plugin)]
    config = toy.config(tmp_path / "out", "rerun,blind", plugins=plugins)
    records = {record.cell.method.name: record for record in runner.run(config)}
    assert {record.status for record in records.values()} == {"ok"}
    assert records["rerun"].metrics["val"]["miou"] == pytest.approx(records["blind"].metrics["val"]["miou"])
    cost = records["rerun"].cost["cpu"]
    assert "backbone tiny" in cost["warnings"][0]
    assert cost["macs"] > records["blind"].cost["cpu"]["macs"]


def test_a_run_with_two_backbones_gives_each_in_turn(
    toy: Any, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have six channels, so the method must not be kept from one to the other."""

    class Dark(type(backbones.load_backbone("tiny"))):  # type: ignore[misc]
        name = "dark"

        def forward(self, image01: Tensor) -> Tensor:
            return torch.zeros_like(super().forward(image01))

    load = backbones.load_backbone

    def both(name: str, device: str = "cpu", pretrained: bool = True) -> Any:
        if name != "dark":
            return load(name, device, pretrained)
        dark = Dark()
        dark.fingerprint = "dark"
        return dark

    monkeypatch.setattr(backbones, "load_backbone", both)
    plugins = [str(toy.PLUGIN), str(plugin)]
    config = toy.config(tmp_path / "out", "rerun", plugins=plugins, backbones=["tiny", "dark"])
    found = {record.cell.backbone: record.metrics["val"]["miou"][0] for record in runner.run(config)}
    assert found["tiny"] > found["dark"] + 1
