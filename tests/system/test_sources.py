"""Which files decide on a plugin's numbers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from upbench.methods.nearest import Nearest
from upbench.methods.raysup import RaysUp
from upbench.system import sources
from upbench.system.sources import source_files, source_fingerprint


def names(cls: type) -> set[str]:
    return {f"{file.parent.name}/{file.name}" for file in source_files(cls)}


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[ModuleType]:
    """A module with a class whose file imports nothing of ours."""
    file = tmp_path / "a_plugin.py"
    file.write_text("class Plain:\n    pass\n")
    spec = importlib.util.spec_from_file_location("a_plugin", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["a_plugin"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["a_plugin"]


def test_the_own_file_comes_with_the_shared_modules_behind_it():
    shared = {"layers/rays.py", "layers/convolutions.py", "window/attention.py", "window/tables.py"}
    assert {*shared, "contracts/operator.py"} <= names(RaysUp)
    assert source_files(RaysUp)[0].name == "raysup.py"
    assert "window/attention.py" not in names(Nearest)


def test_a_change_of_any_of_them_changes_the_fingerprint(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = source_fingerprint(plugin.Plain)
    assert before == source_fingerprint(plugin.Plain)
    (tmp_path / "ops").mkdir()
    shared = tmp_path / "ops" / "thing.py"
    shared.write_text("A = 1\n")
    (tmp_path / "a_plugin.py").write_text("from upbench.ops import thing\n\nclass Plain:\n    pass\n")
    monkeypatch.setattr(sources, "_CORE", tmp_path)
    sources._imported.cache_clear()
    using = source_fingerprint(plugin.Plain)
    assert using != before
    assert source_files(plugin.Plain)[1:] == (shared,)
    shared.write_text("A = 2\n")
    assert source_fingerprint(plugin.Plain) != using


def test_a_path_of_before_leads_to_the_file_of_now(plugin: ModuleType, tmp_path: Path):
    (tmp_path / "a_plugin.py").write_text(
        "from upbench.ops.windows import tiling\n\nclass Plain:\n    pass\n"
    )
    sources._imported.cache_clear()
    assert "window/tables.py" in names(plugin.Plain)


def test_a_class_without_a_file_has_none():
    assert source_fingerprint(type("Nowhere", (), {"__module__": "builtins"})) is None
