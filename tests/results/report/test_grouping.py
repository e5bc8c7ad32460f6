"""What stands in one table, what its heading and notes say, and what rows are compared with."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest
from recording import record

from upbench.errors import UpbenchError
from upbench.results.cell import MethodSpec
from upbench.results.records import frame
from upbench.results.report import Table, build_tables, render, show, write

A, B = "a1b2c3d4e5f60718", "99887766554433ff"


def one_table(*records, **options) -> Table:
    (table,) = build_tables(records, **options)
    return table


def shown(table: Table) -> dict[tuple[str, str], str]:
    return {(r.label, c.key): table.value(r, c).format(c) for r in table.rows for c in table.columns}


def rows_of_csv(records, **options) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(records, "csv", **options))))


# ----------------------------------------------------------------------------------------------- records


def test_a_dataframe_is_an_export_and_tables_say_so(tmp_path):
    given = frame([record("raysup")])
    for use in (build_tables, render, show, lambda data: write(data, "md", tmp_path / "a.md")):
        for data in (given, pd.DataFrame()):
            with pytest.raises(UpbenchError, match=r"not of a DataFrame: use upbench.load_records") as caught:
                use(data)
            assert "\n" not in str(caught.value)
    with pytest.raises(UpbenchError, match="not of a str"):
        render("runs/latest")
    assert not list(tmp_path.iterdir())


def test_any_iterable_of_records_will_do():
    assert render(iter([record("raysup")])) == render((record("raysup"),))
    assert build_tables([]) == []


# ------------------------------------------------------------------------------------------------- data


def test_two_contents_of_one_name_never_share_a_table():
    records = [record("raysup", cell_data=A), record("raysup", cell_data=B), record("jbu", cell_data=A)]
    tables = build_tables(records)
    assert {table.title: [row.label for row in table.rows] for table in tables} == {
        "vit · rooms/val · quick-v1 · data a1b2c3d4": ["Jbu", "Raysup"],
        "vit · rooms/val · quick-v1 · data 99887766": ["Raysup"],
    }
    assert {row["data"] for row in rows_of_csv(records)} == {A, B}


def test_a_digest_stands_in_headings_only_where_it_tells_tables_apart():
    assert one_table(record("raysup", cell_data=A)).title == "vit · rooms/val · quick-v1"
    titles = {
        table.title
        for table in build_tables(
            [
                record("raysup", cell_data=A),
                record("raysup", cell_data=A, limit=3),
                record("raysup", cell_data=B, dataset="streets"),
                record("raysup", cell_data=B, backbone="cnn"),
                record("raysup", cell_data=B, protocol="standard"),
            ]
        )
    }
    assert not any("data" in title for title in titles)
    assert len(titles) == 4


def test_records_that_say_nothing_of_their_content_do_not_mix_with_those_that_do():
    titles = [table.title for table in build_tables([record("raysup"), record("raysup", cell_data=A)])]
    assert titles == ["vit · rooms/val · quick-v1", "vit · rooms/val · quick-v1 · data a1b2c3d4"]


def test_fingerprints_tell_contents_apart_where_there_is_no_digest():
    """As in the first edition, where a folder was part of a dataset's name."""
    records = [record("raysup", inputs={"dataset": {"val": digest}}) for digest in ("aa", "bb")]
    titles = {table.title for table in build_tables(records)}
    assert len(titles) == 2
    assert titles == {f"vit · rooms/val · quick-v1 · data {each.content[:8]}" for each in records}


def facts(images: int, official: int | None) -> dict:
    return {"images": images, "official": official, "fingerprint": "ab", "names": "cd"}


def test_notes_say_how_many_images_and_of_how_many():
    whole = one_table(record("raysup", data={"val": facts(24, 24)}))
    assert any("; 24 images; mean" in note for note in whole.notes)
    assert "partial" not in "\n".join(whole.notes)
    unknown = one_table(record("raysup", data={"val": facts(24, None)}))
    assert "partial" not in "\n".join(unknown.notes)
    part = one_table(record("raysup", data={"val": facts(300, 1464), "train": facts(10, 10)}))
    assert any("; 300 images; mean" in note for note in part.notes)
    assert "**partial copy**: 300 of 1464 images" in part.notes
    assert "\n".join(part.notes).count("partial copy") == 1
    (row,) = rows_of_csv([record("raysup", data={"val": facts(300, 1464)}, warnings=["careful"])])
    assert row["remarks"] == "careful; partial copy: 300 of 1464 images"


def test_a_partial_copy_of_what_was_trained_on_is_told_too():
    data = {"train": facts(100, 10582), "val": facts(5, 5), "test": facts(1, 7)}
    metrics = {"val": {"miou": [1.0]}, "test": {"miou": [2.0]}}
    val, test = build_tables([record("raysup", data=data, metrics=metrics)])
    assert [note for note in val.notes if "partial" in note] == [
        "**partial copy**: 100 of 10582 images of train"
    ]
    assert [note for note in test.notes if "partial" in note] == [
        "**partial copy**: 100 of 10582 images of train",
        "**partial copy**: 1 of 7 images",
    ]


def test_a_limit_is_no_partial_copy():
    table = one_table(record("raysup", limit=3, data={"val": facts(3, 1464)}))
    assert "partial" not in "\n".join(table.notes)


# --------------------------------------------------------------------------------------------- protocol


def test_a_protocol_goes_by_name_and_version():
    first, second = record("raysup"), record("raysup")
    second.protocol["version"] = 2
    assert first.protocol_label == "quick-v1"
    assert [table.facts["protocol"] for table in build_tables([first, second])] == ["quick-v1", "quick-v2"]


def test_what_a_protocol_leaves_open_or_does_otherwise_is_noted():
    exact = "\n".join(one_table(record("raysup")).notes)
    assert "exact" not in exact, "it is its own source"
    assert "departs" not in exact
    loose = record("raysup", protocol="vitup")
    loose.protocol.update(exact="open: the schedule of the probe", departures=["no flips", "one seed"])
    loose.protocol["source"] = "some paper"
    notes = one_table(loose).notes
    assert "vitup-v1 is not exact; open: the schedule of the probe" in notes
    assert "vitup-v1 departs from its source: no flips; one seed" in notes
    strict = record("raysup", protocol="jafar-seg")
    strict.protocol["source"] = "JAFAR, arXiv 2506.11136"
    notes = one_table(strict).notes
    assert "jafar-seg-v1 is exact: every parameter is known; JAFAR, arXiv 2506.11136" in notes


@pytest.mark.parametrize(
    ("image", "output", "text"),
    [
        (224, 224, "quick-v1: image 224 px, output 224 px; "),
        ([448, 448], [112, 112], "quick-v1: image 448 px, output 112 px; "),
        ([480, 854], [480, 854], "quick-v1: image 480x854 px, output 480x854 px; "),
        (None, [224, 224], "quick-v1: output 224 px; "),
        (None, None, "3 images; "),
    ],
)
def test_sizes(image, output, text):
    each = record("raysup")
    each.protocol.update(image_size=image, output_size=output)
    assert one_table(each).notes[0].startswith(text)


def test_tasks_of_one_protocol_may_have_sizes_of_their_own():
    other = record("raysup", "depth", (0.1, 0.2))
    other.protocol.update(output_size=[56, 56])
    (note, *_) = one_table(record("raysup"), other).notes
    assert "image 224 px, output 224 px (seg); " in note
    assert "image 224 px, output 56 px (depth); " in note


# ------------------------------------------------------------------------------------------------ tasks


def test_a_task_that_nothing_here_has_heard_of():
    columns = [
        {"name": "jf", "title": "J&F", "higher_is_better": True, "unit": "%", "main": True},
        {"name": "frames", "title": "Frames", "higher_is_better": None, "unit": "", "main": True},
    ]
    records = [
        record(method, "video", columns=columns, metrics={"val": {"jf": [value], "frames": [7.0]}})
        for method, value in (("jbu", 60.0), ("raysup", 70.0))
    ]
    table = one_table(*records)
    assert [column.header for column in table.columns[:2]] == ["video J&F (%) ↑", "video Frames"]
    assert shown(table)["Raysup", "video/jf"] == "70.00", "one value has no deviation"
    assert shown(table)["Raysup", "video/frames"] == "7.000"
    marked = {(row.label, key) for row in table.rows for key, value in row.values.items() if value.best}
    assert marked == {("Raysup", "video/jf")}
    assert "one value each" in table.notes[0]
    assert "seg" not in render(records)


def test_records_of_a_task_with_other_metrics_lose_none():
    extra = {"name": "pq", "title": "PQ", "higher_is_better": True, "unit": "%", "main": True}
    old, new = record("jbu"), record("raysup", columns=[*record("jbu").columns, extra])
    for records in ([old, new], [new, old]):
        table = one_table(*records)
        assert [c.key for c in table.columns][:2] == ["seg/miou", "seg/pq"]
        assert shown(table)["Raysup", "seg/pq"] == "51.00 ± 1.41"
        assert shown(table)["Jbu", "seg/pq"] == "–"


def test_a_task_that_calls_no_metric_main_shows_its_first():
    columns = [{"name": "epe", "title": "EPE", "higher_is_better": False, "unit": "px", "main": False}]
    table = one_table(
        record("jbu", "flow", columns=columns),
        record("raysup", "flow", columns=columns, status="failed", reason="boom"),
    )
    assert shown(table)["Jbu", "flow/epe"] == "51.000 ± 1.414"
    assert shown(table)["Raysup", "flow/epe"] == "failed [1]"


# --------------------------------------------------------------------------------------------- against

ROWS = (
    record("raysup"),
    record("raysup", spec=MethodSpec("raysup", options={"window": 7})),
    record("raysup", spec=MethodSpec("raysup", weights="none", label="raysup, untrained")),
    record("jbu", spec=MethodSpec("jbu", label="Ours | *bold*")),
)


def test_labels_stand_as_they_were_written():
    labels = {row.label for row in one_table(*ROWS).rows}
    assert labels == {"Raysup", "Raysup (window=7)", "raysup, untrained", "Ours | *bold*"}
    assert {row["method"] for row in rows_of_csv(ROWS)} == labels


@pytest.mark.parametrize(
    ("against", "base"),
    [
        ("Raysup", "Raysup"),
        ("raysup", "Raysup"),
        ("Raysup (window=7)", "Raysup (window=7)"),
        ("raysup (window=7)", "Raysup (window=7)"),
        ("raysup, untrained", "raysup, untrained"),
        ("jbu", "Ours | *bold*"),
        ("Ours | *bold*", "Ours | *bold*"),
    ],
)
def test_rows_are_compared_with_a_row_or_a_method(against, base):
    table = one_table(*ROWS, against=against)
    key = f"seg/miou_vs_{against}"
    without = [row.label for row in table.rows if key not in row.values]
    assert without == [base], "the base has no difference to itself, all others have one"


def test_a_method_that_is_several_rows_is_no_base():
    with pytest.raises(UpbenchError) as caught:
        build_tables(ROWS[1:], against="raysup")
    assert str(caught.value) == "'raysup' is 2 rows: name one of 'Raysup (window=7)', 'raysup, untrained'"


@pytest.mark.parametrize(
    ("against", "guess"), [("Ours", "Ours | *bold*"), ("raysup, untraind", "raysup, untrained")]
)
def test_a_row_that_is_not_there(against, guess):
    with pytest.raises(UpbenchError) as caught:
        build_tables(ROWS, against=against)
    assert str(caught.value) == f"unknown method in these records '{against}'; did you mean '{guess}'?"


def test_a_new_label_of_a_cell_is_that_of_its_row():
    old = record("raysup", spec=MethodSpec("raysup", label="first"), started="2026-01-01")
    new = record("raysup", spec=MethodSpec("raysup", label="second"), started="2026-01-02")
    other = record("raysup", "depth", (0.1, 0.2), spec=MethodSpec("raysup", label="first"), started="2026")
    for order in ([old, other, new], [new, old, other]):
        assert [row.label for row in one_table(*order).rows] == ["second"]


def test_a_label_of_several_lines_does_not_break_a_table():
    each = record("raysup", spec=MethodSpec("raysup", label="a\nb"), status="failed", reason="x\ny")
    text = render([each, record("jbu", warnings=["one\r\ntwo"])])
    assert "| a b " in text
    assert "[1] a b, seg: x y" in text
    assert "one two" in text
