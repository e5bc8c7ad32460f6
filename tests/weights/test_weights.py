"""Weights: which file a name stands for, and a method that is filled with all of it or refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import upbench.weights.resolve as weights_module
from upbench.contracts.upsampler import Setting, Upsampler
from upbench.contracts.weights import Weights, weights_fingerprint
from upbench.errors import UpbenchError
from upbench.weights.load import load_method, options_unlike_training
from upbench.weights.resolve import list_weights, resolve, weights_reason


class Toy(Upsampler):
    """One 1x1 convolution and a norm; its official checkpoints call the convolution `proj`."""

    trainable = True

    def __init__(self, channels: int = 384, dim: int = 4, gain: float = 1.0) -> None:
        super().__init__(channels)
        self.gain = gain
        self.mix = nn.Conv2d(channels, dim, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, channels = state["mix.weight"].shape[:2]
        return {"dim": dim, "channels": channels}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("proj.", "mix."): tensor for name, tensor in state.items()}


class Plain(Upsampler):
    """No parameters."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size)


Toy.name, Plain.name = "toy", "plain"  # outside the body: registered by the fixture, for one test


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cls in (Toy, Plain):
        monkeypatch.setitem(Upsampler.registered, cls.name, cls)
    monkeypatch.setattr(Toy, "weights", {})
    monkeypatch.setattr(Toy, "default_weights", None)
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UPBENCH_WEIGHTS", raising=False)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A checkpoint for 8 channels with dim 6, in our names."""
    module = Toy(channels=8, dim=6)
    module.norm.running_mean.normal_()
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mix.", "proj."): tensor for name, tensor in state.items()}


def assert_filled(module: Upsampler, state: Mapping[str, Tensor]) -> None:
    got = module.state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) for name in state)


# -------------------- what weights may be --------------------


def test_none_is_seeded_and_leaves_the_generators_alone():
    before = torch.get_rng_state()
    first = load_method("toy", "none", channels=8)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    same, other = load_method("toy", "none", channels=8), load_method("toy", "none", channels=8, seed=1)
    assert_filled(same, first.state_dict())
    assert not torch.equal(first.mix.weight, other.mix.weight)  # type: ignore[union-attr, arg-type]
    assert not first.training


def test_mapping_in_our_names_and_in_the_official_ones(state: dict[str, Tensor]):
    for mapping in (state, official(state)):
        module = load_method("toy", mapping, channels=8, gain=2.0)
        assert_filled(module, state)
        assert module.gain == 2.0
        assert not module.training


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{name}": t for name, t in s.items()}, "args": {"lr": 0.1}},
        lambda s: {"toy": s, "optimizer": {"step": torch.ones(1)}},
        lambda s: {f"_orig_mod.{name}": t for name, t in s.items()},
    ],
    ids=["plain", "state_dict", "model, module.", "name of the method", "compiled"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_pickled_checkpoints(state: dict[str, Tensor], tmp_path: Path, wrap: Any, suffix: str):
    path = tmp_path / f"c{suffix}"
    torch.save(wrap(official(state)), path)
    assert_filled(load_method("toy", path, channels=8), state)
    assert_filled(load_method("toy", str(path), channels=8), state)


def test_options_in_the_metadata_are_defaults(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    state = Toy(channels=6).state_dict()
    for method, options, gain in (("toy", '{"gain": 2.5, "gone": 1}', 2.5), ("other", '{"gain": 2.5}', 1.0)):
        save_file(state, file, {"method": method, "options": options})
        assert load_method("toy", file, channels=6).gain == gain
        assert load_method("toy", file, channels=6, gain=3.0).gain == 3.0
    assert options_unlike_training(Toy, resolve(Toy, file), {"gain": 3.0, "dim": 4}) == {"gain": (3.0, 1.0)}
    assert options_unlike_training(Toy, resolve(Toy, "none"), {"gain": 3.0}) == {}
    save_file(state, file, {"method": "toy", "options": "{"})
    with pytest.raises(UpbenchError, match="not JSON"):
        load_method("toy", file, channels=6)


def test_safetensors(state: dict[str, Tensor], tmp_path: Path):
    save_file(state, tmp_path / "c.safetensors")
    assert_filled(load_method("toy", tmp_path / "c.safetensors", channels=8), state)


def test_half_precision_checkpoints_become_float32(state: dict[str, Tensor]):
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    module = load_method("toy", half, channels=8)
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_default(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UpbenchError, match="method 'toy' has no default weights"):
        load_method("toy", channels=8)
    save_file(state, tmp_path / "c.safetensors")
    entry = Weights(str(tmp_path / "c.safetensors"))
    monkeypatch.setattr(Toy, "weights", {"shipped": entry})
    monkeypatch.setattr(Toy, "default_weights", "shipped")
    assert_filled(load_method("toy", channels=8), state)
    assert_filled(load_method("toy", "shipped", channels=8), state)
    resolved = resolve(Toy)
    assert (resolved.name, resolved.entry) == ("shipped", entry)
    assert resolved.sha256 == hashlib.sha256((tmp_path / "c.safetensors").read_bytes()).hexdigest()


def test_a_method_without_parameters_needs_no_weights():
    assert load_method("plain").name == "plain"
    assert resolve(Plain).sha256 is None


def test_checkpoints_that_ship_lie_in_the_package(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights_module, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(Toy, "weights", {"a": Weights("a.safetensors"), "b": Weights("b.safetensors")})
    save_file(state, tmp_path / "a.safetensors")
    assert_filled(load_method("toy", "a", channels=8), state)
    with pytest.raises(UpbenchError, match=r"file of weights 'toy:b' not found: .*b\.safetensors"):
        load_method("toy", "b", channels=8)
    assert [(row.name, row.place) for row in list_weights() if row.method == "toy"] == [
        ("a", "packaged"),
        ("b", "missing"),
    ]


def test_a_key_in_the_checkpoint(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({"ours": official(state), "theirs": {"x": torch.ones(1)}}, tmp_path / "c.pth")
    monkeypatch.setattr(Toy, "weights", {"a": Weights(str(tmp_path / "c.pth"), key="ours")})
    assert_filled(load_method("toy", "a", channels=8), state)


def test_fingerprint_of_tensors(state: dict[str, Tensor]):
    first = weights_fingerprint(state)
    assert weights_fingerprint(dict(reversed(state.items()))) == first
    assert resolve(Toy, state).sha256 == first
    changed = {**state, "mix.bias": state["mix.bias"] + 1}
    renamed = {name.replace("mix", "mixed"): tensor for name, tensor in state.items()}
    shaped = {**state, "mix.bias": state["mix.bias"][None]}
    half = {**state, "mix.bias": state["mix.bias"].bfloat16()}
    assert len({first, *(weights_fingerprint(s) for s in (changed, renamed, shaped, half))}) == 5


# -------------------- what is refused --------------------


def refused(text: str, weights: Any, channels: int = 8, **options: Any) -> None:
    with pytest.raises(UpbenchError, match=text) as info:
        load_method("toy", weights, channels=channels, **options)
    assert "\n" not in str(info.value)


def test_missing_and_left_over_tensors(state: dict[str, Tensor]):
    less = {name: tensor for name, tensor in state.items() if not name.startswith("norm.running")}
    refused(r"does not fit method 'toy': it lacks norm\.running_mean, norm\.running_var", less)
    more = {**state, "head.weight": torch.ones(1), "head.bias": torch.ones(1)}
    refused(r"does not fit method 'toy': it has head\.weight, head\.bias left over", more)
    many = {**state, **{f"x{i}": torch.ones(1) for i in range(6)}}
    refused(r"it has x0, x1, x2 and 3 more left over", many)


def test_wrong_shape(state: dict[str, Tensor]):
    refused(r"it has norm\.weight \[2\] instead of \[6\]", {**state, "norm.weight": torch.ones(2)})


def test_other_channels(state: dict[str, Tensor]):
    refused("is for 8 channels, asked for 384", state, channels=384)


def test_channels_of_an_entry(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A method whose tensors do not tell, but whose weights were made for one C."""
    save_file(state, tmp_path / "c.safetensors")
    monkeypatch.setattr(Toy, "options_from", classmethod(lambda cls, state: {"dim": 6}))
    monkeypatch.setattr(Toy, "weights", {"a": Weights(str(tmp_path / "c.safetensors"), channels=768)})
    refused("is for 768 channels, asked for 8", "a")


def test_option_that_contradicts_the_checkpoint(state: dict[str, Tensor]):
    refused("has dim=6, asked for dim=3", state, dim=3)
    assert_filled(load_method("toy", state, channels=8, dim=6), state)


def test_checkpoint_of_another_method():
    refused("is not a checkpoint of method 'toy'", {"something.else": torch.ones(3)})


def test_values_that_are_not_finite(state: dict[str, Tensor]):
    state["mix.weight"][0, 0] = torch.nan
    refused(r"values that are not finite in mix\.weight", state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_file(state: dict[str, Tensor], tmp_path: Path, suffix: str, kept: float):
    path = tmp_path / f"c{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(rf"checkpoint .*c{suffix} is corrupt", path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_file_of_something_else(tmp_path: Path, suffix: str):
    (tmp_path / f"c{suffix}").write_text("<html>Not found</html>" * 20)
    refused("is corrupt", tmp_path / f"c{suffix}")


class _Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_run_no_code(state: dict[str, Tensor], tmp_path: Path):
    folder = tmp_path / "made by the pickle"
    for other, message in (
        (_Attack(folder), "is corrupt, or holds more than tensors"),
        (subprocess.run, "not a mapping of tensors: 'other' is a "),
        (tmp_path, "not a mapping of tensors: 'other' is a Opaque"),
    ):
        torch.save({**official(state), "other": other}, tmp_path / "c.pth")
        refused(message, tmp_path / "c.pth")
    assert not folder.exists()


def test_objects_of_a_training_beside_the_tensors(state: dict[str, Tensor], tmp_path: Path):
    """A configuration whose classes are not on this machine (JAFAR's release holds one)."""
    module = types.ModuleType("a_trainers_config")
    exec("class Config(dict): pass\nclass Node:\n  def __init__(self, x): self.x = x", module.__dict__)
    node = module.Node(module.Node({"lr": 1.0, "path": tmp_path}))
    sys.modules[module.__name__] = module
    try:
        for cls in (module.Config, module.Node):
            cls.__module__ = module.__name__
        torch.save({"cfg": node, "epoch": 3, "toy": official(state)}, tmp_path / "c.pth")
    finally:
        del sys.modules[module.__name__]
    assert_filled(load_method("toy", tmp_path / "c.pth", channels=8), state)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}], ids=str)
def test_not_a_mapping_of_tensors(tmp_path: Path, content: Any):
    torch.save(content, tmp_path / "c.pth")
    refused("not a mapping of tensors|is empty", tmp_path / "c.pth")


def test_path_that_is_not_there(tmp_path: Path):
    refused(r"checkpoint not found: .*none\.pth", tmp_path / "none.pth")
    refused(r"checkpoint not found: nowhere/c\.safetensors", "nowhere/c.safetensors")
    (tmp_path / "c.onnx").write_text("")
    refused(r"c\.onnx must end in one of \.safetensors", tmp_path / "c.onnx")


def test_unknown_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Toy, "weights", {"official": Weights("a.safetensors")})
    refused("unknown weights of method 'toy' 'offical'; did you mean 'official'", "offical")


def test_wrong_sha256(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file(state, tmp_path / "c.safetensors")
    entry = Weights(str(tmp_path / "c.safetensors"), sha256="0" * 64)
    monkeypatch.setattr(Toy, "weights", {"a": entry})
    refused(r"c\.safetensors is not weights 'toy:a': its sha256 is [0-9a-f]{64}, expected 0000", "a")


# -------------------- lists --------------------


def test_list_has_a_row_for_every_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    entries = {
        "remote": Weights("https://example.org/c.pth", license="MIT"),
        "other": Weights("o.safetensors"),
    }
    monkeypatch.setattr(Toy, "weights", entries)
    monkeypatch.setattr(Toy, "default_weights", "other")
    rows = {row.name: row for row in list_weights() if row.method == "toy"}
    assert [(row.default, row.place) for row in rows.values()] == [(False, "remote"), (True, "missing")]
    assert rows["remote"].entry.license == "MIT"
    (tmp_path / "c.pth").write_bytes(b"")
    monkeypatch.setenv("UPBENCH_WEIGHTS", str(tmp_path))
    assert [row.place for row in list_weights() if row.name == "remote" and row.method == "toy"] == ["local"]


def test_what_no_program_can_download(monkeypatch: pytest.MonkeyPatch, state, tmp_path: Path):
    """A page with files behind it: the user is told, and the file is found where it was put."""
    assert Weights("c.pth", licence="MIT") == Weights("c.pth", license="MIT")  # as the first edition spelt it
    assert Weights("c.pth", license="MIT").licence == "MIT"  # type: ignore[attr-defined]
    page = Weights("https://example.org/folder", filename="c.safetensors", license="MIT", by_hand=True)
    monkeypatch.setattr(Toy, "weights", {"a": page})

    def place() -> list[str]:
        return [row.place for row in list_weights() if row.method == "toy"]

    assert place() == ["by hand"]
    refused(r"fetch c\.safetensors from https://example\.org/folder and put it", "a")
    save_file(state, tmp_path / "c.safetensors")
    monkeypatch.setenv("UPBENCH_WEIGHTS", str(tmp_path))
    assert place() == ["local"]
    assert load_method("toy", "a", channels=8).training is False


def test_every_listed_entry_of_the_project_is_complete():
    """What ships has a pinned hash, what is downloaded has one or gets it then; all have a license."""
    for row in list_weights():
        assert row.place != "missing", f"{row.method}:{row.name}"
        assert row.entry.sha256 is not None or row.entry.remote, f"{row.method}:{row.name}"
        assert len(row.entry.sha256 or 64 * "0") == 64
        assert row.entry.license, f"{row.method}:{row.name}"


def test_module_imports_no_torch():
    code = "import sys, upbench.weights.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_weights_tied_to_a_backbone_are_no_use_to_another(monkeypatch: pytest.MonkeyPatch):
    tied = Weights("tied.pth", backbone="vit_tiny_patch8.one", channels=8)
    monkeypatch.setattr(
        Toy, "weights", {"tied": tied, "free": Weights("free.pth", backbone="vit_tiny_patch8")}
    )
    monkeypatch.setattr(Toy, "default_weights", "tied")

    def reason(weights: str, backbone: str, channels: int = 8) -> str | None:
        sizes = (16, 16), (2, 2), (16, 16)
        return weights_reason(Toy, Setting(backbone, channels, 8, *sizes, weights=weights))

    for name in ("tied", "default"):
        assert reason(name, "vit_tiny_patch8.one") is None
        assert reason(name, "vit_tiny_patch8") is None, "a tag may be left out"
        assert (
            reason(name, "vit_tiny_patch8.two") == "weights 'toy:tied' are for backbone 'vit_tiny_patch8.one'"
        )
        assert reason(name, "vit_tiny_patch8.one", 9) == "weights 'toy:tied' are for 8 channels, not 9"
    for name in ("free", "none", "some/path.pth"):
        assert reason(name, "another", 9) is None
