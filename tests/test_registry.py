"""Registration by subclassing, discovery, did-you-mean, and the faults of plugins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upbench import registry
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError, nearest, unknown

METHOD = """
import torch.nn.functional as F
from upbench import Upsampler

class Mine(Upsampler):
    name = "{name}"

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size)
"""


@pytest.fixture(autouse=True)
def _restore_table():
    """Undoes what a test registers."""
    registry.plugins("method")
    before = dict(Upsampler.registered)
    modules = set(sys.modules)
    yield
    Upsampler.registered.clear()
    Upsampler.registered.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("upbench_plugin_"):
            del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_built_ins_are_found():
    assert {"nearest", "bilinear", "raysup", "anyup"} <= set(registry.plugins("method"))
    assert {"seg", "depth", "normals"} <= set(registry.plugins("task"))
    assert {"interiors", "camvid", "folder"} <= set(registry.plugins("dataset"))


def test_names_come_sorted():
    for kind in ("method", "task", "dataset"):
        names = list(registry.plugins(kind))
        assert names == sorted(names)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UpbenchError, match="unknown method 'raysap'; did you mean 'raysup'"):
        registry.find("method", "raysap")


def test_unknown_name_without_a_near_one_lists_what_there_is():
    with pytest.raises(UpbenchError, match="known: depth, normals, seg"):
        registry.find("task", "zzzzzz")


def test_nearest_ignores_case_and_completes_prefixes():
    assert nearest("RaysUP", ["raysup", "anyup"]) == "raysup"
    assert nearest("guided", ["guided_filter", "jbu"]) == "guided_filter"
    assert nearest("qqq", ["raysup"]) is None
    assert "\n" not in str(unknown("method", "x", ["a", "b"]))


def test_plugin_file_registers_once(tmp_path):
    file = write(tmp_path / "mine.py", METHOD.format(name="mine"))
    registry.load_plugin_file(file)
    registry.load_plugin_file(file)
    assert registry.find_method("mine").name == "mine"


def test_two_plugins_with_one_name_are_refused_and_both_named(tmp_path):
    first = write(tmp_path / "first.py", METHOD.format(name="mine"))
    second = write(tmp_path / "second.py", METHOD.format(name="mine"))
    registry.load_plugin_file(first)
    with pytest.raises(UpbenchError, match=r"two methods claim the name 'mine'.*first\.py.*second\.py"):
        registry.load_plugin_file(second)


def test_a_plugin_cannot_take_the_name_of_a_built_in(tmp_path):
    file = write(tmp_path / "mine.py", METHOD.format(name="bilinear"))
    original = registry.find_method("bilinear")
    with pytest.raises(UpbenchError, match="two methods claim the name 'bilinear'"):
        registry.load_plugin_file(file)
    assert registry.find_method("bilinear") is original


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('no\\ngood')", "raises RuntimeError on import: no good"),
        ("import not_a_module_at_all", "raises ModuleNotFoundError on import"),
        ("def broken(:", "raises SyntaxError on import"),
        ("x = 1", "registers nothing"),
        (METHOD.format(name="has space"), "must be a non-empty word"),
    ],
)
def test_faulty_plugin_file_is_one_line_and_leaves_nothing(tmp_path, text, message):
    file = write(tmp_path / "faulty.py", text)
    before = dict(Upsampler.registered)
    with pytest.raises(UpbenchError, match=message) as caught:
        registry.load_plugin_file(file)
    assert "\n" not in str(caught.value)
    assert before == Upsampler.registered
    assert not any(name.startswith("upbench_plugin_faulty") for name in sys.modules)


def test_a_plugin_that_fails_halfway_leaves_no_method(tmp_path):
    file = write(tmp_path / "half.py", METHOD.format(name="half") + "\nraise ValueError('late')\n")
    with pytest.raises(UpbenchError, match="raises ValueError on import: late"):
        registry.load_plugin_file(file)
    with pytest.raises(UpbenchError, match="unknown method 'half'"):
        registry.find("method", "half")


@pytest.mark.parametrize("name", ["missing.py", "notes.txt"])
def test_plugin_path_that_is_no_python_file(tmp_path, name):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UpbenchError, match="plugin file"):
        registry.load_plugin_file(tmp_path / name)


def test_subclass_without_a_name_is_abstract():
    class Step(Upsampler):
        pass

    assert Step not in Upsampler.registered.values()


def test_entry_points_are_loaded(tmp_path):
    """A distribution that declares `upbench.methods` shows up beside the built-ins."""
    write(tmp_path / "otherpackage.py", METHOD.format(name="fromelsewhere"))
    info = tmp_path / "otherpackage-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: otherpackage\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[upbench.methods]\nanything = otherpackage:Mine\n")
    code = "from upbench.registry import plugins; print(*plugins('method'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert "fromelsewhere" in run.stdout.split()
    assert "bilinear" in run.stdout.split()


def test_open_dataset_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("UPBENCH_DATA", raising=False)
    with pytest.raises(UpbenchError, match="did you mean 'interiors'"):
        registry.open_dataset("interior")
    with pytest.raises(UpbenchError, match="needs its folder"):
        registry.open_dataset("camvid")
    with pytest.raises(UpbenchError, match="dataset folder not found"):
        registry.open_dataset(f"camvid:{tmp_path / 'nowhere'}")
