"""Records of the first edition that are in this repository give the tables that they gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from upbench.results.records import frame, load_records, read_record, write_record
from upbench.results.report import render

ROOT = Path(__file__).resolve().parents[2] / "results"


@pytest.mark.parametrize(
    ("folder", "options"), [("all", {}), ("raysup_ablation", {"against": "released form"})]
)
def test_tables_are_those_that_are_published(folder, options):
    assert render(load_records(ROOT / folder), **options) == (ROOT / folder / "table.md").read_text()


def test_what_a_record_of_the_first_edition_becomes(tmp_path):
    path = tmp_path / "records" / "a.json"
    path.parent.mkdir()
    data = json.loads(min((ROOT / "reference" / "quick" / "records").glob("*.json")).read_text())
    data["cell"]["dataset"] = "interiors:/home/somebody/rooms"
    path.write_text(json.dumps(data))
    (record,) = load_records(tmp_path)
    assert (record.schema, record.cell.protocol, record.cell.dataset) == (2, "quick", "interiors")
    assert (record.protocol["name"], record.protocol_label) == ("quick", "quick-v1")
    assert record.about["license"] == data["about"]["licence"]
    assert "licence" not in record.about
    assert record.cell.data == ""
    assert "somebody" not in render([record])
    line = frame([record]).iloc[0]
    assert (line["preset"], line["protocol"], line["dataset"]) == ("quick", "quick-v1", "interiors")
    assert (line["row"], line["image_size"], line["data"]) == (record.row, 224, record.content)


def test_a_record_of_the_first_edition_is_written_as_one_of_the_second(tmp_path):
    for path in sorted((ROOT / "all" / "records").glob("*-seg-*.json")):
        old = read_record(path)
        new = write_record(tmp_path, old)
        assert json.loads(new.read_text())["schema"] == 2
        assert read_record(new) == old
    folder = ROOT / "all" / "records"
    assert render(load_records(tmp_path)) == render(load_records(folder.glob("*-seg-*.json")))
