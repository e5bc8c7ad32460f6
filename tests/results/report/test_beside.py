"""Published numbers stand beside measured ones where everything agrees, and nowhere else."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from typing import Any

import pytest
from recording import DEPTH, SEG, record

from upbench.results.cell import MethodSpec
from upbench.results.papers import Paper, Published, load_published
from upbench.results.records import Record
from upbench.results.report import build_tables, render
from upbench.results.report.beside import MARK, NONE, matching, setting_of

PAPER = Paper("raysup", "RaysUp", "2606.22749", 2026, "")
OTHER = Paper("uplift", "UPLiFT", "2601.17950", 2026, "")
ROW = Published(
    paper=PAPER,
    table="Table 1",
    task="seg",
    dataset="voc2012",
    split="val",
    backbone="vit",
    image=448,
    output=448,
    protocol="raysup-seg",
    method="bilinear",
    variant="",
    weights="",
    metric="miou",
    value=81.7,
    printed="81.70",
    unit="%",
    read_in="paper",
    note="",
)


def measured(method: str = "bilinear", **more: Any) -> Record:
    """A record of ROW's setting."""
    protocol = {"name": "raysup-seg", "version": 1, "image_size": [448, 448], "output_size": [448, 448]}
    protocol |= more.pop("protocol_more", {})
    more = {"dataset": "voc2012", "values": (82.0, 82.2), **more}
    made = record(method, **{"protocol": protocol["name"], **more})
    return replace(made, protocol={**made.protocol, **protocol})


def test_where_everything_agrees_it_stands_beside():
    (table,) = build_tables([measured()], published=[ROW])
    keys = [column.key for column in table.columns][:3]
    assert keys == ["seg/miou", "seg/miou_published", "seg/miou_minus_published"]
    (row,) = table.rows
    assert row.values["seg/miou_published"].number == 81.7
    assert row.values["seg/miou_minus_published"].number == pytest.approx(82.1 - 81.7)
    assert row.values["seg/miou_published"].note == 1
    assert table.footnotes == ["RaysUp (arXiv 2606.22749), Table 1"]


OTHERWISE = {
    "protocol": {"protocol_more": {"name": "jafar-seg"}},
    "no protocol": {},
    "backbone": {"backbone": "vit_base"},
    "dataset": {"dataset": "ade20k"},
    "output size": {"protocol_more": {"output_size": [224, 224]}},
    "no output size": {"protocol_more": {"output_size": None}},
    "image size": {"protocol_more": {"image_size": [224, 224]}},
    "split": {"metrics": {"test": {"miou": [82.0, 82.2], "accuracy": [90.0, 91.0]}}},
    "task": {"task": "parts", "columns": SEG},
    "metric": {"columns": [SEG[1]]},
    "unit": {"columns": [{**SEG[0], "unit": "m"}]},
    "method": {"method": "nearest"},
    "options": {"spec": MethodSpec("bilinear", options={"scale": 2})},
    "camera": {"spec": MethodSpec("bilinear", camera="dataset")},
    "limit": {"limit": 4},
    "probe": {"probe": {"lr": 0.1}},
    "partial copy": {"data": {"val": {"images": 3, "official": 1449, "fingerprint": "f", "names": "n"}}},
    "partial training": {
        "data": {"train": {"images": 3, "official": 1464, "fingerprint": "f", "names": "n"}}
    },
    "status": {"status": "failed", "reason": "it broke"},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_where_one_thing_differs_it_does_not(what: str):
    more = dict(OTHERWISE[what])
    other = measured(more.pop("method", "bilinear"), **more)
    row = replace(ROW, protocol="") if what == "no protocol" else ROW
    (table,) = build_tables([other], published=[row], metrics="all")
    assert not [column.key for column in table.columns if "published" in column.key]
    assert not [value for line in table.rows for value in line.values.values() if value.source]
    assert sum("o published number" in note for note in table.notes) == 1


def test_a_trial_says_why_nothing_stands_beside_it():
    (table,) = build_tables([measured(limit=4)], published=[ROW])
    assert "No published number stands here: only 4 images of a split were taken" in table.notes
    (table,) = build_tables([measured(dataset="ade20k")], published=[ROW])
    assert NONE in table.notes
    (table,) = build_tables([measured(dataset="ade20k")])
    assert NONE not in table.notes, "nobody asked"


def test_the_first_paper_is_shown_and_the_others_are_named():
    second = replace(ROW, paper=OTHER, table="", value=81.62, printed="81.62", read_in="notes")
    (table,) = build_tables([measured()], published=[ROW, second])
    assert table.rows[0].values["seg/miou_published"].number == 81.7
    assert "also 81.62 in UPLiFT (arXiv 2601.17950); second-hand" in table.footnotes[0]
    assert not any("second-hand" in note for note in table.notes), "what is shown is first-hand"


def test_the_protocols_own_paper_comes_first():
    jafar = Paper("jafar", "JAFAR", "2506.11136", 2025, "")
    rows = [replace(ROW, paper=jafar, value=80.7), ROW]
    assert [row.paper.name for row in matching(measured(), "val", rows)] == ["raysup", "jafar"]
    own = [replace(row, protocol="jafar-seg") for row in reversed(rows)]
    of_jafar = measured(protocol_more={"name": "jafar-seg"})
    assert [row.paper.name for row in matching(of_jafar, "val", own)] == ["jafar", "raysup"]


def test_second_hand_numbers_are_marked():
    (table,) = build_tables([measured()], published=[replace(ROW, read_in="notes")])
    value, column = table.rows[0].values["seg/miou_published"], table.columns[1]
    assert value.format(column) == f"81.70{MARK} [1]"
    assert any(note.startswith(f"Published numbers with {MARK} are second-hand") for note in table.notes)


def test_metrics_of_several_tasks_have_columns_of_their_own():
    depth = replace(ROW, task="depth", metric="rmse", value=0.5, printed="0.50", unit="m", protocol="p")
    records = [measured(task="depth", columns=DEPTH, values=(0.4,), protocol_more={"name": "p"})]
    records += [measured(protocol_more={"name": "p"})]
    (table,) = build_tables(records, published=[ROW, depth])
    assert [column.key for column in table.columns if "published" in column.key] == [
        "depth/rmse_published",
        "depth/rmse_minus_published",
    ], "seg's number is of another protocol"


def test_methods_that_were_not_measured_are_rows_when_asked():
    other = replace(ROW, method="large_image", variant="scale=8", value=80.0)
    foreign = replace(ROW, method="naf", protocol="naf-seg")
    rows = [ROW, other, foreign, replace(other, value=float("nan"), printed="OOM", note="elsewhere")]
    (table,) = build_tables([measured()], published=rows)
    assert [row.label for row in table.rows] == ["Bilinear"]
    (table,) = build_tables([measured()], published=rows, unmeasured=True)
    assert [row.label for row in table.rows] == ["Bilinear", "large_image (scale=8), published"]
    assert set(table.rows[1].values) == {"seg/miou_published"}
    (table,) = build_tables([measured(limit=3)], published=rows, unmeasured=True)
    assert len(table.rows) == 1, "a trial is no place for published numbers"


def test_every_format_has_number_source_and_difference():
    records, rows = [measured(), measured("nearest")], [replace(ROW, read_in="notes")]
    text = render(records, published=rows)
    assert "| published seg mIoU (%) ↑ | Δ seg mIoU − published (%) |" in text
    assert "| 81.70* [1] | +0.40 |" in " ".join(text.split())
    assert "[1] RaysUp (arXiv 2606.22749), Table 1; second-hand" in text
    line, other = csv.DictReader(io.StringIO(render(records, "csv", published=rows)))
    assert float(line["seg/miou_published"]) == 81.7
    assert float(line["seg/miou_minus_published"]) == pytest.approx(0.4)
    assert line["seg/miou_published_source"].startswith("RaysUp (arXiv 2606.22749), Table 1; second-hand")
    assert other["seg/miou_published"] == other["seg/miou_published_source"] == ""


def test_terminal_draws_them(capsys):
    from rich.console import Console

    from upbench.results.report.terminal import draw

    draw(build_tables([measured()], published=[ROW]), Console(width=200))
    text = capsys.readouterr().out
    assert "81.70 [1]" in text
    assert "+0.40" in text
    assert "[1] RaysUp" in text


def test_matching_reads_options_as_variants():
    large = measured("large_image", spec=MethodSpec("large_image", options={"scale": 8}))
    row = replace(ROW, method="large_image", variant="scale=8")
    assert matching(large, "val", [row, replace(row, variant="scale=4"), ROW]) == [row]


def test_no_number_of_any_paper_stands_under_another_setting():
    """For each setting that papers have: records of it find its own numbers, and records that differ in one
    thing find none of them."""
    every = [row for row in load_published() if row.protocol]
    settings = {setting_of(row): row for row in every}
    assert len(settings) > 30
    names = {name: {getattr(row, name) for row in every} for name in ("protocol", "dataset", "backbone")}
    for row in settings.values():
        facts = {
            "protocol": row.protocol,
            "dataset": row.dataset,
            "backbone": row.backbone,
            "split": row.split,
        }
        own = of_setting(row, **facts)
        found = matching(own, row.split, every)
        assert {setting_of(each) for each in found} <= {setting_of(row)}
        assert row in found or row.variant
        for name, others in names.items():
            for other in others - {facts[name]}:
                crossed = matching(of_setting(row, **{**facts, name: other}), row.split, every)
                assert all(getattr(each, name) == other for each in crossed), (name, other, row)
        for sizes in ({"image": 7}, {"output": 7}):
            assert not matching(of_setting(row, **facts, **sizes), row.split, every)
        assert not matching(own, "another split", every)


def of_setting(row: Published, **facts: Any) -> Record:
    """A record of a published number's method in a setting."""
    split, image, output = facts["split"], facts.get("image", row.image), facts.get("output", row.output)
    sizes = {"image_size": image and [image, image], "output_size": output and [output, output]}
    made = record(
        row.method,
        task=row.task,
        columns=[{**SEG[0], "name": row.metric, "unit": row.unit}],
        metrics={split: {row.metric: [1.0]}},
        **{name: facts[name] for name in ("protocol", "dataset", "backbone")},
    )
    return replace(made, protocol={**made.protocol, **sizes})
