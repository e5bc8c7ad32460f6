"""`upbench published` and `upbench report --published`."""

from __future__ import annotations

import csv
import io
import json

from recording import record

from upbench.cli.dispatch import main
from upbench.results.records import write_record

S14 = "vit_small_patch14_dinov2.lvd142m"


def printed(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_lists_in_every_format(capsys):
    words = ("published", "--method", "raysup", "--dataset", "voc2012", "--protocol", "raysup-seg")
    text = printed(capsys, *words)
    assert "| raysup " in text
    assert "| 84.64 |" in text
    assert "second-hand: read in notes on the paper" in text
    found = json.loads(printed(capsys, *words, "--format", "json"))
    assert {line["method"] for line in found} == {"raysup"}
    assert {line["protocol"] for line in found} == {"raysup-seg"}
    lines = list(csv.DictReader(io.StringIO(printed(capsys, *words, "--format", "csv"))))
    assert [line["printed"] for line in lines] == [line["printed"] for line in found]
    assert all(line["second_hand"] == "True" for line in lines)
    assert all(line["source"] for line in lines)


def test_nothing_found_and_unknown_names(capsys):
    assert printed(capsys, "published", "--method", "raysup", "--dataset", "spair71k") == "none\n"
    words = ("published", "--method", "raysup", "--dataset", "spair71k", "--format")
    assert printed(capsys, *words, "json") == "[]\n"
    assert printed(capsys, *words, "csv").startswith("method,")
    for wrong, hint in (
        (("--method", "raysub"), "did you mean 'raysup'?"),
        (("--task", "segm"), "did you mean 'seg'?"),
        (("--format", "jsn"), "did you mean 'json'?"),
    ):
        assert main(["published", *wrong]) == 2
        assert hint in capsys.readouterr().err


def test_report_puts_them_beside_when_asked(tmp_path, capsys):
    names = {"protocol": "raysup-seg", "dataset": "voc2012", "backbone": S14}
    protocol = {"name": "raysup-seg", "version": 1, "image_size": [448, 448], "output_size": [448, 448]}
    made = record("bilinear", values=(81.9, 82.1), **names)
    object.__setattr__(made, "protocol", {**made.protocol, **protocol})
    (tmp_path / "records").mkdir()
    write_record(tmp_path / "records", made)
    assert "published" not in printed(capsys, "report", str(tmp_path))
    text = printed(capsys, "report", "--published", str(tmp_path))
    assert "81.70* [1]" in text
    assert "+0.30" in text
    assert "raysup, published" not in text
    text = printed(capsys, "report", "--published-rows", str(tmp_path))
    assert "| raysup, published " in text
    assert "84.64* [" in text


def test_a_protocol_goes_by_its_other_names_too(capsys, monkeypatch):
    class Named:
        name = "raysup-seg"

    monkeypatch.setattr("upbench.registry.find_protocol", {"another-seg": Named}.__getitem__)
    words = ("published", "--method", "raysup", "--protocol")
    assert printed(capsys, *words, "another-seg") == printed(capsys, *words, "raysup-seg")
