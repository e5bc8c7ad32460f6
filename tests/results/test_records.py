"""Records: whole or not there, and a table that loses none."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from upbench.errors import UpbenchError
from upbench.results.cell import Cell, MethodSpec
from upbench.results.records import Record, Spread, load_records, read_record, read_records, write_record

MIOU = {"name": "miou", "title": "mIoU", "higher_is_better": True, "unit": "%", "main": True}
COST = {
    "parameters": 0,
    "macs": None,
    "latency_ms": 12.5,
    "latency_q25_ms": 12.0,
    "latency_q75_ms": 13.0,
    "peak_memory_bytes": None,
    "hardware": "Some CPU",
    "dtype": "float32",
    "batch": 1,
    "channels": 8,
    "feature_size": [2, 2],
    "output_size": [28, 28],
    "warnings": [],
}


def cell(method: str = "bilinear", task: str = "seg", **values) -> Cell:
    defaults = {
        "backbone": "tiny",
        "dataset": "toy",
        "protocol": "quick",
        "seeds": (0, 1),
        "limit": None,
        "device": "cpu",
        "dtype": "float32",
    }
    return Cell(MethodSpec(method), task, **{**defaults, **values})


def record(status: str = "ok", method: str = "bilinear", **values) -> Record:
    return Record(
        cell(method),
        status,
        **{
            "metrics": {"val": {"miou": [50.0, 52.0]}, "val_heldout": {"miou": [40.0, 44.0]}},
            "per_image": {"val": {"names": ["a", "b"], "values": [[1.0, math.nan], [2.0, 3.0]]}},
            "columns": [MIOU],
            "cost": {"cpu": COST},
            "protocol": {"name": "quick", "version": 1},
            "warnings": ["only 2 images"],
            **values,
        },
    )


def test_a_record_comes_back_as_it_was_written(tmp_path):
    written = record()
    path = write_record(tmp_path, written)
    assert path.name == written.file_name
    back = read_record(path)
    assert back.cell == written.cell
    assert back.metrics == {"val": {"miou": [50.0, 52.0]}, "val_heldout": {"miou": [40.0, 44.0]}}
    assert math.isnan(back.per_image["val"]["values"][0][1]), "an image without a value stays one"
    assert back.per_image["val"]["values"][1] == [2.0, 3.0]
    assert (back.columns, back.cost, back.warnings) == (written.columns, written.cost, written.warnings)


def test_a_record_is_plain_json_with_mean_and_deviation(tmp_path):
    path = write_record(tmp_path, record())

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert data["metrics"]["val"]["miou"] == {
        "mean": 51.0,
        "std": pytest.approx(math.sqrt(2)),
        "values": [50.0, 52.0],
    }
    assert data["key"] == record().cell.key


def test_spread_of_one_seed_has_no_deviation():
    assert Spread.of([3.0]) == Spread(3.0, None, [3.0])
    assert math.isnan(Spread.of([]).mean)
    assert math.isnan(Spread.of([1.0, math.nan]).mean), "a failed seed must not be averaged away"


def test_the_table_has_one_row_a_cell(tmp_path):
    write_record(tmp_path, record())
    write_record(tmp_path, record("skipped", "fixed16", reason="only 16x", metrics={}, per_image={}, cost={}))
    df = read_records(tmp_path)
    assert len(df) == 2
    row = df.set_index("method").loc["bilinear"]
    assert (row["miou"], row["val_heldout/miou"], row["cpu/latency_ms"]) == (51.0, 42.0, 12.5)
    assert row["miou_std"] == pytest.approx(math.sqrt(2))
    other = df.set_index("method").loc["fixed16"]
    assert (other["status"], other["reason"]) == ("skipped", "only 16x")
    assert math.isnan(other["miou"])


def test_records_are_found_from_a_run_its_folder_or_a_file(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    path = write_record(folder, record())
    for place in (tmp_path, folder, path, [folder, path]):
        assert {r.cell.key for r in load_records(place)} == {record().cell.key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"schema": 1, "cell"', "damaged record"),
        (b"\xff\xfe", "damaged record"),
        (b"[]", "not a record of upbench"),
        (b'{"a": 1}', "not a record of upbench"),
        (b'{"schema": 99}', "schema 99 is newer than this version's 2"),
        (b'{"schema": 0}', "schema 0 is older"),
        (b'{"schema": 1, "metrics": {}}', "a field is missing"),
    ],
)
def test_a_damaged_record_is_named_and_never_dropped(tmp_path, content, message):
    write_record(tmp_path, record())
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    with pytest.raises(UpbenchError, match=message) as caught:
        read_records(tmp_path)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_fields_are_damage(tmp_path):
    path = write_record(tmp_path, record())
    data = json.loads(path.read_text())
    for broken in ({**data, "surprise": 1}, {k: v for k, v in data.items() if k != "status"}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UpbenchError, match="a field is missing, unknown"):
            read_record(path)


def test_missing_places(tmp_path):
    with pytest.raises(UpbenchError, match="does not exist"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(UpbenchError, match="no records in"):
        load_records(tmp_path)


def test_status_is_one_of_three():
    with pytest.raises(ValueError, match="status"):
        record("done")


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch, at):
    path = write_record(tmp_path, record())
    before = path.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "write":
        monkeypatch.setattr(Path, "open", full)
    else:
        monkeypatch.setattr(os, at, full)
    with pytest.raises(UpbenchError, match="disk full: cannot write") as caught:
        write_record(tmp_path, record("failed"))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_reading_records_needs_no_torch(tmp_path):
    write_record(tmp_path, record())
    code = (
        "import sys, upbench; df = upbench.read_records(sys.argv[1]); assert len(df) == 1;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
