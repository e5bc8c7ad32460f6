"""Plugins that misbehave inside a run: their cells fail and say why, and no other row's number moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from upbench.results.records import Record, load_records
from upbench.run.loop import run

PLUGIN = Path(__file__).with_name("bad_plugin.py")


def bad(how: str, name: str = "bad", **more: str) -> dict[str, str]:
    return {"name": name, "how": how, **more}


def config(toy, out, methods, **values):
    return toy.config(out, methods, plugins=[str(toy.PLUGIN), str(PLUGIN)], **values)


def numbers(record: Record) -> str:
    return json.dumps([record.status, record.metrics, record.per_image])


def reasons(records: list[Record]) -> dict[str, str]:
    return {
        str(r.cell.method.options.get("how", r.cell.method.name)): f"{r.status}: {r.reason}" for r in records
    }


EXPECTED = {
    "changes_features": "method 'bad' changes its features in place",
    "changes_a_view": "method 'bad' changes its features in place",
    "changes_image": "method 'bad' changes its image in place",
    "exits": "SystemExit: 0",
    "strange": "Strange: not an Exception",
    "memory": "failed: MemoryError",
    "recursion": "RecursionError: maximum recursion depth",
    "mute": "Mute: (its text cannot be had: RuntimeError)",
    "surrogate": r"ValueError: half a character: \ud83d, \x1b[31mred",
    "wordy": "ValueError: word word",
    "complex": "method 'bad' returns torch.complex64",
    "integer": "method 'bad' returns torch.int32",
    "boolean": "method 'bad' returns torch.bool",
    "nan": "not finite",
    "infinite": "not finite",
    "small": "method 'bad' returns [1, 6, 32, 31] where [1, 6, 32, 32] was asked for",
    "one_pixel": "method 'bad' returns [1, 6, 1, 1]",
    "no_batch": "method 'bad' returns [6, 32, 32]",
    "elsewhere": "on meta",
    "dressed": "returns a Dressed where a plain tensor was asked for",
    "nothing": "returns a NoneType where a tensor was asked for",
    "numpy": "returns a ndarray where a tensor was asked for",
    "sparse": "returns torch.sparse_coo",
}
HARMLESS = ("changes_by_numpy", "changes_data", "no_gradients", "doubles")  # to themselves at most


@pytest.mark.drill("plugins: methods")
def test_methods_that_misbehave_fail_and_no_other_row_changes(toy, tmp_path):
    (alone,) = run(config(toy, tmp_path / "alone", ["toy_smooth"]))
    ways = [*EXPECTED, *HARMLESS]
    records = run(config(toy, tmp_path / "run", [*map(bad, ways), "toy_smooth"]))
    found = reasons(records)
    for how, words in EXPECTED.items():
        assert found[how].startswith("failed: "), how
        assert words in found[how], how
        assert len(found[how]) < 500
    assert numbers(records[-1]) == numbers(alone)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert len(load_records(tmp_path / "run")) == len(ways) + 1, "each leaves a record that can be read"


@pytest.mark.drill("plugins: methods")
def test_methods_that_are_called_by_their_operators(toy, tmp_path):
    (alone,) = run(config(toy, tmp_path / "alone", ["toy_smooth"]))
    ways = [how for how in EXPECTED if how not in ("elsewhere", "numpy", "sparse", "no_batch")]
    records = run(config(toy, tmp_path / "run", [*(bad(how, "bad_linear") for how in ways), "toy_smooth"]))
    found = reasons(records)
    for how in ways:
        assert found[how].startswith("failed: "), how
    for how in ("changes_features", "changes_image", "complex", "integer", "one_pixel", "dressed", "nothing"):
        assert "method 'bad_linear'" in found[how], how
    assert numbers(records[-1]) == numbers(alone)


@pytest.mark.drill("plugins: methods")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("text", "its operator() returns a str, not an Operator"),
        ("complex", "operator returns torch.complex64"),
        ("integer", "operator returns torch.int32"),
        ("one_pixel", "operator returns ["),
        ("nan", "not finite"),
    ],
)
def test_operators_that_misbehave(toy, tmp_path, how, words):
    (record,) = run(config(toy, tmp_path, [bad(how, "bad_operator")]))
    assert record.status == "failed"
    assert words in record.reason


@pytest.mark.drill("plugins: methods")
def test_cameras_and_the_backbone_stay_as_they_are(toy, tmp_path):
    posed = {"name": "toy_posed", "camera": "dataset"}
    (alone,) = run(config(toy, tmp_path / "alone", [posed]))
    records = run(
        config(
            toy,
            tmp_path / "run",
            [
                {"name": "bad_camera", "camera": "dataset"},
                bad("weights", "bad_backbone"),
                bad("output", "bad_backbone"),
                posed,
            ],
        )
    )
    assert "method 'bad_camera' changes its camera in place" in records[0].reason
    assert "changes its backbone in place" in records[1].reason
    assert records[2].status == "ok", "what the backbone gave it is its own"
    assert numbers(records[3]) == numbers(alone)


@pytest.mark.drill("plugins: methods")
def test_a_method_that_cannot_say_whether_it_can_run(toy, tmp_path):
    records = run(config(toy, tmp_path, ["bad_skip", "toy_smooth"]))
    assert records[0].reason == "LookupError: skip_reason itself"
    assert records[1].status == "ok"


@pytest.mark.drill("plugins: tasks")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nothing", "task 'bad_task' returns a NoneType where Scores were asked for"),
        ("no_splits", "gives no scores for split 'val'"),
        ("no_values", "gives 0 values for a metric on split 'val'"),
        ("too_many", "gives 9 values for a metric on split 'val'"),
        ("none", "metric 'score' on split 'val': expected a number, got NoneType"),
        ("text", "expected a number, got str"),
        ("complex", "expected a number, got torch.complex64 []"),
        ("several", "expected a number, got torch.float32 [2]"),
        ("nan", "metric 'score' on split 'val' is nan"),
        ("infinite", "metric 'score' on split 'val' is inf"),
    ],
)
def test_what_is_no_score_fails(toy, tmp_path, monkeypatch, how, words):
    monkeypatch.setenv("DRILL_HOW", how)
    (record,) = run(config(toy, tmp_path, ["toy_smooth"], tasks=["bad_task"]))
    assert record.status == "failed"
    assert words in record.reason


@pytest.mark.drill("plugins: tasks")
@pytest.mark.parametrize("how", ["half", "by_hand"])
def test_what_can_be_told_is_kept(toy, tmp_path, monkeypatch, how):
    monkeypatch.setenv("DRILL_HOW", how)
    (record,) = run(config(toy, tmp_path, ["toy_smooth"], tasks=["bad_task"]))
    assert record.status == "ok", record.reason
    assert load_records(tmp_path)[0].metrics["val"]["score"] == [1.0]


@pytest.mark.drill("plugins: tasks")
def test_a_task_that_scribbles_over_all_that_it_is_given(toy, tmp_path):
    methods = ["toy_smooth", {"name": "toy_posed", "camera": "dataset"}]
    tasks = ["a_vandal", "seg", "depth"]
    values = {"probe": {"shrinkage": 0.1}}  # so that sums over features count, too
    alone = run(config(toy, tmp_path / "alone", methods, tasks=["seg", "depth"], **values))
    records = run(config(toy, tmp_path / "run", methods, tasks=tasks, **values))
    assert [r.status for r in records] == ["ok"] * 6, [r.reason for r in records]
    assert {r.cell.key: numbers(r) for r in records if r.cell.task != "a_vandal"} == {
        r.cell.key: numbers(r) for r in alone
    }


@pytest.mark.drill("plugins: tasks")
def test_a_task_that_changes_what_its_cells_share(toy, tmp_path):
    records = run(config(toy, tmp_path, ["toy_smooth", "toy_posed"], tasks=["vandal_of_results"]))
    for record in records:
        assert record.status == "failed"
        assert "changes its shared results in place" in record.reason


@pytest.mark.drill("plugins: tasks")
@pytest.mark.parametrize("lack", ["splits", "metrics", "values"])
def test_a_record_without_numbers_is_not_finished(toy, tmp_path, capsys, lack):
    (first,) = run(config(toy, tmp_path, ["toy_smooth"]))
    (path,) = (tmp_path / "records").glob("*.json")
    content = json.loads(path.read_text())
    if lack == "splits":
        content["metrics"] = {}
    elif lack == "metrics":
        del content["metrics"]["other"]
    else:
        content["metrics"]["val"]["miou"]["values"] = []
    path.write_text(json.dumps(content))
    (second,) = run(config(toy, tmp_path, ["toy_smooth"]))
    assert "run again" in capsys.readouterr().err
    assert second.started != first.started
    assert numbers(second) == numbers(first)
