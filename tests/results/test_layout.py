"""Damage: whatever stands in a file, it is read or refused in one line."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording import record

from upbench.errors import UpbenchError
from upbench.results.records import frame, load_records, read_record
from upbench.results.report import FORMATS, build_tables

ROOT = Path(__file__).resolve().parents[2]
FIRST_EDITION = ROOT / "results" / "reference" / "quick" / "records"
DELETED = "deleted"
REPLACEMENTS = [DELETED, None, "", -1, [], {}, 1e308, "x"]
ODD = [True, "\ud800", 10**30, [[]], {"x": {}}, 0.5]


def second_edition() -> dict[str, Any]:
    facts = {"val": {"images": 3, "official": 10, "fingerprint": "ab", "names": "cd"}}
    return json.loads(
        json.dumps(
            record("raysup", data=facts, cell_data="0123456789abcdef", inputs={}, warnings=["w"]).to_dict()
        )
    )


def first_edition() -> dict[str, Any]:
    data = json.loads(min(FIRST_EDITION.glob("*.json")).read_text())
    del data["metrics"]["val_heldout"], data["per_image"]["val_heldout"]  # more of the same
    data["columns"] = data["columns"][:2]
    names = [column["name"] for column in data["columns"]]
    data["metrics"]["val"] = {name: data["metrics"]["val"][name] for name in names}
    scores = data["per_image"]["val"]
    scores["names"] = scores["names"][:3]
    scores["values"] = [of_seed[:3] for of_seed in scores["values"]]
    return data


def paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a record but the record itself."""
    if path:
        yield path
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in inner:
        yield from paths(item, (*path, key))


def damaged(data: dict[str, Any], changes: list[tuple[tuple[Any, ...], Any]]) -> dict[str, Any]:
    data = copy.deepcopy(data)
    for (*above, last), value in changes:
        node: Any = data
        try:
            for key in above:
                node = node[key]
            if value is DELETED:
                del node[last]
            else:
                node[last] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            pass  # an earlier change took the place away
    return data


def read_or_refuse(folder: Path, data: Any) -> bool:
    """Whether a record is read; tables of every kind can then be made, beside those of a record in order."""
    path = folder / "a.json"
    path.write_text(json.dumps(data))
    try:
        found = read_record(path)
    except UpbenchError as error:
        message = str(error)
        found = None
    if found is None:
        assert message.startswith(f"damaged record {path}: ")
        assert "\n" not in message
        assert len(message) < 600 + len(str(path))
        return False
    records = [found, record("bilinear", cell_data="0123456789abcdef")]
    for options in ({}, {"metrics": "all", "against": "bilinear"}):
        tables = build_tables(records, **options)
        assert FORMATS["md"](tables).encode()
        assert list(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))
    assert len(frame(records)) == 2
    return True


@pytest.mark.parametrize("whole", [first_edition, second_edition])
def test_every_single_change_is_read_or_refused(tmp_path, whole):
    data = whole()
    assert read_or_refuse(tmp_path, data)
    # a path a kind of place: one seed stands for all, and so on
    kinds = {tuple("*" if isinstance(key, int) else key for key in path): path for path in paths(data)}
    refused = 0
    for path in kinds.values():
        for value in REPLACEMENTS:
            refused += not read_or_refuse(tmp_path, damaged(data, [(path, value)]))
    assert refused > len(kinds)


@pytest.mark.parametrize("whole", [first_edition, second_edition])
def test_several_changes_are_read_or_refused(tmp_path_factory, whole):
    data, folder = whole(), tmp_path_factory.mktemp("damage")
    change = st.tuples(st.sampled_from([*paths(data)]), st.sampled_from([*REPLACEMENTS, *ODD]))

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(change, min_size=1, max_size=4))
    def try_changes(changes):
        read_or_refuse(folder, damaged(data, changes))

    try_changes()


def refusal(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UpbenchError) as caught:
        load_records(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"damaged record {path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("cell", "seeds"), "01", "cell.seeds: expected a list, got '01'"),
        (("cell", "seeds"), [0, "1"], "cell.seeds[1]: expected a whole number, got '1'"),
        (("cell", "limit"), 1.5, "cell.limit: expected a whole number, got 1.5"),
        (("cell", "method"), [], "cell.method: expected a mapping, got []"),
        (("cell", "method", "options"), {"a": {"b": 1}}, "cell.method.options.a: expected a plain value"),
        (("cell", "protocol"), DELETED, "cell.protocol is missing"),
        (("status",), "done", "status: expected one of ok, skipped, failed, got 'done'"),
        (("status",), ["ok"], "status: expected one of"),
        (("metrics",), {}, "status is ok, but metrics: expected a mapping that is not empty, got {}"),
        (("metrics", "val"), {}, "status is ok, but metrics.val: expected a mapping that is not empty"),
        (("metrics", "val", "miou"), [1.0], "metrics.val.miou: expected a mapping, got [1.0]"),
        (("metrics", "val", "miou", "values"), [], "metrics.val.miou.values: expected at least 1 values"),
        (("metrics", "val", "miou", "values"), ["1"], "metrics.val.miou.values[0]: expected a number, got"),
        (("columns",), [], "status is ok, but columns: expected at least 1 values, got []"),
        (("columns", 0, "unit"), DELETED, "columns[0].unit is missing"),
        (("per_image", "val", "values", 0), [1.0], "per_image.val.values[0]: expected 3 values, got 1"),
        (("cost", "cpu", "output_size"), [224], "cost.cpu.output_size: expected 2 values, got [224]"),
        (
            ("data", "val", "images"),
            "3",
            "data.val.images: expected a whole number that is not negative, got '3'",
        ),
        (("protocol", "image_size"), [224], "protocol.image_size: expected 2 values, got [224]"),
        (("warnings",), "careful", "warnings: expected a list, got 'careful'"),
        (("warnings", 0), "\ud800", "surrogates not allowed"),
        (("seconds",), 2**70, "a whole number of more than 64 bits"),
        (("schema",), "2", "no such schema: '2'"),
        (("schema",), True, "no such schema: True"),
        (("schema",), 3, "schema 3 is newer than this version's 2"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_the_message_names_the_place(tmp_path, place, value, message):
    text = refusal(tmp_path, json.dumps(damaged(second_edition(), [(place, value)])))
    assert message in text
    assert text.endswith("; delete it and run its cell again")


def test_files_that_are_hardly_json(tmp_path):
    whole = json.dumps(second_edition())
    assert "not a record of upbench" in refusal(tmp_path, "[" * 30 + "]" * 30)
    assert "recursion" in refusal(tmp_path, "[" * 100_000)
    assert "nested deeper than 40 levels" in refusal(
        tmp_path, whole.replace('"w"', "[" * 60 + "1" + "]" * 60, 1)
    )
    assert "NaN is not JSON" in refusal(tmp_path, whole.replace("50.0", "NaN", 1))
    assert "a number of 5000 digits" in refusal(tmp_path, whole.replace("50.0", "9" * 5000, 1))
    assert "not text in UTF-8 (byte 0)" in refusal(tmp_path, b"\xff" + whole.encode())
    assert refusal(tmp_path, whole[:-1])


def test_a_number_that_json_writes_and_no_float_holds_is_no_result(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(second_edition()).replace("50.0", "1e999"))
    (table,) = build_tables([read_record(path)])
    assert table.value(table.rows[0], table.columns[0]).format(table.columns[0]) == "–"


def test_a_skipped_cell_needs_neither_metrics_nor_columns(tmp_path):
    changes = [(("status",), "skipped"), (("metrics",), {}), (("columns",), []), (("reason",), "too large")]
    assert read_or_refuse(tmp_path, damaged(second_edition(), changes))
    (table,) = build_tables([read_record(tmp_path / "a.json")])
    assert table.value(table.rows[0], table.columns[0]).format(table.columns[0]) == "skipped [1]"
    assert table.footnotes == ["Raysup, seg: too large"]
