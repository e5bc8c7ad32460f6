"""Exported models against the methods: ONNX in a process without upbench, `.pt2`, `torch.compile`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from upbench import export as exporting
from upbench.cli import dispatch as cli
from upbench.contracts.upsampler import Sizes, Upsampler
from upbench.errors import UpbenchError
from upbench.export import Exported, export, export_method
from upbench.registry import plugins
from upbench.testing import assert_close
from upbench.weights.load import load_method

needs_onnx = pytest.mark.skipif(
    any(not exporting.importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
SIZES = Sizes(8, (28, 42), (5, 9), (20, 31))  # nothing divides anything


def run_elsewhere(path: Path, image: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The output of an ONNX file in a process that has neither upbench nor torch."""
    code = """
import sys
for name in ("upbench", "torch"):
    sys.modules[name] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
assert [i.name for i in session.get_inputs()] == ["image", "features"]
given = np.load(sys.argv[2])
np.save(sys.argv[3], session.run(["upsampled"], {"image": given["image"], "features": given["features"]})[0])
"""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "in.npz"), Path(folder, "out.npy")
        np.savez(given, image=image, features=features)
        subprocess.run([sys.executable, "-I", "-c", code, path, given, out], check=True, timeout=120)
        return np.load(out)


@needs_onnx
@pytest.mark.parametrize("name", ["raysup", "anyup", "bilinear"])
def test_onnx(name: str, tmp_path: Path):
    import onnx

    path = tmp_path / f"{name}.onnx"
    done = export(
        name,
        path,
        image_size=SIZES.image_size,
        feature_size=SIZES.feature_size,
        output_size=SIZES.output_size,
        channels=8,
        batch=2,
    )
    assert done.difference is not None
    assert done.difference <= exporting.TOLERANCE
    method = load_method(name, channels=8)
    image, features = torch.rand(2, 3, *SIZES.image_size), torch.randn(2, 8, *SIZES.feature_size)
    with torch.no_grad():
        expected = method(method.normalize(image), features, SIZES.output_size)
        image64 = method.normalize(image).double()
        exact = method.double()(image64, features.double(), SIZES.output_size)
    found = run_elsewhere(path, image.numpy(), features.numpy())
    assert_close(torch.from_numpy(found), expected, reference=exact)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["method"] == name
    assert json.loads(metadata["output_size"]) == [20, 31]
    assert json.loads(metadata["mean"]) == list(method.mean)
    if name == "raysup":
        assert metadata["weights"] == "dinov2_vits14_focus"
        assert metadata["weights_sha256"] == type(method).weights["dinov2_vits14_focus"].sha256
        assert "research-only" in metadata["weights_license"]


@pytest.mark.parametrize("name", ["raysup", "anyup", "bilinear", "jbu", "naf", "featup_jbu"])
def test_pt2(name: str, tmp_path: Path):
    method = load_method(name, weights="none", channels=8)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    done = export_method(method, tmp_path / "model.pt2", SIZES, about={"weights": "none"})
    extra = {exporting.METADATA_FILE: ""}
    loaded = torch.export.load(done.path, extra_files=extra)
    image, features = torch.rand(1, 3, *SIZES.image_size), torch.randn(1, 8, *SIZES.feature_size)
    with torch.no_grad():
        expected = method(method.normalize(image), features, SIZES.output_size)
    assert_close(loaded.module()(image, features), expected)
    assert json.loads(extra[exporting.METADATA_FILE]) == done.metadata
    assert done.metadata["weights"] == "none"
    assert_close(dict(method.state_dict()), before, terms=0)


class At(nn.Module):
    """A method at a fixed output size."""

    def __init__(self, method: Upsampler, size: tuple[int, int]) -> None:
        super().__init__()
        self.method = method
        self.size = size

    def forward(self, image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.method(image, features, self.size)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [(28, 42), (20, 31)])
@pytest.mark.parametrize("name", ["raysup", "anyup"])
def test_compiled_without_a_break(name: str, size: tuple[int, int]):
    module = At(load_method(name, weights="none", channels=8), size)
    image, features = torch.rand(1, 3, 28, 42), torch.randn(1, 8, 5, 9)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(image, features), module(image, features))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_has_the_same_gradients():
    module = At(load_method("raysup", weights="none", channels=8, dim=64), (20, 31))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    image, features = torch.rand(1, 3, 28, 42), torch.randn(1, 8, 5, 9)
    gradients = []
    for run in (module, compiled):
        module.zero_grad()
        run(image, features).square().mean().backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    assert_close(gradients[1], gradients[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not os.environ.get("UPBENCH_SLOW_TESTS"), reason="slow: UPBENCH_SLOW_TESTS=1 runs it")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    module = At(load_method("raysup", weights="none", channels=8), (28, 42))
    image, features = torch.rand(1, 3, 28, 42), torch.randn(1, 8, 4, 6)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(image, features), module(image, features))


def documented(root: Path) -> dict[str, dict[str, str]]:
    """The table of docs/export.md: method to format to "yes" or a reason."""
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", (root / "docs" / "export.md").read_text(), re.M
    )
    assert rows
    return {name: {"pt2": pt2.strip(), "onnx": onnx.strip()} for name, pt2, onnx in rows}


def test_the_table_names_every_method(root: Path):
    ours = {name for name, cls in plugins("method").items() if cls.__module__.startswith("upbench.")}
    assert set(documented(root)) == ours


@pytest.mark.skipif(not os.environ.get("UPBENCH_SLOW_TESTS"), reason="slow: UPBENCH_SLOW_TESTS=1 runs it")
@needs_onnx
def test_the_documented_table(root: Path, tmp_path: Path):
    sizes = Sizes(8, (32, 48), (4, 6), (32, 48))
    table = documented(root)
    found = {}
    for name, said in table.items():
        method = load_method(name, weights="none", channels=8)
        for kind in said:
            try:
                export_method(method, tmp_path / f"x.{kind}", sizes)
            except UpbenchError:
                found[name, kind] = False
            else:
                found[name, kind] = True
    assert found == {
        (name, kind): text == "yes" for name, said in table.items() for kind, text in said.items()
    }


def test_a_method_that_cannot_be_exported(tmp_path: Path):
    class Branches(Upsampler):
        def forward(self, image, features, output_size):
            return features if float(features.sum()) > 0 else -features

    Branches.name = "branches"
    with pytest.raises(UpbenchError, match="method 'branches' cannot be exported to pt2: "):
        export_method(Branches(8), tmp_path / "x.pt2", Sizes(8, (8, 8), (4, 4), (4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_differs(tmp_path: Path):
    class Drifts(Upsampler):
        calls = 0

        def forward(self, image, features, output_size):
            Drifts.calls += 1
            return features + Drifts.calls

    Drifts.name = "drifts"
    with pytest.raises(UpbenchError, match="drifts' exported to pt2 gives another output: it differs by 1"):
        export_method(Drifts(8), tmp_path / "x.pt2", Sizes(8, (8, 8), (4, 4), (4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UpbenchError, match="export format 'onx'"):
        export("bilinear", tmp_path / "x.onx", image_size=(8, 8))
    with pytest.raises(UpbenchError, match="unknown method 'raysupp'"):
        export("raysupp", tmp_path / "x.pt2", image_size=(8, 8))
    with pytest.raises(UpbenchError, match="feature size must be a whole number of at least 1, got 0"):
        export("bilinear", tmp_path / "x.pt2", image_size=(8, 8))
    with pytest.raises(UpbenchError, match="for these sizes: raysup needs a multiple of 4 channels"):
        export("raysup", tmp_path / "x.pt2", image_size=(56, 56), channels=7)
    with pytest.raises(UpbenchError, match="cannot be exported: it runs the backbone itself"):
        export("large_image", tmp_path / "x.pt2", image_size=(56, 56))
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UpbenchError, match=r"needs onnx and onnxscript: pip install 'upbench\[export\]'"):
        export("bilinear", tmp_path / "x.onnx", image_size=(56, 56))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fake(method: str, out: str, **settings: object) -> Exported:
        Path(out).write_bytes(b"model")
        given.update(settings, method=method)
        return Exported(Path(out), "pt2", 1e-6, {})

    given: dict[str, object] = {}
    monkeypatch.setattr(exporting, "export", fake)
    words = (
        f"export raysup:none --out {tmp_path}/x.pt2 --image-size 448 --feature-size 32x31 --options dim=64"
    )
    assert cli.main(words.split()) == 0
    assert "checked: differs from raysup by at most 1.0e-06" in capsys.readouterr().out
    assert (given["method"], given["weights"], given["options"]) == ("raysup", "none", {"dim": 64})
    assert (given["image_size"], given["feature_size"], given["output_size"]) == ((448, 448), (32, 31), None)
    assert cli.main(f"export raysup --out {tmp_path}/x.pt2 --image-size 448 --batch 0".split()) == 2
    assert "--batch must be a whole number from 1" in capsys.readouterr().err
