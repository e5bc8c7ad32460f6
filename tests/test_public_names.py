"""Names that code outside this repository imports: the public ones, and the paths of the first edition."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import upbench
from upbench._old_paths import GONE, PATHS
from upbench.registry import load_plugin_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

OLD = {
    "upbench.base": "Upsampler Task Camera Evaluator Metric Setting IMAGENET_MEAN normalize_image",
    "upbench.weights": "Weights load_method list_weights weights_fingerprint",
    "upbench.datasets.base": "Dataset Sample IGNORE digest",
    "upbench.backbones": "Backbone BackboneInfo load_backbone list_backbones",
    "upbench.config": "RunConfig MethodSpec Cell DEFAULT_BACKBONE match_names",
    "upbench.records": "Record read_records write_json frame",
    "upbench.runner": "run",
    "upbench.work": "Worker",
    "upbench.plan": "make_plan build_method",
    "upbench.streaming": "upsample_tiles upsample_to",
    "upbench.metrics": "mean_iou depth_metrics angle_metrics confusion_matrix boundary_areas NAN",
    "upbench.protocol": "ProbeConfig",
    "upbench.report": "show write render build_tables",
    "upbench.macs": "MacCount count_macs",
    "upbench.peakmemory": "Sizes cpu_peak_memory",
    "upbench.cost": "Cost cost_key hardware DTYPES",
    "upbench.train": "train TrainConfig ViewConfig",
    "upbench.progress": "bar track say",
    "upbench.cache": "cache_dir replacing sha256_file",
    "upbench.cli": "main",
    "upbench.ops": "Operator FunctionOperator window_operator window_attention use_backend project",
    "upbench.ops.operator": "Operator FunctionOperator SourcedOperator project",
    "upbench.ops.window": "window_operator window_attention WindowOperator QueryRows",
    "upbench.ops.windows": "neighbourhood_table neighbourhood_tables fraction_table Tiling tiling",
    "upbench.ops.backends": "use_backend",
    "upbench.ops.tiled": "TiledWindows",
    "upbench.ops.doubling": "doubling",
    "upbench.ops.resample": "to_size",
}
"""Paths of the first edition -> names that were imported from there."""


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in OLD for name in OLD[path].split()])
def test_old_paths_work(path: str, name: str):
    value = getattr(importlib.import_module(path), name)
    if inspect.isclass(value) or inspect.isfunction(value):
        owner = importlib.import_module(value.__module__)
        assert getattr(owner, value.__name__) is value, "the same object, not a copy"


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in GONE for name in GONE[path]])
def test_what_is_gone_says_what_there_is_instead(path: str, name: str):
    with pytest.raises(upbench.UpbenchError, match=f"there is no {path}.{name} any more: "):
        getattr(importlib.import_module(path), name)
    for place in re.findall(r"upbench(?:\.\w+)+", GONE[path][name]):
        owner, _, attribute = place.rpartition(".")
        assert resolved(owner, attribute) is not None


def resolved(path: str, name: str) -> object:
    """`path.name`, where the path may lead through a class."""
    try:
        return getattr(importlib.import_module(path), name)
    except ImportError:
        owner, _, attribute = path.rpartition(".")
        return getattr(getattr(importlib.import_module(owner), attribute), name)


def test_a_plugin_that_imports_what_is_gone_is_told_in_one_line(tmp_path: Path):
    file = tmp_path / "old.py"
    file.write_text("from upbench.protocol import PRESETS\n")
    with pytest.raises(upbench.UpbenchError, match=r"a preset is a protocol now: see upbench\.Protocol"):
        load_plugin_file(file)


def test_old_and_new_name_of_a_recipe():
    from upbench.protocol import ProbeConfig

    assert ProbeConfig is upbench.Recipe


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_old_path_leads_somewhere(path: str):
    module = importlib.import_module(path)
    assert module.__all__
    with pytest.raises(AttributeError, match="has no 'nonsense'"):
        _ = module.nonsense
    with pytest.raises(ImportError):
        importlib.import_module(f"{path}.nonsense")


def test_old_paths_in_a_fresh_process():
    """In the order of a plugin file: nothing else of upbench was imported."""
    code = (
        "from upbench.base import Camera, Evaluator, Metric, Setting, Task, Upsampler\n"
        "from upbench.datasets.base import Dataset, Sample\n"
        "from upbench.weights import Weights, load_method\n"
        "from upbench.ops.windows import *\n"
        "from upbench.ops import windows, Operator\n"
        "import upbench\n"
        "assert Upsampler is upbench.Upsampler and Weights is upbench.Weights and Sample is upbench.Sample\n"
        "assert neighbourhood_table is windows.neighbourhood_table\n"
        "assert upbench.base.Upsampler is Upsampler and upbench.config.RunConfig is upbench.RunConfig\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["upbench.RunConfig", "upbench.run", "__import__('upbench.run.loop')"])
def test_run_is_a_function_and_a_package(first: str):
    """Whichever is touched first."""
    code = (
        f"import upbench; {first}; import upbench.run.loop\n"
        "from upbench import run\n"
        "assert run is upbench.run and callable(run) and upbench.run.loop.run\n"
        "try: run(upbench.RunConfig(methods='raysap'))\n"
        "except upbench.UpbenchError as error: assert 'raysup' in str(error)\n"
        "else: raise SystemExit('ran')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def mentioned() -> list[str]:
    """Dotted paths of upbench that the documentation names."""
    found: set[str] = set()
    for page in PAGES:
        for path in re.findall(r"\bupbench(?:\.\w+)+", page.read_text()):
            if not path.endswith((".json", ".x")):  # files, and what stands for any module
                found.add(path)
    return sorted(found)


@pytest.mark.parametrize("path", mentioned())
def test_paths_in_the_documentation_lead_somewhere(path: str):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return


def test_every_public_name_resolves():
    for name in upbench.__all__:
        assert getattr(upbench, name) is not None
    assert set(upbench.__all__) <= set(dir(upbench))
    assert set(upbench.__all__) == {"__version__", *upbench._LAZY}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = upbench.nonsense


def test_import_and_light_modules_need_no_torch():
    code = (
        "import sys, upbench, upbench.registry, upbench.run, upbench.run.config, upbench.run.claims\n"
        "import upbench.run.loop, upbench.run.executors, upbench.results.records, upbench.results.report\n"
        "import upbench.cli.dispatch, upbench.dense.camera, upbench.weights.resolve, upbench.errors\n"
        "import upbench.system.sources, upbench.contracts.registered, upbench.contracts.weights\n"
        "import upbench.metrics, upbench.features, upbench.train, upbench.cost, upbench.base\n"
        "print(sorted({'torch', 'pandas', 'timm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
