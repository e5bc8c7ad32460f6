"""Every record written is read, whatever its row is called."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording import record

from upbench.results.cell import MethodSpec
from upbench.results.records import Record, load_records, read_record, write_record
from upbench.results.report import render

LABELS = [
    ".5 ablation",
    "...",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "🙂",
    "a/b",
    "  ",
    "-x",
    "~",
    "CON",
    "\n",
    "a\x00b",
    "x" * 300,
    "名" * 300,
    "𝔘" * 300,
    "é.json",
    "ａ．ｂ",
    "٣",
]


def labelled(label: str) -> Record:
    return record("bilinear", spec=MethodSpec("bilinear", label=label))


def reads_back(folder, label: str) -> None:
    path = write_record(folder, labelled(label))
    assert path.parent == folder
    assert path.resolve().parent == folder.resolve()
    (found,) = load_records(folder)
    assert found.row == (label or "Bilinear")
    assert found.cell == labelled(label).cell
    assert render([found])
    path.unlink()
    assert not list(folder.iterdir())


@pytest.mark.parametrize("label", LABELS)
def test_a_label_gives_a_file_name_that_is_found(tmp_path, label):
    reads_back(tmp_path, label)


def test_any_label_gives_a_file_name_that_is_found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def try_label(label):
        reads_back(folder, label)

    try_label()


def test_long_names_of_everything_fit_a_file_system(tmp_path):
    wide = "𝔘" * 80
    long = record("bilinear", wide, spec=MethodSpec("bilinear", label=wide), backbone=wide, dataset=wide)
    assert len(long.file_name.encode()) <= 255
    assert read_record(write_record(tmp_path, long)).cell == long.cell


@pytest.mark.parametrize(
    ("spec", "row"),
    [
        (MethodSpec("raysup"), "RaysUp"),
        (MethodSpec("raysup", weights="none"), "RaysUp:none"),
        (MethodSpec("raysup", options={"window": 7, "dim": 8}), "RaysUp (dim=8, window=7)"),
        (MethodSpec("raysup", camera="dataset"), "RaysUp (camera=dataset)"),
        (MethodSpec("raysup", label="raysup with care"), "raysup with care"),
        (MethodSpec("raysup", label="raysup"), "raysup"),
        (MethodSpec("raysup", weights="none", label=" spaces kept "), " spaces kept "),
    ],
)
def test_a_row_is_called_what_the_user_calls_it(tmp_path, spec, row):
    about = {"title": "RaysUp"}
    assert record("raysup", spec=spec, about=about).row == row
    path = write_record(tmp_path, record("raysup", spec=spec, about=about))
    assert json.loads(path.read_text())["row"] == row
    assert read_record(path).row == row


def test_what_a_record_calls_its_row_is_kept():
    assert record("raysup", row="as it was written").row == "as it was written"


def test_a_method_without_a_title_goes_by_its_name():
    assert record("raysup", about={}).row == "raysup"
