"""Latency, memory and the key of a measurement. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.registered import Registered
from upbench.contracts.upsampler import Sizes, Upsampler
from upbench.cost.measure import MAX_REPEATS, MIN_REPEATS, cost_key, measure
from upbench.cost.peakmemory import LINUX, cpu_peak_memory
from upbench.errors import UpbenchError
from upbench.registry import find_method, load_plugin_file

SIZES: dict[str, Any] = {
    "channels": 8,
    "image_size": (24, 20),
    "feature_size": (6, 5),
    "output_size": (24, 20),
}

PLUGIN = """
import torch
import torch.nn.functional as F
from upbench import Upsampler

class Hungry(Upsampler):
    name = "hungry"

    def __init__(self, channels=384, copies=1):
        super().__init__(channels)
        self.copies = copies
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, image, features, output_size):
        dense = F.interpolate(features, output_size)
        held = [dense + i for i in range(self.copies)]
        return torch.stack(held).mean(0)
"""


@pytest.fixture
def registry_as_it_was() -> Any:
    before = dict(Upsampler.registered)
    yield
    Upsampler.registered.clear()
    Upsampler.registered.update(before)


def test_measure_fills_every_field() -> None:
    method = find_method("bilinear").build()
    cost = measure(method, **SIZES, batch=2, seconds=0.05, memory=False)
    assert (cost.parameters, cost.macs) == (0, 4 * 2 * 8 * 24 * 20)
    assert 0 < cost.latency_q25_ms <= cost.latency_ms <= cost.latency_q75_ms
    assert MIN_REPEATS <= cost.repeats <= MAX_REPEATS
    assert cost.output_bytes == 2 * 8 * 24 * 20 * 4
    assert cost.peak_memory_bytes is None
    assert (cost.device, cost.dtype, cost.batch, cost.channels) == ("cpu", "float32", 2, 8)
    assert "thread" in cost.hardware
    assert cost.uncounted == ()
    plain = cost.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["image_size"] == [24, 20]


def test_measure_leaves_the_method_as_it_is() -> None:
    method = find_method("raysup").build(channels=8).train()
    before = {key: value.clone() for key, value in method.state_dict().items()}
    cost = measure(method, **SIZES, dtype="bfloat16", seconds=0, macs=False, memory=False)
    assert method.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in method.parameters())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert (cost.parameters, cost.dtype, cost.macs) == (102_592, "bfloat16", None)
    assert cost.output_bytes == 8 * 24 * 20 * 2
    assert cost.repeats == MIN_REPEATS
    assert any("3 passes" in w for w in cost.warnings)


def test_parameters_are_the_published_ones() -> None:
    count = {n: sum(p.numel() for p in find_method(n).build().parameters()) for n in ("raysup", "anyup")}
    assert count == {"raysup": 102_592, "anyup": 878_080}


class Untraceable(Upsampler):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError("cannot be traced")
        return F.interpolate(features, output_size)


Untraceable.name = "untraceable"  # after the class body: it is not to be registered


class Decomposing(Untraceable):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(torch.linalg.svd(features)[0][..., :5], output_size)


def test_what_cannot_be_counted_is_said() -> None:
    cost = measure(Untraceable(), **SIZES, seconds=0, memory=False)
    assert cost.macs is None
    assert any("cannot be traced" in w for w in cost.warnings)
    cost = measure(Decomposing(), **SIZES, seconds=0, memory=False)
    assert cost.uncounted == ("aten::linalg_svd",)
    assert any("aten::linalg_svd" in w for w in cost.warnings)


def test_peak_memory_of_a_builtin() -> None:
    sizes = Sizes(64, (128, 128), (16, 16), (256, 256))
    output = 64 * 256 * 256 * 4
    peak = cpu_peak_memory(find_method("bilinear").build(), sizes, torch.float32)
    assert peak.bytes is not None, peak.how
    assert 0.9 * output < peak.bytes < 1.5 * output
    if Path("/proc/self/clear_refs").exists():
        assert peak.how == LINUX


@pytest.mark.usefixtures("registry_as_it_was")
def test_peak_memory_of_a_plugin_file_in_its_options(tmp_path: Path) -> None:
    """A class that only a file holds is measured too, and temporary tensors count."""
    file = tmp_path / "hungry.py"
    file.write_text(PLUGIN)
    load_plugin_file(file)
    cls: Any = Upsampler.registered["hungry"]
    sizes = Sizes(64, (64, 64), (16, 16), (256, 256))
    output = 64 * 256 * 256 * 4
    peak = cpu_peak_memory(cls.build(copies=4), sizes, torch.float32)
    assert peak.bytes is not None, peak.how
    assert 8 * output < peak.bytes < 11 * output  # dense, four copies, their stack (and its mean)


def test_peak_memory_says_why_there_is_none() -> None:
    class Local(Upsampler, Registered):
        def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
            return features

    peak = cpu_peak_memory(Local(), Sizes(8, (8, 8), (4, 4), (8, 8)), torch.float32)
    assert peak.bytes is None
    assert "Local cannot be sent" in peak.how


def test_key_is_stable_and_tells_configurations_apart() -> None:
    key = cost_key("bilinear", **SIZES)
    assert key == cost_key(find_method("bilinear"), {}, **SIZES)
    assert key.startswith("bilinear-c8-24x20-float32-cpu-")
    assert "/" not in key
    others = [
        cost_key("bicubic", **SIZES),
        cost_key("bilinear", **SIZES, batch=2),
        cost_key("bilinear", **SIZES, dtype="bfloat16"),
        cost_key("bilinear", **{**SIZES, "feature_size": (3, 3)}),
        cost_key("jbu", **SIZES),
        cost_key("jbu", {"radius": 3}, **SIZES),
    ]
    assert len({key, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"device": "tpu"}, "unknown device 'tpu'"), ({"dtype": "float31"}, "did you mean 'float32'")],
)
def test_wrong_settings_are_named(wrong: dict[str, str], message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        measure(find_method("bilinear").build(), **SIZES, **wrong)  # type: ignore[arg-type]


def test_missing_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UpbenchError, match="'cuda' is not available"):
        measure(find_method("bilinear").build(), **SIZES, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu() -> None:
    sizes = {**SIZES, "channels": 64, "output_size": (256, 256)}
    cost = measure(find_method("bilinear").build(), **sizes, device="cuda", seconds=0.2)
    assert cost.device == "cuda"
    assert cost.hardware == torch.cuda.get_device_name()
    assert cost.peak_memory_bytes is not None
    assert cost.output_bytes <= cost.peak_memory_bytes < 1.5 * cost.output_bytes
