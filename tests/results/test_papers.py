"""Published numbers: what comes with upbench is sound, and what is not sound is refused."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from upbench.errors import UpbenchError
from upbench.results.papers import COLUMNS, load_published, protocols_of, select

PAPERS = 'raysup: {title: RaysUp, arxiv: "2606.22749", year: 2026, code: ""}\n'
GOOD = {
    "table": "Table 1",
    "task": "seg",
    "dataset": "voc2012",
    "split": "val",
    "backbone": "vit",
    "image": "448",
    "output": "448",
    "protocol": "raysup-seg",
    "method": "raysup",
    "variant": "",
    "weights": "",
    "metric": "miou",
    "value": "84.64",
    "unit": "%",
    "read_in": "paper",
    "note": "",
}


def folder(tmp_path: Path, *lines: dict[str, str], papers: str = PAPERS) -> Path:
    (tmp_path / "papers.yaml").write_text(papers)
    text = [",".join(COLUMNS), *(",".join(line[name] for name in COLUMNS) for line in lines)]
    (tmp_path / "raysup.csv").write_text("\n".join(text) + "\n")
    return tmp_path


def test_what_comes_with_upbench():
    rows = load_published()
    assert len(rows) > 1000
    assert {row.paper.name for row in rows} >= {"raysup", "anyup", "jafar", "naf", "loftup", "uplift"}
    voc = select(rows, method="bilinear", dataset="voc2012", task="seg", metric="miou")
    four = {row.paper.name: (row.protocol, row.printed) for row in voc if row.protocol and row.image == 448}
    assert four["jafar"][1], "the four values of docs/papers.md"
    assert {paper: four[paper] for paper in ("anyup", "raysup", "uplift")} == {
        "anyup": ("anyup-seg", "81.43"),
        "raysup": ("raysup-seg", "81.70"),
        "uplift": ("raysup-seg", "81.62"),
    }
    assert all(row.second_hand for row in rows if row.paper.name == "raysup" and row.protocol)
    assert not [row for row in rows if row.read_in == "reproduction" and row.protocol], "no paper's numbers"


def test_numbers_of_a_protocol_are_of_its_family():
    tasks = {
        "seg": "seg",
        "depth": "depth",
        "normals": "normals",
        "davis": "video",
        "fidelity": "frozen_head",
    }
    for row in load_published():
        if row.protocol:
            assert row.task == tasks[row.protocol.split("-")[1]], row
    assert "raysup-seg" in protocols_of(load_published())


def test_a_good_line_is_read(tmp_path):
    (row,) = load_published(folder(tmp_path, GOOD))
    assert (row.value, row.printed, row.image, row.second_hand) == (84.64, "84.64", 448, False)
    assert row.source == "RaysUp (arXiv 2606.22749), Table 1"
    assert row.to_dict()["paper"] == "raysup"
    oom, plain = GOOD | {"value": "OOM"}, GOOD | {"image": "", "output": "", "protocol": "", "table": ""}
    first, second = load_published(folder(tmp_path, oom, plain))
    assert math.isnan(first.value)
    assert first.to_dict()["value"] is None
    assert (second.image, second.output, second.source) == (None, None, "RaysUp (arXiv 2606.22749)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "84,64"}, "expected 16 fields"),
        ({"value": "good"}, "value must be a number or OOM, got 'good'"),
        ({"value": "nan"}, "value is out of range"),
        ({"value": "-1"}, "value is out of range: -1 %"),
        ({"value": "8464"}, "value is out of range: 8464 %"),
        ({"value": ""}, "value is empty"),
        ({"method": ""}, "method is empty"),
        ({"unit": "percent"}, "unit must be one of %"),
        ({"read_in": "a dream"}, "read_in must be one of paper"),
        ({"image": "448x448"}, "image must be a side in pixels, got '448x448'"),
        ({"output": "0"}, "output must be a side in pixels, got '0'"),
        ({"note": " late"}, "note has spaces to spare"),
        ({"split": ""}, "a number of a protocol needs a dataset, a split and a backbone"),
        ({"backbone": ""}, "a number of a protocol needs a dataset, a split and a backbone"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change, message):
    with pytest.raises(UpbenchError, match=rf"raysup\.csv, line 3: {re.escape(message)}"):
        load_published(folder(tmp_path, GOOD, GOOD | change))


def test_files_that_are_not_right_are_named(tmp_path):
    with pytest.raises(UpbenchError, match=r"line 3: the same number as in line 2"):
        load_published(folder(tmp_path, GOOD, GOOD | {"value": "84.65"}))
    place = folder(tmp_path, GOOD)
    (place / "jafar.csv").write_text((place / "raysup.csv").read_text())
    with pytest.raises(UpbenchError, match=r"does not know the paper of jafar\.csv"):
        load_published(place)
    (place / "raysup.csv").write_text("method,value\n")
    with pytest.raises(UpbenchError, match=r"raysup\.csv: expected the columns table, task"):
        load_published(place)
    (place / "raysup.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UpbenchError, match=r"raysup\.csv is no CSV file"):
        load_published(place)
    (place / "raysup.csv").unlink()
    with pytest.raises(UpbenchError, match=r"cannot read .*raysup\.csv"):
        load_published(place)
    for text in ("[1, 2", "- raysup", "raysup: {titel: RaysUp}"):
        (place / "papers.yaml").write_text(text)
        with pytest.raises(UpbenchError, match="is no list of papers"):
            load_published(place)
    with pytest.raises(UpbenchError, match=r"cannot read .*papers\.yaml"):
        load_published(tmp_path / "nowhere")


def test_unknown_names_get_the_nearest_one():
    rows = load_published()
    with pytest.raises(
        UpbenchError, match=r"unknown published protocol 'raysup_seg'; did you mean 'raysup-seg'"
    ):
        select(rows, protocol="raysup_seg")
    with pytest.raises(UpbenchError, match=r"unknown published dataset 'voc'; did you mean 'voc2012'"):
        select(rows, dataset="voc")
    assert select(rows, method="raysup", dataset="spair71k") == []


def test_without_torch():
    code = "import sys, upbench.results.papers as p; p.load_published(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
