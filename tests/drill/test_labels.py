"""Every record that is written is read again, whatever its row is called."""

from __future__ import annotations

import pytest

from drill.cases.labels import KEPT, REFUSED
from upbench.errors import UpbenchError
from upbench.results.cell import MethodSpec
from upbench.results.records import load_records
from upbench.results.report import build_tables, render
from upbench.run.config import RunConfig
from upbench.run.loop import run

pytestmark = pytest.mark.drill("labels")


def test_a_record_is_read_under_any_label(toy, tmp_path):
    out = tmp_path / "run"
    for label in KEPT:  # the cell is finished after the first; its record gets the label that its row has now
        rows = [{"name": "toy_smooth", "label": label}]
        assert [record.row for record in run(toy.config(out, rows))] == [label]
        (record,) = load_records(out)
        assert record.row == label == record.cell.method.label
        (file,) = (out / "records").glob("*.json")
        assert not file.name.startswith(".")
        assert render([record]).count("toy/val") >= 1
        assert {row.label for table in build_tables([record]) for row in table.rows} == {label}
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing was written elsewhere"


@pytest.mark.parametrize("label", [".5 ablation", "../../x", "x" * 200])
def test_a_new_record_is_read_under_any_label(toy, tmp_path, label):
    run(toy.config(tmp_path / "run", [{"name": "toy_smooth", "label": label}]))
    assert [record.row for record in load_records(tmp_path / "run")] == [label]


@pytest.mark.parametrize(("label", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_label_is_refused_in_python_too(label, words):
    with pytest.raises(UpbenchError) as caught:
        RunConfig(methods=[MethodSpec("nearest", label=label)])
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).isprintable()
