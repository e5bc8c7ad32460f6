"""Backends of window attention: all agree with a plain gather; how one is chosen; what they refuse.

Without a GPU, Triton's kernels run in its interpreter (`TRITON_INTERPRET`, set in conftest.py), and a test
compiles them for one without running them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from windowing import problems

from upbench.contracts.sample import Camera
from upbench.errors import UpbenchError
from upbench.ops import use_backend
from upbench.ops.window import attention as window
from upbench.ops.window import natten_window, triton_window
from upbench.ops.window.attention import window_attention
from upbench.ops.window.tables import fraction_table, neighbourhood_table
from upbench.testing import assert_close
from upbench.weights.load import load_method

fuzz = settings(max_examples=8, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

needs_triton = pytest.mark.skipif(
    bool(triton_window.available(DEVICE)), reason=triton_window.available(DEVICE) or "runs"
)
needs_natten = pytest.mark.skipif(bool(natten_window.available()), reason=natten_window.available() or "runs")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def rounded(problem: dict[str, Any], dtype: torch.dtype, device: torch.device = DEVICE) -> dict[str, Any]:
    """The problem in another precision, and its twin in float64 with the same values."""
    return {n: v.to(device, dtype, copy=True) if n in "qkv" else v for n, v in problem.items()}


def example(average: bool = False, scale: float = 1.0, **sizes: int) -> dict[str, Any]:
    """A ratio that is whole along rows and is not along columns, 12 channels of values a head."""
    h, w, height, width = (sizes.get(n, d) for n, d in (("h", 3), ("w", 4), ("height", 12), ("width", 18)))
    table, window_size = (fraction_table, 0.3) if average else (neighbourhood_table, 3)
    return {
        "q": torch.randn(2, 16, height, width, dtype=torch.float64),
        "k": scale * torch.randn(2, 16, h, w, dtype=torch.float64),
        "v": torch.randn(2, 24, h, w, dtype=torch.float64),
        "rows": table(height, h, window_size),
        "cols": table(width, w, window_size),
        "heads": 2,
        "average_heads": average,
    }


def agrees(problem: dict[str, Any], backend: str, dtype: torch.dtype, gradients: bool = True) -> None:
    """Output and gradients are those of the gather in float64, but for the rounding of the dtype."""
    given_ = rounded(problem, dtype)
    exact = rounded(given_, torch.float64, CPU)
    inputs, references = ([p[n].requires_grad_(gradients) for n in "qkv"] for p in (given_, exact))
    result = window_attention(**given_, backend=backend)
    expected = window_attention(**exact, backend="reference")
    assert result.dtype == dtype
    assert result.is_contiguous()
    pairs = [(result, expected)]
    if gradients:
        weight = torch.randn_like(result)
        ours = torch.autograd.grad(result, inputs, weight)
        theirs = torch.autograd.grad(expected, references, weight.to(CPU, torch.float64))
        pairs += zip(ours, theirs, strict=True)
    for mine, other in pairs:
        size = max(1.0, float(other.detach().abs().max()))  # gradients may cancel
        assert_close(mine.to(CPU), other, terms=256 if dtype == torch.float32 else 1, scale=size)


@needs_triton
@fuzz
@given(problems(cells=4, pixels=9), st.sampled_from(DTYPES))
def test_triton_agrees(problem: dict[str, Any], dtype: torch.dtype) -> None:
    agrees({**problem, "k": problem["k"] / 3}, "triton", dtype)


@needs_triton
@pytest.mark.parametrize("average", [False, True])
def test_triton_with_several_blocks(average: bool) -> None:
    """More rows than a step, more columns than a tile, more value channels than a block."""
    problem = example(average, height=9, width=35)
    problem["v"] = torch.randn(2, 264, 3, 4, dtype=torch.float64)
    agrees({n: v[:1] if n in "qkv" else v for n, v in problem.items()}, "triton", torch.float32)


@needs_triton
def test_triton_takes_any_layout_and_mixed_precision() -> None:
    problem = rounded(example(), torch.float32)
    expected = window_attention(**problem, backend="reference")
    wide = torch.randn(2, 32, 12, 20, device=DEVICE)
    q = wide[:, ::2, :, 1:-1].copy_(problem["q"])  # neither planes nor channels are dense
    result = window_attention(**{**problem, "q": q}, backend="triton")
    assert_close(result, expected)
    half = {n: problem[n].bfloat16() for n in "qk"}
    result = window_attention(**{**problem, **half}, backend="triton")
    assert result.dtype == torch.float32
    assert_close(result, expected, terms=1, dtype=torch.bfloat16)


@needs_triton
def test_triton_is_deterministic() -> None:
    problem = rounded(example(height=6, width=8), torch.float32)
    for name in "qkv":
        problem[name].requires_grad_()
    runs = []
    for _ in range(2):
        out = window_attention(**problem, backend="triton")
        runs.append(torch.autograd.grad(out.square().sum(), [problem[n] for n in "qkv"]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_triton
def test_triton_is_one_operation_of_a_graph() -> None:
    """Traced without a break; its shapes, strides and gradients are declared rightly."""
    problem = rounded(example(height=6, width=8), torch.float32)
    attend = torch.compile(window_attention, backend="aot_eager", fullgraph=True)
    results = []
    for run in (attend, window_attention):
        q = problem["q"].detach().requires_grad_()
        out = run(**{**problem, "q": q}, backend="triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    for traced, eager in zip(*results, strict=True):
        assert_close(traced, eager)


@needs_triton
def test_triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UpbenchError, match="queries are float64"):
        window_attention(**example(), backend="triton")
    large = {**example(average=True), "rows": fraction_table(12, 3, 1.0)}
    large |= {n: torch.randn(1, 24, 60, 60, device=DEVICE) for n in "kv"}
    large |= {"q": torch.randn(1, 24, 12, 18, device=DEVICE)}
    large |= {"rows": fraction_table(12, 60, 1.0), "cols": fraction_table(18, 60, 1.0)}
    with pytest.raises(UpbenchError, match="window of 60x60 cells does not fit on chip"):
        window_attention(**large, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UpbenchError, match="Triton is not installed"):
        window_attention(**rounded(example(), torch.float32), backend="triton")


@needs_triton
def test_triton_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UpbenchError, match=r"tensors are on 'cpu'"):
        window_attention(**rounded(example(), torch.float32, CPU), backend="triton")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_compile_for_a_gpu(root: Path, tmp_path: Path) -> None:
    """What the interpreter lets pass, the compiler does not: types, shapes of blocks, layouts."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = root / "tests" / "ops" / "window" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kernels = ["forward", "backward_queries_keys", "backward_values", "collect"]
    assert done.stdout.split() == kernels + kernels[:2]


@needs_natten
@settings(fuzz, max_examples=5)
@given(st.data(), st.booleans(), st.sampled_from(DTYPES))
def test_natten_agrees(data: st.DataObject, average: bool, dtype: torch.dtype) -> None:
    sizes = {n: data.draw(st.integers(2, most), n) for n, most in (("h", 5), ("w", 5))}
    sizes |= {
        n: data.draw(st.integers(2 * sizes[low], 12), n) for n, low in (("height", "h"), ("width", "w"))
    }
    problem = example(**sizes) | {"average_heads": average}
    for axis, size, cells in (("rows", "height", "h"), ("cols", "width", "w")):
        kernel = data.draw(st.integers(2, 4), axis)
        problem[axis] = neighbourhood_table(sizes[size], sizes[cells], kernel)
    agrees(problem, "natten", dtype, gradients=DEVICE.type == "cuda")


@needs_natten
def test_natten_refuses() -> None:
    problem = rounded(example(), torch.float32)
    one = {**problem, "rows": neighbourhood_table(12, 3, 1)}
    far = {**problem, "q": torch.randn(2, 16, 120, 180), "rows": neighbourhood_table(120, 3, 3)}
    far |= {"cols": neighbourhood_table(180, 4, 3)}
    for change, message in (
        (example(average=True), "row table .* is no neighbourhood"),
        ({**problem, "cols": problem["cols"].flip(0)}, "column table .* is no neighbourhood"),
        (one, "windows of one cell"),
        ({**problem, "q": problem["q"].half()}, "one dtype"),
        *([] if DEVICE.type == "cuda" else [(far, "120x180 pixels are too many")]),
    ):
        with pytest.raises(UpbenchError, match=f"attention backend 'natten': .*{message}"):
            window_attention(**change, backend="natten")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that run, in their order."""
    names: list[str] = []
    for name, run in window.BACKENDS.items():
        monkeypatch.setitem(
            window.BACKENDS,
            name,
            lambda *a, n=name, r=run: (names.append(n), r(*a))[1],  # type: ignore
        )
    return names


def test_choice(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument over context over environment over what is fastest."""
    problem = rounded(example(), torch.float32, CPU)
    window_attention(**problem)
    monkeypatch.setenv("UPBENCH_ATTENTION", "reference")
    window_attention(**problem)
    with use_backend("torch"):
        window_attention(**problem)
        with use_backend("reference"):
            window_attention(**problem)
            window_attention(**problem, backend="torch")
        with use_backend("auto"):
            window_attention(**problem)
    window_attention(**problem)
    assert calls == ["torch", "reference", "torch", "reference", "torch", "torch", "reference"]


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UpbenchError, match="did you mean 'triton'"), use_backend("tritn"):
        pass
    monkeypatch.setenv("UPBENCH_ATTENTION", "nattn")
    with pytest.raises(UpbenchError, match=r"from UPBENCH_ATTENTION\) 'nattn'; did you mean 'natten'"):
        window_attention(**example())


@pytest.mark.parametrize("backend", [name for name in window.BACKENDS if name != "torch"])
def test_golden_of_raysup(golden_dir: Path, backend: str, calls: list[str]) -> None:
    """A case of every kind that the backend can run here: methods know nothing of the backends."""
    folder = golden_dir / "raysup"
    stored = load_file(folder / "case4.safetensors", device=str(DEVICE))
    weights = load_file(folder / "case1.safetensors")
    state = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    method = load_method("raysup", weights=state, channels=stored["features"].shape[1]).to(DEVICE)
    size = tuple(stored["output"].shape[2:])
    views = Camera(stored["fxfycxcy"], stored["c2w"])
    with torch.inference_mode(), use_backend(backend):
        try:
            output = method(stored["image"], stored["features"], size, camera=views)
        except UpbenchError as error:
            pytest.skip(str(error))
        with use_backend("torch"):
            views = Camera(stored["fxfycxcy"].double(), stored["c2w"].double())
            exact = method.double()(stored["image"].double(), stored["features"].double(), size, camera=views)
    assert calls == [backend, "torch"]
    assert_close(output, stored["output"], reference=exact)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton", "natten"])
def test_gpu(backend: str, average: bool, dtype: torch.dtype) -> None:
    problem = example(average, h=16, w=20, height=224, width=280)
    problem |= {n: torch.randn(2, 128, *problem[n].shape[2:], dtype=torch.float64) for n in "qk"}
    try:
        agrees(problem, backend, dtype)
    except UpbenchError as error:
        pytest.skip(str(error))


@needs_gpu
def test_triton_is_what_a_gpu_gets(calls: list[str]) -> None:
    window_attention(**rounded(example(), torch.bfloat16))
    window_attention(**rounded(example(), torch.float64))
    assert calls == ["triton", "torch"]
