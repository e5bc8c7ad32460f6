"""The plan of a run: which cells there are, what they are called by, in which order, in how many parts."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import folder_dataset

from upbench.errors import UpbenchError
from upbench.registry import find_protocol, find_task
from upbench.results.cell import Cell, MethodSpec
from upbench.run.jobs import Job, PlannedCell
from upbench.run.plan import groups, make_plan


@pytest.fixture
def plan(toy: ModuleType, tmp_path: Path):
    """Plans a run in the toy world."""

    def planned(methods="toy_smooth", **values) -> list[PlannedCell]:
        return make_plan(toy.config(**{"out": tmp_path / "run", "methods": methods, **values}))

    return planned


def test_cells_are_the_product_and_run_on_each_tasks_datasets(toy, plan, monkeypatch):
    monkeypatch.setattr(find_task("depth"), "datasets", ("toy",))
    found = plan("toy_smooth,toy_posed", tasks=["depth", "toy_noted", "seg"], datasets=[], protocol="tiny")
    crossings = [(p.cell.method.name, p.cell.task, p.cell.dataset) for p in found]
    methods = ("toy_smooth", "toy_posed")
    assert set(crossings) == {
        *((method, task, "toy") for method in methods for task in ("depth", "toy_noted")),
        *((method, "seg", "interiors") for method in methods),
    }
    assert len(set(crossings)) == len(crossings)


def test_named_datasets_replace_the_tasks_own(plan, tmp_path):
    place = folder_dataset(tmp_path / "voc")
    assert {p.cell.dataset for p in plan(tasks=["seg", "toy_noted"], datasets=[f"folder:{place}"])} == {
        "folder"
    }


def test_cells_that_share_work_follow_one_another(plan):
    found = plan("toy_smooth,toy_posed", tasks=["seg", "depth"], backbones=["tiny", "broken"])
    order = [(p.cell.backbone, p.cell.method.name) for p in found]
    assert len(order) == 8
    assert [key for i, key in enumerate(order) if key not in order[:i]] == list(dict.fromkeys(order))
    assert all(order[i] == order[i - 1] for i in (1, 3, 5, 7)), "the task changes first, the backbone last"
    assert [len(group) for group in groups(found)] == [2, 2, 2, 2]


def test_seeds_device_and_objects_of_a_cell(toy, plan):
    (planned,) = plan(seeds=3)
    assert planned.cell.seeds == (0, 1, 2)
    assert planned.cell.device == planned.place == "cpu"
    assert planned.method is toy.find("toy_smooth")
    assert type(planned.task) is find_task("seg")
    assert type(planned.protocol) is find_protocol("tiny")
    assert type(planned.dataset) is toy.find("toy", "dataset")
    assert planned.setting.image_size == planned.setting.output_size == (32, 32)
    assert planned.setting.feature_size == (4, 4)
    assert planned.splits == ["train", "val", "other"]
    assert planned.row == "Smooth"


CHANGES = [
    {"methods": "toy_posed"},
    {"methods": "toy_trained:none"},
    {"methods": [{"name": "toy_smooth", "mode": "nearest"}]},
    {"tasks": ["depth"]},
    {"backbones": ["broken"]},
    {"datasets": ["interiors"]},
    {"protocol": "quick"},
    {"seeds": 3},
    {"limit": 2},
    {"dtype": "bfloat16"},
    {"probe": {"epochs": 1}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_whatever_changes_a_number_changes_the_key(plan, change):
    assert plan(**change)[0].cell.key != plan()[0].cell.key


def test_a_gpu_changes_the_key_and_its_number_does_not(plan, monkeypatch):
    before = plan()[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    one, other, auto = (plan(device=device)[0] for device in ("cuda:0", "cuda:1", "auto"))
    assert one.cell.key == other.cell.key == auto.cell.key != before.cell.key
    assert (one.place, other.place, auto.place) == ("cuda:0", "cuda:1", "cuda")
    with pytest.raises(UpbenchError, match="unknown device 'cuda:2'; did you mean 'cuda:"):
        plan(device="cuda:2")


def test_other_content_changes_the_key(plan, monkeypatch):
    before = plan()[0]
    monkeypatch.setenv("TOY_DATA", "2")
    after = plan()[0]
    assert after.cell.data != before.cell.data
    assert after.cell.key != before.cell.key


@pytest.mark.parametrize(
    "change",
    [
        {"out": "elsewhere"},
        {"force": True},
        {"executor": "process", "workers": 7},
        {"device": "auto"},
        {"shard": "1/1"},
        {"methods": [{"name": "toy_smooth", "label": "Baseline"}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_number_keeps_the_key(plan, monkeypatch, change):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan(**change)[0].cell.key == plan()[0].cell.key


@given(st.permutations(list({"window": 3, "heads": 4, "scale": 0.5}.items())))
def test_the_key_does_not_depend_on_the_order_of_mappings(items):
    def key(options) -> str:
        spec = MethodSpec("m", options=options)
        return Cell(spec, "seg", "vit", "rooms", "quick", (0,), None, "cpu", "float32", options).key

    assert key(dict(items)) == key({"heads": 4, "scale": 0.5, "window": 3})


def test_the_key_is_the_same_in_every_process(toy, plan):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import toy\n"
        "from upbench.run.plan import make_plan\n"
        "with toy.world(): (p,) = make_plan(toy.config(Path('anywhere'), probe={'lr': 0.1}))\n"
        "print(p.cell.key)"
    )
    found = subprocess.check_output([sys.executable, "-c", code, str(toy.PLUGIN.parent)])
    assert found.decode().split() == [plan(probe={"lr": 0.1})[0].cell.key]


def test_the_same_data_in_another_place_is_the_same_cell(plan, tmp_path):
    """And other data of the same name is another."""
    first = folder_dataset(tmp_path / "first")
    shutil.copytree(first, tmp_path / "second")
    folder_dataset(tmp_path / "other", shade=199)
    one, copy, other = (plan(datasets=[f"folder:{tmp_path / n}"])[0] for n in ("first", "second", "other"))
    assert one.cell == copy.cell
    assert one.inputs == copy.inputs
    assert one.cell.dataset == other.cell.dataset == "folder"
    assert one.cell.key != other.cell.key
    assert str(tmp_path) not in str(one.cell.to_dict()) + str(one.inputs)


def test_a_cell_survives_its_own_dictionary_and_has_a_readable_file_name():
    spec = MethodSpec("raysup", "/w/x.pth", {"k": 1})
    cell = Cell(spec, "seg", "dinov2_vits14_focus", "voc", "quick", (0, 1), 2, "cpu", "float32", {}, "a1")
    assert Cell.from_dict(cell.to_dict()) == cell
    assert cell.slug == f"raysup_w_x.pth_k_1-seg-dinov2_vits14_focus-voc-quick-{cell.key[:8]}"


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_parts_make_the_whole_and_groups_stay_together(plan, count):
    methods = "toy_smooth,toy_posed,toy_fails,toy_nan"
    whole = plan(methods, tasks=["seg", "depth"])
    parts = [plan(methods, tasks=["seg", "depth"], shard=f"{i + 1}/{count}") for i in range(count)]
    keys = [[p.cell.key for p in part] for part in parts]
    assert sorted(key for part in keys for key in part) == sorted(p.cell.key for p in whole)
    sizes = [len(list(groups(part))) for part in parts]
    assert max(sizes) - min(sizes) <= 1, "parts are of one size"
    for part in parts:
        assert all(len(group) == 2 for group in groups(part)), "a method's tasks are on one machine"


# -------------------------------------------------------------------------------------------------- jobs


def test_classes_of_a_plugin_file_reach_another_process(toy, plan, tmp_path):
    """One that has loaded nothing: the job brings the name of the file."""
    job = Job(tuple(plan(tasks=["toy_noted", "seg"])), (str(toy.PLUGIN),))
    file = tmp_path / "job"
    file.write_bytes(pickle.dumps(job))
    code = (
        "import pickle, sys; job = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for p in job.cells: print(p.cell.key, p.method.name, p.task.name, p.protocol.name, p.dataset.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        [p.cell.key, "toy_smooth", p.cell.task, "tiny", "toy"] for p in job.cells
    ]


def test_a_job_survives_pickling(toy, plan):
    job = Job(tuple(plan()), (str(toy.PLUGIN),), debug=True)
    again = pickle.loads(pickle.dumps(job))
    assert (again.plugins, again.debug) == (job.plugins, True)
    (one,), (other,) = job.cells, again.cells
    assert other.cell == one.cell
    assert (other.inputs, other.data, other.setting, other.weights) == (
        one.inputs,
        one.data,
        one.setting,
        one.weights,
    )
    assert other.dataset.names("val") == one.dataset.names("val")


# ------------------------------------------------------------------------------------------ what is said


def test_skips_say_why(toy, plan):
    reasons = {p.cell.task: p.skip for p in plan(tasks=["seg", "normals"])}
    assert reasons == {"seg": "", "normals": "dataset 'toy' has no normal"}
    (posed,) = plan([{"name": "toy_posed", "camera": "dataset"}])
    assert posed.skip == ""
    (skipped,) = plan("toy_skips")
    assert skipped.skip == "only 16x, not 8x"


def test_a_method_with_a_camera_needs_one(plan, tmp_path):
    place = folder_dataset(tmp_path / "data")
    (posed,) = plan([{"name": "toy_posed", "camera": "dataset"}], datasets=[f"folder:{place}"])
    assert posed.skip == "dataset 'folder' has no cameras"


def test_recipes_protocol_then_task_then_user(plan):
    def recipe(**values):
        return plan(**values)[0].inputs["probe"]

    task = find_task("depth").probe
    assert recipe()["epochs"] == find_protocol("tiny").recipe.epochs
    assert recipe(tasks=["depth"])["epochs"] == 2, "the protocol has one recipe for all tasks"
    quick = recipe(tasks=["depth"], protocol="quick")
    assert {name: quick[name] for name in task} == dict(task)
    assert quick["optimizer"] == find_protocol("quick").recipe.optimizer
    assert recipe(tasks=["depth"], protocol="quick", probe={"epochs": 1})["epochs"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probe": {"epoch": 3}}, "unknown probe setting 'epoch'; did you mean 'epochs'?"),
        ({"probe": {"lr": 1000}}, "probe lr must be a number above 0 and at most 10, got 1000"),
        ({"protocol": "tyny"}, "unknown protocol 'tyny'; did you mean 'tiny'?"),
    ],
)
def test_bad_settings(plan, values, message):
    with pytest.raises(UpbenchError, match=re.escape(message)):
        plan(**values)


def test_an_empty_split_is_refused(toy, plan, monkeypatch):
    monkeypatch.setattr(toy.find("toy", "dataset"), "images", {"train": 6, "val": 0, "other": 3})
    with pytest.raises(UpbenchError, match="split 'val' of dataset 'toy' has no images"):
        plan()


def test_parts_make_one_plan(plan):
    parts = [{"tasks": ["seg"], "protocol": "tiny"}, {"tasks": ["seg", "depth"], "protocol": "quick"}]
    both = plan(parts=[*parts, parts[0]])
    alone = [planned for part in parts for planned in plan(**part)]
    assert [(p.cell.protocol, p.cell.task) for p in both] == [
        ("tiny", "seg"),
        ("quick", "seg"),
        ("quick", "depth"),
    ], "a cell that two parts have is one cell"
    assert [p.cell.key for p in both] == [p.cell.key for p in alone]
    assert [p.inputs for p in both] == [p.inputs for p in alone]
    halves = [plan(parts=parts, shard=f"{i}/2") for i in (1, 2)]
    assert sorted(p.cell.key for half in halves for p in half) == sorted(p.cell.key for p in both)
