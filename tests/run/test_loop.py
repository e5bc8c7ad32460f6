"""The loop over cells: what is recorded, kept, retried, shared, and what one bad cell costs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import upbench
from upbench.cost import measure
from upbench.errors import UpbenchError
from upbench.evaluate.protocol import find_preset
from upbench.registry import find_method, find_task
from upbench.results.records import Record, load_records
from upbench.run import worker as work
from upbench.run.loop import run


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


def test_a_record_is_enough_to_repeat_its_cell(toy, out):
    (record,) = run(toy.config(out, tasks=["depth"], seeds=3))
    assert record.status == "ok"
    (stored,) = load_records(out)
    assert json.dumps(stored.to_dict()) == json.dumps(record.to_dict()), "what is returned is what is kept"
    assert list(record.metrics) == ["val", "other"]
    assert len(record.metrics["val"]["rmse"]) == 3, "a value for each seed"
    assert record.per_image["val"]["names"] == ["val0", "val1", "val2", "val3"]
    assert [len(values) for values in record.per_image["val"]["values"]] == [4, 4, 4]
    assert record.columns[0]["name"] == "rmse"
    assert record.columns[0]["higher_is_better"] is False
    assert record.protocol["name"] == "tiny-v3"
    settings = find_preset("tiny").probe_for(find_task("depth").probe)
    assert record.protocol["probe"] == dataclasses.asdict(settings), "the preset's, then the task's"
    assert record.inputs["backbone"] == "tiny-1"
    assert set(record.inputs["dataset"]) == {"train", "val", "other"}
    assert len(record.inputs["method_source"]) == 64
    assert record.environment["packages"]["torch"] == torch.__version__
    assert record.environment["cores"] >= 1
    assert record.cost["cpu"]["latency_ms"] > 0
    assert record.cost["cpu"]["output_size"] == [32, 32]
    assert "cuda" not in record.cost
    assert record.seconds > 0
    assert record.started.endswith("+00:00")
    assert not record.warnings


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
    calls = count_calls(monkeypatch, work, "train_probe")
    retried = by_method(run(config))
    assert calls["train_probe"] == 0, "the failed cell fails before its first step"
    assert retried["toy_fails"].started != first["toy_fails"].started
    monkeypatch.setenv("TOY_HEALED", "1")
    second = by_method(run(config))
    assert second["toy_fails"].status == "ok"
    assert calls["train_probe"] == 2
    assert second["toy_smooth"].started == first["toy_smooth"].started
    run(dataclasses.replace(config, force=True))
    assert calls["train_probe"] == 2 + 4


def test_what_changed_is_run_again(toy, out, monkeypatch, capsys):
    run(toy.config(out))
    calls = count_calls(monkeypatch, work, "train_probe")
    monkeypatch.setenv("TOY_DATA", "2")
    run(toy.config(out))
    assert calls["train_probe"] == 2
    assert "run again, since its dataset changed" in capsys.readouterr().err
    assert len(load_records(out)) == 1, "the new record stands in place of the old one"


def test_an_edited_plugin_is_run_again(toy, out, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    text = "import torch.nn.functional as F\nfrom upbench import Upsampler\n"
    text += "class Mine(Upsampler):\n    name = 'mine'\n"
    text += "    def forward(self, image, features, output_size):\n"
    plugin.write_text(text + "        return F.interpolate(features, output_size)\n")
    config = toy.config(out, "mine", plugins=[str(plugin)])
    with toy.world():
        run(config)
    calls = count_calls(monkeypatch, work, "train_probe")
    with toy.world():
        run(config)
    assert calls["train_probe"] == 0
    plugin.write_text(text + "        return F.interpolate(features, output_size, mode='bilinear')\n")
    with toy.world():
        run(config)
    assert calls["train_probe"] == 2


def test_a_damaged_record_is_run_again(toy, out, capsys):
    run(toy.config(out))
    (path,) = (out / "records").glob("*.json")
    path.write_text(path.read_text()[:100])
    run(toy.config(out))
    assert f"damaged record {path}" in capsys.readouterr().err
    assert load_records(out)[0].status == "ok"


def test_a_new_label_keeps_the_numbers(toy, out, monkeypatch):
    run(toy.config(out))
    calls = count_calls(monkeypatch, work, "train_probe")
    run(toy.config(out, [{"name": "toy_smooth", "label": "Baseline"}]))
    assert calls["train_probe"] == 0
    assert [record.cell.method.label for record in load_records(out)] == ["Baseline"]


def test_shared_work_is_done_once(toy, out, monkeypatch):
    method = find_method("toy_smooth")
    loads = count_calls(monkeypatch, work.backbones, "load_backbone")
    features = count_calls(monkeypatch, work.features, "cached_features")
    views = count_calls(monkeypatch, method, "operator")
    costs = count_calls(monkeypatch, measure, "measure")
    run(toy.config(out, "toy_smooth", tasks=["seg", "depth"], seeds=3))
    assert loads["load_backbone"] == 1
    assert features["cached_features"] == 3, "one a split"
    assert views["operator"] == 6 + 4 + 3, "one an image, for all tasks and seeds"
    assert costs["measure"] == 1
    run(toy.config(out, "toy_smooth", tasks=["seg", "depth"], seeds=4))
    assert costs["measure"] == 1, "costs of a configuration are kept beside the records"


def test_limit_is_loud(toy, out, capsys):
    (record,) = run(toy.config(out, limit=2))
    assert record.per_image["val"]["names"] == ["val0", "val1"]
    assert any("only the first 2 images" in text for text in record.warnings)
    assert "WARNING: --limit 2" in capsys.readouterr().err
    assert record.cell.key != run(toy.config(out))[0].cell.key


def test_probe_settings_other_than_the_protocols_are_told(toy, out):
    (record,) = run(toy.config(out, probe={"epochs": 1}))
    assert record.protocol["probe"]["epochs"] == 1
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
    titles = [r.cell.method.title for r in records]
    assert titles[1] == "toy_smooth (mode=nearest)"
    assert titles[4] == "toy_posed (camera=dataset)"


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
