"""The configuration of a run: sources, wildcards, cells, keys."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upbench.errors import UpbenchError
from upbench.registry import match_names
from upbench.results.cell import Cell, MethodSpec
from upbench.run.config import RunConfig, read_yaml

METHODS = ("anyup", "bicubic", "bilinear", "raysup")
TASKS = {"depth": ("interiors",), "normals": ("interiors",), "seg": ("interiors", "voc")}


def cells(**values) -> list[Cell]:
    config = RunConfig(**{"methods": "bilinear", **values})
    return config.select(METHODS, TASKS, ("interiors", "voc")).cells(TASKS, device="cpu")


def test_command_line_over_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("methods: [raysup, {name: anyup, window: 7, label: Wide}]\nseeds: 5\nlimit: 4\n")
    config = RunConfig.load(file, {"seeds": 2, "limit": None, "tasks": "seg,depth"})
    assert config.seeds == 2, "the command line wins over the file"
    assert config.limit == 4, "a flag that was not given leaves the file's value"
    assert config.preset == "quick", "what nobody gave is the default"
    assert config.tasks == ("seg", "depth")
    assert config.methods == (
        MethodSpec("raysup"),
        MethodSpec("anyup", options={"window": 7}, label="Wide"),
    )


def test_a_config_survives_its_own_dictionary():
    config = RunConfig(methods="raysup:none,bilinear", tasks=["seg"], limit=3, probe={"epochs": 2})
    assert RunConfig(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metods: [a]", "unknown key 'metods'; did you mean 'methods'?"),
        ("seeds: many", "seeds: expected a whole number of at least 1, got 'many'"),
        ("seeds: true", "seeds: expected a whole number"),
        ("seeds: 0", "seeds: expected a whole number of at least 1"),
        ("limit: -1", "limit: expected a whole number"),
        ("force: 1", "force: expected true or false"),
        ("device: gpu", "unknown device 'gpu'"),
        ("preset: quik", "unknown preset 'quik'; did you mean 'quick'?"),
        ("dtype: float23", "unknown dtype 'float23'; did you mean 'float32'?"),
        ("executor: proces", "unknown executor 'proces'; did you mean 'process'?"),
        ("tasks: 3", "tasks: expected a list of names, got 3"),
        ("tasks: []", "tasks: expected a list of names"),
        ("tasks: [[seg]]", "tasks: expected text"),
        ("methods: []", "methods: expected a list of names"),
        ("methods: [4]", "methods: expected a name or a mapping with 'name', got 4"),
        ("methods: [{weights: none}]", "needs a 'name'"),
        ("methods: ['raysup:']", "expected NAME or NAME:WEIGHTS"),
        ("methods: [{name: a, size: {b: 1}}]", "'size' must be a plain value"),
        ("probe: {epoch: 3}", "unknown probe setting 'epoch'; did you mean 'epochs'?"),
        ("probe: [3]", "probe: expected a mapping"),
        ("out: ''", "out: expected text"),
        ("- a\n- b", "must be a mapping of settings"),
        ("a: [", "is not YAML"),
        ("{1: 2}", "must be a mapping of settings"),
    ],
)
def test_bad_values_are_told_in_one_line(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UpbenchError) as caught:
        RunConfig.load(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_on_the_command_line_does_not_blame_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seeds: 2\n")
    with pytest.raises(UpbenchError) as caught:
        RunConfig.load(file, {"seeds": 0})
    assert str(file) not in str(caught.value)


def test_missing_or_binary_config_file(tmp_path):
    with pytest.raises(UpbenchError, match="config file not found"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UpbenchError, match=r"cannot read config file|is not YAML"):
        read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("all", list(METHODS)),
        ("b*", ["bicubic", "bilinear"]),
        ("*up", ["anyup", "raysup"]),
        ("anyup", ["anyup"]),
        ("?aysup", ["raysup"]),
    ],
)
def test_wildcards(pattern, expected):
    assert match_names("method", pattern, METHODS) == expected


def test_names_that_match_nothing():
    with pytest.raises(UpbenchError, match="unknown method 'raysupp'; did you mean 'raysup'"):
        match_names("method", "raysupp", METHODS)
    with pytest.raises(UpbenchError, match=r"no task matches 'x\*'; known: depth, normals, seg"):
        match_names("task", "x*", TASKS)


def test_wildcards_keep_weights_and_repeat_nothing():
    config = RunConfig(methods="bilinear,b*,raysup:none,raysup", tasks="all").select(METHODS, TASKS, ())
    assert [m.title for m in config.methods] == ["bilinear", "bicubic", "raysup:none", "raysup"]
    assert config.tasks == ("depth", "normals", "seg")


def test_cells_are_the_product_and_run_on_each_tasks_datasets():
    found = cells(methods="bilinear,raysup", tasks="seg,depth")
    crossings = {(c.method.name, c.task, c.dataset) for c in found}
    assert crossings == {
        *((m, "seg", d) for m in ("bilinear", "raysup") for d in ("interiors", "voc")),
        *((m, "depth", "interiors") for m in ("bilinear", "raysup")),
    }
    assert len(found) == len(crossings)


def test_named_datasets_replace_the_tasks_own():
    assert {c.dataset for c in cells(tasks="seg,depth", datasets="voc:/data/voc")} == {"voc:/data/voc"}


def test_cells_that_share_work_follow_one_another():
    found = cells(methods="bilinear,raysup", tasks="seg,depth", backbones="a,b", datasets="interiors")
    order = [(c.backbone, c.method.name) for c in found]
    assert order == sorted(order)


def test_seeds_and_device_of_a_cell():
    (cell,) = cells(seeds=3, datasets="interiors")
    assert cell.seeds == (0, 1, 2)
    assert cell.device == "cpu", "auto is what the machine has"
    assert cells(device="cuda")[0].device == "cuda"


@pytest.mark.parametrize(
    "change",
    [
        {"methods": "raysup"},
        {"methods": "bilinear:none"},
        {"methods": [{"name": "bilinear", "window": 3}]},
        {"tasks": "depth"},
        {"backbones": "resnet50"},
        {"datasets": "interiors:/elsewhere"},
        {"preset": "standard"},
        {"seeds": 2},
        {"limit": 8},
        {"device": "cuda"},
        {"dtype": "bfloat16"},
        {"probe": {"epochs": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_number_changes_the_key(change):
    base = {"datasets": "interiors"}
    assert cells(**{**base, **change})[0].key != cells(**base)[0].key


@pytest.mark.parametrize(
    "change",
    [
        {"out": "elsewhere"},
        {"force": True},
        {"executor": "process", "workers": 7},
        {"plugins": ["a.py"]},
        {"device": "cpu"},
        {"methods": [{"name": "bilinear", "label": "Baseline"}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_number_keeps_the_key(change):
    assert cells(**change)[0].key == cells()[0].key


@given(st.permutations(list({"window": 3, "heads": 4, "scale": 0.5}.items())))
def test_the_key_does_not_depend_on_the_order_of_mappings(items):
    key = cells(methods=[{"name": "bilinear", **dict(items)}])[0].key
    assert key == cells(methods=[{"name": "bilinear", "heads": 4, "scale": 0.5, "window": 3}])[0].key


def test_the_key_is_the_same_in_every_process():
    code = (
        "from upbench.run.config import *; c = RunConfig(methods='raysup', tasks='seg', probe={'lr': 0.1});"
        "print(c.cells({'seg': ['interiors']}, 'cpu')[0].key)"
    )
    keys = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(keys) == 1


def test_a_cell_survives_its_own_dictionary_and_has_a_readable_file_name():
    (cell,) = cells(methods=[{"name": "raysup", "weights": "/w/x.pth", "k": 1}], datasets="voc:/d", limit=2)
    assert Cell.from_dict(cell.to_dict()) == cell
    assert cell.slug == f"raysup_w_x.pth_k_1-seg-dinov2_vits14_focus-voc-quick-{cell.key[:8]}"
