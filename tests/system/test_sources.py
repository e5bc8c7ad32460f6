"""Which files decide on a plugin's numbers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from upbench.methods.nearest import Nearest
from upbench.methods.raysup import RaysUp
from upbench.system import sources
from upbench.system.sources import code_digest, source_files, source_fingerprint


def names(cls: type) -> set[str]:
    return {f"{file.parent.name}/{file.name}" for file in source_files(cls)}


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., ModuleType]]:
    """Writes files of a plugin and gives the first as a module, with a class `Plain`; nothing is executed."""
    loaded = set()

    def imported(text: str, name: str = "a_plugin", **others: str) -> ModuleType:
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\nclass Plain:\n    pass\n")
        for other, content in others.items():
            (file.parent / f"{other}.py").write_text(content)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.Plain = type("Plain", (), {"__module__": name})  # what it imports need not be there
        sys.modules[name] = module
        loaded.add(name)
        module.__file__ = str(file)
        return module

    yield imported
    for name in loaded:
        del sys.modules[name]
    sources._imported.cache_clear()  # of what was read while something was patched


def test_the_own_file_comes_with_the_shared_modules_behind_it():
    shared = {"layers/rays.py", "layers/convolutions.py", "window/attention.py", "window/tables.py"}
    assert {*shared, "contracts/operator.py"} <= names(RaysUp)
    assert source_files(RaysUp)[0].name == "raysup.py"
    assert "window/attention.py" not in names(Nearest)


def test_a_change_of_any_of_them_changes_the_fingerprint(load, tmp_path, monkeypatch):
    plain = load("").Plain
    before = source_fingerprint(plain)
    assert before == source_fingerprint(plain)
    (tmp_path / "ops").mkdir()
    shared = tmp_path / "ops" / "thing.py"
    shared.write_text("A = 1\n")
    plain = load("from upbench.ops import thing").Plain
    monkeypatch.setattr(sources, "_CORE", tmp_path)
    sources._imported.cache_clear()
    using = source_fingerprint(plain)
    assert using != before
    assert source_files(plain)[1:] == (shared,)
    shared.write_text("A = 2\n")
    assert source_fingerprint(plain) != using


IMPORTS = [
    ("from upbench.metrics import depth", {"metrics/depth.py"}),
    ("from upbench.metrics import depth_metrics", {"metrics/depth.py"}),
    ("import upbench.metrics.depth", {"metrics/depth.py"}),
    ("import upbench.metrics.depth as d", {"metrics/depth.py"}),
    ("import upbench.metrics as m\nm.depth_metrics(1)", {"metrics/depth.py"}),
    ("from upbench import metrics\nmetrics.depth.depth_metrics(1)", {"metrics/depth.py"}),
    ("import upbench\nupbench.metrics.depth.MIN_DEPTH", {"metrics/depth.py"}),
    ("def f():\n    from upbench.metrics.depth import DEPTH_METRICS", {"metrics/depth.py"}),
    ("try:\n    import upbench.metrics.depth\nexcept ImportError:\n    pass", {"metrics/depth.py"}),
    # a constant does not say where it is from: all that the package hands on
    ("from upbench.metrics import MIN_DEPTH", {"metrics/depth.py", "metrics/segmentation.py"}),
    ("from upbench import Upsampler", {"contracts/upsampler.py"}),
    ("import upbench\nclass Mine(upbench.ProbeTask):\n    pass", {"evaluate/task.py", "evaluate/probe.py"}),
    ("import upbench as up\nup.SquareCrop(3)", {"protocols/geometry.py"}),
    ("from upbench.ops import window_operator", {"window/attention.py", "window/tables.py"}),
    ("from upbench.methods.jbu import JBU", {"methods/jbu.py", "ops/resample.py"}),
    ("from upbench.methods import jbu", {"methods/jbu.py"}),
    ("from upbench.tasks.depth import Depth", {"tasks/depth.py", "metrics/depth.py", "evaluate/probe.py"}),
    # paths of the first edition
    ("from upbench.ops.windows import tiling", {"window/tables.py"}),
    ("from upbench.ops.windows import *", {"window/tables.py"}),
    ("import upbench.upsampled", {"dense/view.py"}),
    ("from upbench.probes import train_probes", {"evaluate/probe.py"}),
]


@pytest.mark.parametrize(("text", "files"), IMPORTS, ids=[text for text, _ in IMPORTS])
def test_ways_to_import(load, text, files):
    assert files <= names(load(text).Plain)


@pytest.mark.parametrize(
    "text",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import upbench.metrics.depth",
        "import typing\nif typing.TYPE_CHECKING:\n    import upbench.metrics.depth",
        "from upbench.system.progress import say\nfrom upbench.errors import UpbenchError",
        "from upbench import UpbenchError, errors",
        "import torch, numpy as np\ntorch.zeros(np.pi)",
    ],
)
def test_what_decides_on_no_number_is_left_out(load, text):
    plain = load(text).Plain
    assert source_files(plain) == (Path(sys.modules["a_plugin"].__file__),)


def test_a_branch_beside_that_for_type_checkers_counts(load):
    text = "import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    import upbench.metrics.depth"
    assert "metrics/depth.py" in names(load(text).Plain)


# ------------------------------------------------------------------------------- plugins from elsewhere


def test_relative_imports_of_methods(load, tmp_path, monkeypatch):
    """Beside upbench, as in a checkout, and in it, as it is installed."""
    (tmp_path / "methods").mkdir()
    shared = tmp_path / "methods" / "_shared.py"
    shared.write_text("A = 1\n")
    folder = sources._folder

    def elsewhere(module: str) -> Path:
        inside = module.startswith("upbench.methods")
        return tmp_path.joinpath(*module.split(".")[1:]) if inside else folder(module)

    monkeypatch.setattr(sources, "_folder", elsewhere)
    sources._imported.cache_clear()
    for text in ("from ._shared import A", "from . import _shared", "from upbench.methods._shared import A"):
        assert source_files(load(text, "methods.mine").Plain)[1:] == (shared,), text


@pytest.mark.parametrize("text", ["from .parts import A", "from . import parts", "from mine.parts import A"])
def test_a_package_counts_as_a_whole(load, tmp_path, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    plain = load(
        text + "\nimport torch", "mine.method", parts="from .more import B\nA = 1\n", more="B = 1"
    ).Plain
    found = {file.name for file in source_files(plain)}
    assert {"method.py", "parts.py", "more.py"} <= found
    assert not [file for file in source_files(plain) if file.parent.name == "torch"], (
        "others' packages do not"
    )


def test_files_beside_a_file_count(load, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    plain = load("import torch\nfrom helper import A", helper="import other", other="").Plain
    assert [file.name for file in source_files(plain)] == ["a_plugin.py", "helper.py", "other.py"]


def test_a_class_without_a_file_has_none():
    nowhere = type("Nowhere", (), {"__module__": "builtins"})
    assert source_fingerprint(nowhere) is None
    assert code_digest(nowhere) == code_digest(nowhere) != code_digest(Nearest)


# ---------------------------------------------------------------------------------- what code does


def test_words_do_not_count_and_statements_do(load):
    def digest(text: str, **others: str) -> str:
        return code_digest(load(text, **others).Plain)

    plain = digest("A = 1")
    assert digest('"""Words."""\n\n\nA  =  1  # a comment') == plain
    assert digest("A = 2") != plain


def test_files_beside_it_count_for_what_code_does(load, tmp_path):
    def digest(helper: str) -> str:
        return code_digest(load("from helper import A", helper=helper).Plain)

    assert digest("A = 1") == digest("A = 1  # the same")
    assert digest("A = 1") != digest("A = 2")


def test_modules_elsewhere_do_not_count_for_what_code_does(load, monkeypatch):
    plain, read = load("import upbench.metrics.depth").Plain, []
    assert len(source_files(plain)) > 1
    monkeypatch.setattr(sources, "_statements", lambda source: read.append(source) or b"")
    code_digest(plain)
    assert read == [source_files(plain)[0].read_bytes()]
