"""`upbench report`, on records as runs leave them."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest
from recording import record

from upbench.cli.dispatch import main
from upbench.results.cell import MethodSpec
from upbench.results.records import write_record


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "records"
    folder.mkdir(parents=True)
    for each in (
        record("bilinear", values=(40.0, 42.0)),
        record("raysup", spec=MethodSpec("raysup", label="../../.5 ablation 🙂")),
        record("jbu", status="skipped", reason="too large"),
    ):
        write_record(folder, each)
    return folder.parent


def refused(capsys, *words: str) -> str:
    assert main(["report", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_rows_as_the_user_called_them(run, capsys):
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("### vit · rooms/val · quick-v1\n")
    assert "| ../../.5 ablation 🙂 " in text
    assert "[1] Jbu, seg: too large" in text


def test_formats_metrics_and_files(run, capsys, tmp_path):
    assert main(["report", str(run), "--format", "csv", "--metrics", "all"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["method"] for row in rows} == {"Bilinear", "../../.5 ablation 🙂", "Jbu"}
    assert "seg/accuracy_std" in rows[0]
    file = tmp_path / "table.md"
    assert main(["report", str(run), "--out", str(file)]) == 0
    assert capsys.readouterr().out == ""
    assert file.read_text(encoding="utf-8").startswith("### vit")
    assert "cannot write" in refused(capsys, str(run), "--out", str(tmp_path / "no" / "table.md"))


@pytest.mark.parametrize("against", ["bilinear", "Bilinear"])
def test_against_a_row_or_a_method(run, capsys, against):
    assert main(["report", str(run), "--against", against]) == 0
    assert "+10.00 [+10.00, +10.00]" in capsys.readouterr().out


def test_words_that_mean_nothing(run, capsys, tmp_path):
    place = str(run)
    assert "did you mean 'bilinear'?" in refused(capsys, place, "--against", "bilinaer")
    assert "did you mean 'csv'?" in refused(capsys, place, "--format", "cvs")
    assert "unknown choice for --metrics 'most'" in refused(capsys, place, "--metrics", "most")
    assert "does not exist" in refused(capsys, str(tmp_path / "nowhere"))


def test_a_damaged_record_is_one_line(run, capsys):
    bad = run / "records" / "bad.json"
    bad.write_text('{"schema": 2, "cell": []}')
    assert f"damaged record {bad}: " in refused(capsys, str(run))


def test_no_torch_and_no_pandas(run):
    code = (
        "import sys; from upbench.cli.dispatch import main; assert main(['report', sys.argv[1]]) == 0;"
        "assert not {'torch', 'pandas'} & set(sys.modules), 'a table is made of records'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| Bilinear" in done.stdout
