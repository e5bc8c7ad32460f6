"""Registration by subclassing, discovery, did-you-mean, and the faults of plugins."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from abc import abstractmethod
from pathlib import Path

import pytest

from upbench import registry
from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Task
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
    tables = []
    for kind, root in (("method", Upsampler), ("task", Task), ("dataset", Dataset), ("protocol", Protocol)):
        registry.plugins(kind)
        tables.append((root.registered, dict(root.registered)))
    modules = set(sys.modules)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
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
    assert {"quick", "standard"} <= set(registry.plugins("protocol"))


def test_names_come_sorted():
    for kind in ("method", "task", "dataset", "protocol"):
        names = list(registry.plugins(kind))
        assert names == sorted(names)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UpbenchError, match="unknown method 'raysap'; did you mean 'raysup'"):
        registry.find("method", "raysap")
    with pytest.raises(UpbenchError, match="unknown protocol 'quik'; did you mean 'quick'"):
        registry.find_protocol("quik")


def test_unknown_name_without_a_near_one_lists_what_there_is():
    known = ", ".join(registry.plugins("task"))
    with pytest.raises(UpbenchError, match=f"known: {known}"):
        registry.find("task", "zzzzzz")


def test_nearest_ignores_case_and_completes_prefixes():
    assert nearest("RaysUP", ["raysup", "anyup"]) == "raysup"
    assert nearest("guided", ["guided_filter", "jbu"]) == "guided_filter"
    assert nearest("qqq", ["raysup"]) is None
    assert "\n" not in str(unknown("method", "x", ["a", "b"]))


FAMILIES = {
    "task": """
        from upbench import Metric, Scores, Task

        class Mine(Task):
            name = "mine"
            metrics = (Metric("m", "M", higher_is_better=True),)
            primary = "m"

            def evaluate(self, context):
                return Scores()
    """,
    "dataset": """
        from upbench import Dataset

        class Mine(Dataset):
            name = "mine"
            def names(self, split): return ["a"]
            def read(self, split, index): raise NotImplementedError
            def fingerprint(self, split): return "1"
    """,
    "protocol": """
        from upbench import Protocol, SquareCrop

        class Mine(Protocol):
            name = "mine"
            geometry = SquareCrop(64)
    """,
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_plugin_files_of_every_family(tmp_path, kind):
    registry.load_plugin_file(write(tmp_path / "mine.py", textwrap.dedent(FAMILIES[kind])))
    assert registry.find(kind, "mine")().name == "mine"


def test_a_protocol_without_a_geometry_is_refused_at_once(tmp_path):
    text = textwrap.dedent(FAMILIES["protocol"]).replace("geometry", "geometri")
    with pytest.raises(UpbenchError, match=r"protocol 'mine' has no geometry.*SquareCrop\(224\)"):
        registry.load_plugin_file(write(tmp_path / "faulty.py", text))
    assert "mine" not in registry.plugins("protocol")


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
        (METHOD.format(name="has space"), "must be one word"),
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


def test_what_is_abstract_has_to_be_defined(tmp_path):
    """Where the class is made, not in the middle of a run; of datasets and tasks as of methods."""
    from upbench.contracts.dataset import Dataset
    from upbench.contracts.task import Task

    file = write(tmp_path / "half.py", METHOD.format(name="half").replace("def forward", "def backward"))
    with pytest.raises(UpbenchError, match=rf"method 'half' \({file}\) must define forward$"):
        registry.load_plugin_file(file)
    assert "half" not in Upsampler.registered

    before = dict(Dataset.registered), dict(Task.registered)
    with pytest.raises(UpbenchError, match=r"dataset 'none' \(.*test_registry\.py\) must define .*\bnames\b"):
        type("Nothing", (Dataset,), {"name": "none", "__module__": __name__})
    with pytest.raises(UpbenchError, match=r"task 'idle' \(.*\) must define evaluate$"):
        type("Idle", (Task,), {"name": "idle"})
    assert before == (Dataset.registered, Task.registered)


def test_an_abstract_step_may_leave_it_to_its_heirs():
    class Step(Upsampler):
        @property
        @abstractmethod
        def radius(self):
            """Of something."""

    with pytest.raises(UpbenchError, match=r"method 'heir' .* must define forward, radius"):
        type("Heir", (Step,), {"name": "heir"})
    whole = {"name": "heir", "forward": lambda self, image, features, output_size: features, "radius": 3}
    assert type("Heir", (Step,), whole) is Upsampler.registered["heir"]


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
