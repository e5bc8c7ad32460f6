"""The loop over cells: what is recorded, kept, retried, shared, and what one bad cell costs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from pictures import folder_dataset
from safetensors.torch import save_file

import upbench
from upbench.cost import measure
from upbench.errors import UpbenchError
from upbench.evaluate import task as probing
from upbench.registry import find_method, find_protocol
from upbench.results.papers import Paper, Published
from upbench.results.records import Record, load_records
from upbench.results.report import build_tables, render
from upbench.run import context, loop
from upbench.run import worker as work
from upbench.run.executors import Lost
from upbench.run.loop import run
from upbench.system import environment
from upbench.system.cache import sha256_file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def by_method(records: list[Record]) -> dict[str, Record]:
    return {record.cell.method.name: record for record in records}


def count_calls(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> Counter[str]:
    calls: Counter[str] = Counter()
    original = getattr(module, name)

    def counted(*args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_record_says_all_about_its_cell(toy, out):
    (record,) = run(toy.config(out, tasks=["depth"], seeds=3))
    assert record.status == "ok"
    (stored,) = load_records(out)
    assert json.dumps(stored.to_dict()) == json.dumps(record.to_dict()), "what is returned is what is kept"
    assert stored.schema == 2
    assert list(record.metrics) == ["val", "other"]
    assert len(record.metrics["val"]["rmse"]) == 3, "a value for each seed"
    assert record.per_image["val"]["names"] == ["val0", "val1", "val2", "val3"]
    assert [len(values) for values in record.per_image["val"]["values"]] == [4, 4, 4]
    assert record.columns[0]["name"] == "rmse"
    assert record.columns[0]["higher_is_better"] is False
    assert record.row == "Smooth"
    assert record.about["title"] == "Smooth"
    assert record.cost["cpu"]["latency_ms"] > 0
    assert record.cost["cpu"]["output_size"] == [32, 32]
    assert "cuda" not in record.cost
    assert record.seconds > 0
    assert record.started.endswith("+00:00")
    assert not record.warnings


def repeated(record: Record, out: Path, plugins: list[str]) -> Record:
    """The cell of a record, run again from what the record says."""
    cell = record.cell
    again = upbench.RunConfig(
        methods=[cell.method.to_dict()],
        tasks=[cell.task],
        backbones=[cell.backbone],
        datasets=[cell.dataset],
        protocol=record.protocol["name"],
        seeds=len(cell.seeds),
        limit=cell.limit,
        device=cell.device,
        dtype=cell.dtype,
        probe=cell.probe,
        out=str(out),
        plugins=plugins,
    )
    (found,) = run(again)
    return found


def test_a_record_is_enough_to_repeat_its_cell(toy, out, tmp_path):
    file = tmp_path / "toy.safetensors"
    save_file({"gain": torch.full((6, 1, 1), 0.5)}, file)
    method = {"name": "toy_trained", "weights": str(file), "label": "Ours"}
    run(toy.config(out, [method], tasks=["depth"], seeds=2, limit=3, probe={"lr": 0.02}))
    (record,) = load_records(out)
    again = repeated(record, tmp_path / "again", [str(toy.PLUGIN)])
    assert again.cell == record.cell
    assert json.dumps(again.metrics) == json.dumps(record.metrics)
    assert again.inputs == record.inputs
    assert again.data == record.data
    assert again.protocol == record.protocol


def test_what_a_record_is_repeated_from(toy, out, tmp_path):
    """Each of these by its own name: somebody else reads them, in another year."""
    file = tmp_path / "toy.safetensors"
    save_file({"gain": torch.ones(6, 1, 1)}, file)
    (record,) = run(toy.config(out, f"toy_trained:{file}"))
    assert record.inputs["weights"]["sha256"] == sha256_file(file)
    assert record.inputs["backbone"] == "tiny-1"
    assert set(record.inputs["dataset"]) == {"train", "val", "other"}
    sources = ("method_source", "task_source", "dataset_source", "protocol_source")
    assert all(len(record.inputs[name]) == 64 for name in sources)
    assert record.inputs["engine_source"]
    for split, count in (("train", 6), ("val", 4), ("other", 3)):
        facts = record.data[split]
        assert (facts["images"], facts["available"], facts["official"]) == (count, count, None)
        assert facts["fingerprint"] == record.inputs["dataset"][split]
        names = json.loads((out / "data" / f"{facts['names']}.json").read_text())
        assert names == {"dataset": "toy", "split": split, "names": [f"{split}{i}" for i in range(count)]}

    protocol = find_protocol("tiny")()
    assert (record.protocol["name"], record.protocol["version"]) == ("tiny", 3)
    assert record.protocol_label == "tiny-v3"
    assert record.protocol["parameters"] == protocol.to_dict()["parameters"]
    assert record.protocol["parameters"]["geometry.side"] == 32
    assert record.protocol["recipe"] == dataclasses.asdict(protocol.recipe)
    assert record.protocol["image_size"] == record.protocol["output_size"] == [32, 32]

    environment = record.environment
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["upbench"] == upbench.__version__
    assert {"commit", "python", "platform", "cpu", "cores", "threads", "gpu"} <= set(environment)
    assert record.cell.device == "cpu"
    assert record.cell.seeds == (0, 1)


def test_the_same_run_gives_the_same_numbers(toy, tmp_path):
    first, second = (run(toy.config(tmp_path / name, tasks=["depth"]))[0] for name in ("a", "b"))
    assert json.dumps(first.metrics) == json.dumps(second.metrics)
    values = first.metrics["val"]["absrel"]
    assert values[0] != values[1], "seeds differ"


def test_public_names_run_and_read(toy, out):
    records = upbench.run(upbench.RunConfig(**toy.config(out).to_dict()))
    df = upbench.read_records(out)
    assert len(df) == len(records) == 1
    assert df["miou"][0] == pytest.approx(sum(records[0].metrics["val"]["miou"]) / 2)


def test_one_bad_cell_leaves_a_record_and_the_rest_goes_on(toy, out):
    records = by_method(run(toy.config(out, "toy_fails,toy_nan,toy_skips,toy_smooth")))
    assert {name: r.status for name, r in records.items()} == {
        "toy_fails": "failed",
        "toy_nan": "failed",
        "toy_skips": "skipped",
        "toy_smooth": "ok",
    }
    assert records["toy_fails"].reason == "ValueError: boom in two lines"
    assert "in forward" in records["toy_fails"].traceback
    assert any("cost on cpu: ValueError: boom" in text for text in records["toy_fails"].warnings)
    assert "not finite" in records["toy_nan"].reason
    assert records["toy_skips"].reason == "only 16x, not 8x"
    assert {r.cell.key: r.status for r in load_records(out)} == {
        r.cell.key: r.status for r in records.values()
    }


def test_a_method_without_weights_is_skipped_where_it_was_not_asked_for_by_name(toy, out):
    record = by_method(run(toy.config(out, "toy_train*,toy_smooth")))["toy_trained"]
    assert record.status == "skipped"
    assert (
        record.reason
        == "no weights come with toy_trained; it can be run with others, such as toy_trained:good"
    )


def test_finished_cells_are_kept_and_failed_ones_retried(toy, out, monkeypatch):
    config = toy.config(out, "toy_smooth,toy_fails")
    first = by_method(run(config))
    calls = count_calls(monkeypatch, probing, "train_probes")
    retried = by_method(run(config))
    assert calls["train_probes"] == 0, "the failed cell fails before its first step"
    assert retried["toy_fails"].started != first["toy_fails"].started
    monkeypatch.setenv("TOY_HEALED", "1")
    second = by_method(run(config))
    assert second["toy_fails"].status == "ok"
    assert calls["train_probes"] == 1, "all seeds in one pass"
    assert second["toy_smooth"].started == first["toy_smooth"].started
    run(dataclasses.replace(config, force=True))
    assert calls["train_probes"] == 1 + 2


def test_what_changed_is_run_again(toy, out, tmp_path, monkeypatch, capsys):
    file = tmp_path / "toy.safetensors"
    config = toy.config(out, f"toy_trained:{file}")
    save_file({"gain": torch.ones(6, 1, 1)}, file)
    (first,) = run(config)
    calls = count_calls(monkeypatch, probing, "train_probes")
    save_file({"gain": torch.full((6, 1, 1), 2.0)}, file)
    (second,) = run(config)
    assert calls["train_probes"] == 1
    assert second.cell.key == first.cell.key
    assert "run again, since its weights changed" in capsys.readouterr().err
    assert len(load_records(out)) == 1, "the new record stands in place of the old one"


def test_other_data_of_the_same_name_is_another_cell(toy, out, monkeypatch):
    (first,) = run(toy.config(out))
    monkeypatch.setenv("TOY_DATA", "2")
    (second,) = run(toy.config(out))
    assert second.cell.key != first.cell.key
    assert len(load_records(out)) == 2, "both are kept"
    monkeypatch.setenv("TOY_DATA", "1")
    (again,) = run(toy.config(out))
    assert again.started == first.started


def test_data_that_moved_continues_its_table(toy, out, tmp_path, capsys):
    folder_dataset(tmp_path / "here")
    (first,) = run(toy.config(out, datasets=[f"folder:{tmp_path / 'here'}"]))
    shutil.move(tmp_path / "here", tmp_path / "there")
    capsys.readouterr()
    (second,) = run(toy.config(out, datasets=[f"folder:{tmp_path / 'there'}"]))
    assert "1 cells, 1 finished before" in capsys.readouterr().err
    assert second.started == first.started
    run(toy.config(out, "toy_posed", datasets=[f"folder:{tmp_path / 'there'}"]))
    records = load_records(out)
    assert [table.title for table in build_tables(records)] == ["tiny · folder/val · tiny-v3"]
    for record in records:
        assert str(tmp_path) not in json.dumps(record.to_dict())


def test_a_partial_copy_is_told(toy, out, monkeypatch, capsys):
    dataset = toy.find("toy", "dataset")
    monkeypatch.setattr(dataset, "counts", {"train": 6, "val": 1449})
    (record,) = run(toy.config(out))
    assert "WARNING: toy/val is a partial copy: 4 of 1449 images" in capsys.readouterr().err
    assert record.data["val"]["official"] == 1449
    assert record.data["train"]["official"] == record.data["train"]["available"] == 6
    assert record.data["other"]["official"] is None
    text = render(load_records(out), "md")
    assert "**partial copy**: 4 of 1449 images" in text
    assert "toy/train" not in text


def test_an_edited_plugin_is_run_again(toy, out, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    text = "import torch.nn.functional as F\nfrom upbench import Upsampler\n"
    text += "class Mine(Upsampler):\n    name = 'mine'\n"
    text += "    def forward(self, image, features, output_size):\n"
    plugin.write_text(text + "        return F.interpolate(features, output_size)\n")
    config = toy.config(out, "mine", plugins=[str(plugin)])
    with toy.world():
        run(config)
    calls = count_calls(monkeypatch, probing, "train_probes")
    with toy.world():
        run(config)
    assert calls["train_probes"] == 0
    plugin.write_text(text + "        return F.interpolate(features, output_size, mode='bilinear')\n")
    with toy.world():
        run(config)
    assert calls["train_probes"] == 1


def test_a_damaged_record_is_run_again(toy, out, capsys):
    run(toy.config(out))
    (path,) = (out / "records").glob("*.json")
    path.write_text(path.read_text()[:100])
    run(toy.config(out))
    assert f"damaged record {path}" in capsys.readouterr().err
    assert load_records(out)[0].status == "ok"


def test_a_new_label_keeps_the_numbers(toy, out, monkeypatch):
    run(toy.config(out))
    calls = count_calls(monkeypatch, probing, "train_probes")
    run(toy.config(out, [{"name": "toy_smooth", "label": "Baseline"}]))
    assert calls["train_probes"] == 0
    assert [record.cell.method.label for record in load_records(out)] == ["Baseline"]


def test_shared_work_is_done_once(toy, out, monkeypatch):
    method = find_method("toy_smooth")
    loads = count_calls(monkeypatch, work.backbones, "load_backbone")
    features = count_calls(monkeypatch, context, "FeatureStore")
    trainings = count_calls(monkeypatch, probing, "train_probes")
    views = count_calls(monkeypatch, method, "operator")
    costs = count_calls(monkeypatch, measure, "measure")
    run(toy.config(out, "toy_smooth", tasks=["seg", "depth"], seeds=3))
    assert loads["load_backbone"] == 1
    assert features["FeatureStore"] == 3, "one a split"
    assert trainings["train_probes"] == 2, "one a task, for all seeds"
    assert views["operator"] == 6 + 4 + 3, "one an image, for all tasks and seeds"
    assert costs["measure"] == 1
    run(toy.config(out, "toy_smooth", tasks=["seg", "depth"], seeds=4))
    assert costs["measure"] == 1, "costs of a configuration are kept beside the records"


def test_a_cells_numbers_do_not_depend_on_the_cells_beside_it(toy, tmp_path):
    """Else a run that goes on after a kill, or shares its cells, would give others."""
    tasks = ["seg", "depth"]
    together = run(toy.config(tmp_path / "both", "toy_posed", tasks=tasks))
    alone = [run(toy.config(tmp_path / task, "toy_posed", tasks=[task]))[0] for task in tasks]
    for one, other in zip(together, alone, strict=True):
        assert one.cell == other.cell
        assert json.dumps(one.metrics) == json.dumps(other.metrics)
        assert one.per_image == other.per_image


def test_limit_is_loud(toy, out, capsys):
    (record,) = run(toy.config(out, limit=2))
    assert record.per_image["val"]["names"] == ["val0", "val1"]
    assert any("only the first 2 images" in text for text in record.warnings)
    assert "WARNING: --limit 2" in capsys.readouterr().err
    assert record.cell.key != run(toy.config(out))[0].cell.key


def test_probe_settings_other_than_the_protocols_are_told(toy, out):
    (record,) = run(toy.config(out, probe={"epochs": 1}))
    assert record.protocol["recipe"]["epochs"] == 1
    assert record.warnings == ["probe settings differ from the protocol: epochs=1"]


def test_options_weights_and_cameras_make_rows_of_their_own(toy, out):
    methods = [
        "toy_smooth",
        {"name": "toy_smooth", "mode": "nearest"},
        "toy_trained:none",
        "toy_posed",
        {"name": "toy_posed", "camera": "dataset"},
    ]
    records = run(toy.config(out, methods, tasks=["depth"], seeds=1))
    assert [r.status for r in records] == ["ok"] * 5
    scores = [r.metrics["val"]["absrel"][0] for r in records]
    assert scores[0] != scores[1]
    assert records[2].warnings == ["random weights"]
    assert scores[3] != scores[4], "the camera reaches the method"
    rows = [r.row for r in records]
    assert rows == [
        "Smooth",
        "Smooth (mode=nearest)",
        "toy_trained:none",
        "toy_posed",
        "toy_posed (camera=dataset)",
    ]


def test_bfloat16_runs_and_differs_a_little(toy, out):
    (single,) = run(toy.config(out, "toy_posed", tasks=["depth"], seeds=1))
    (half,) = run(toy.config(out, "toy_posed", tasks=["depth"], seeds=1, dtype="bfloat16"))
    assert half.status == "ok", half.traceback
    a, b = single.metrics["val"]["rmse"][0], half.metrics["val"]["rmse"][0]
    assert a != b
    assert math.isclose(a, b, rel_tol=0.1)
    assert half.cost["cpu"]["dtype"] == "bfloat16"


def test_stopping_keeps_what_is_finished(toy, out, capsys, monkeypatch):
    config = toy.config(out, "toy_smooth,toy_stops")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert "stopped: 1 of 2 cells are kept" in capsys.readouterr().err
    assert [r.cell.method.name for r in load_records(out)] == ["toy_smooth"]
    monkeypatch.setenv("TOY_HEALED", "1")
    assert [r.status for r in run(config)] == ["ok", "ok"]


def test_kill_9_leaves_whole_records_and_resumes(toy, out, tmp_path, monkeypatch):
    mark = tmp_path / "running"
    process = toy.process(toy.arguments(out, "toy_smooth,toy_stops"), TOY_MARK=str(mark))
    while not mark.exists():
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    (kept,) = load_records(out)
    assert (kept.cell.method.name, kept.status) == ("toy_smooth", "ok")
    monkeypatch.setenv("TOY_HEALED", "1")
    records = run(toy.config(out, "toy_smooth,toy_stops"))
    assert [r.status for r in records] == ["ok", "ok"]
    assert records[0].started == kept.started
    assert len(list((out / "records").iterdir())) == 2, "nothing half-written is left"


def test_worker_processes_give_the_same_records(toy, tmp_path):
    methods = "toy_fails,toy_dies,toy_smooth"
    parallel = by_method(run(toy.config(tmp_path / "p", methods, executor="process", workers=1)))
    inline = by_method(run(toy.config(tmp_path / "i", "toy_smooth")))
    ours, theirs = (r["toy_smooth"].metrics["val"]["miou"] for r in (parallel, inline))
    assert ours == pytest.approx(theirs, rel=0.01), "equal but for the number of threads"
    assert parallel["toy_fails"].reason == "ValueError: boom in two lines"
    assert parallel["toy_dies"].status == "failed"
    assert "killed by SIGKILL" in parallel["toy_dies"].reason
    assert len(load_records(tmp_path / "p")) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray before 2.57 leaves processes and log files
def test_a_ray_cluster_gives_the_same_records(toy, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    methods = "toy_fails,toy_dies,toy_smooth"
    with ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False):
        remote = by_method(run(toy.config(tmp_path / "r", methods, executor="ray", workers=2)))
    inline = by_method(run(toy.config(tmp_path / "i", "toy_smooth")))
    ours, theirs = (r["toy_smooth"].metrics["val"]["miou"] for r in (remote, inline))
    assert ours == pytest.approx(theirs, rel=0.01), "equal but for the number of threads"
    assert remote["toy_fails"].reason == "ValueError: boom in two lines"
    assert remote["toy_dies"].status == "failed"
    assert "the Ray task died" in remote["toy_dies"].reason
    assert len(load_records(tmp_path / "r")) == 3


@pytest.mark.parametrize(
    ("executor", "device", "visible", "place", "devices"),
    [
        ("inline", "cuda:1", None, "cuda:1", ["1"]),
        ("process", "cuda:1", None, "cuda", ["1"]),
        ("process", "cuda:1", "4,6", "cuda", ["6"]),
        ("process", "cuda", None, "cuda", ["0", "1"]),
        ("ray", "cuda:0", "GPU-a,GPU-b", "cuda", ["GPU-a"]),
        ("process", "cpu", "4,6", "cpu", []),
    ],
)
def test_which_gpus_workers_are_given(toy, out, monkeypatch, executor, device, visible, place, devices):
    """One that is given the second GPU sees no other: there it is the first."""
    handed = []

    def execute(work, jobs, workers, devices, lost_after):
        for job in jobs:
            handed.append(([planned.place for planned in job.cells], list(devices)))
            yield job, Lost("nobody is there")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU of {device}")
    monkeypatch.setattr(environment, "describe", environment.describe.__wrapped__)  # it remembers
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    monkeypatch.setattr(loop, "find_executor", lambda name: execute)
    monkeypatch.setattr(loop, "_prepare", lambda worker, pending: None)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        loop._Run, "_measured", lambda self, pending: {planned.cell.key: {} for planned in pending}
    )
    (record,) = run(toy.config(out, executor=executor, device=device))
    assert handed == [([place], devices)] * 2, "a cell whose worker was lost is tried once more"
    assert record.reason == "tried twice: nobody is there"
    assert record.environment["gpu"] == (None if device == "cpu" else f"GPU of {place}")


def test_a_debugger_opens_where_a_cell_fails(toy, out, monkeypatch):
    seen = []
    monkeypatch.setattr(work.pdb, "post_mortem", lambda trace: seen.append(trace))
    (record,) = run(toy.config(out, "toy_fails"), debug=True)
    assert record.status == "failed"
    assert len(seen) == 1
    with pytest.raises(UpbenchError, match="needs the executor 'inline'"):
        run(toy.config(out, executor="process"), debug=True)


def test_the_plugin_of_these_tests_is_a_plugin_like_any_other(toy):
    assert toy.PLUGIN.is_file()
    assert find_method("toy_smooth").__module__.startswith("upbench_plugin_")


def test_parts_are_one_run(toy, out):
    parts = [{"tasks": ["toy_noted"]}, {"tasks": ["seg"], "methods": ["toy_posed"]}]
    records = run(toy.config(out, parts=parts))
    assert [(record.cell.task, record.cell.method.name) for record in records] == [
        ("toy_noted", "toy_smooth"),
        ("seg", "toy_posed"),
    ]
    assert {record.status for record in records} == {"ok"}
    assert len(load_records(out)) == 2, "in one folder"


def test_a_published_number_finds_the_record_of_a_run(toy, out):
    """What a run writes down and what published numbers say of their setting are the same words."""
    (record,) = run(toy.config(out))
    side = record.protocol["output_size"][0]
    facts = {"protocol": "tiny", "task": "seg", "dataset": "toy", "split": "val", "backbone": "tiny"}
    paper, text = Paper("tiny", "Tiny", "", 2026, ""), {"table": "Table 1", "variant": "", "weights": ""}
    sizes = {"image": record.protocol["image_size"][0], "output": side}
    number = {"metric": "miou", "value": 50.0, "printed": "50.0", "unit": "%", "read_in": "paper", "note": ""}
    row = Published(paper=paper, method="toy_smooth", **facts, **text, **sizes, **number)
    table = build_tables(load_records(out), published=[row])[0]
    value = table.rows[0].values["seg/miou_minus_published"]
    assert value.number == pytest.approx(table.rows[0].values["seg/miou"].number - 50.0)
    other = dataclasses.replace(row, output=side + 1)
    assert "published" not in render(load_records(out), published=[other]).replace("No published", "")
