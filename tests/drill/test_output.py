"""What is printed: whatever the terminal is, whatever is in a name, and where nothing can be printed."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from recording import record
from registries import restored
from rich.console import Console

from upbench.cli.dispatch import main
from upbench.results.cell import MethodSpec
from upbench.results.records import load_records, write_record
from upbench.results.report import build_tables
from upbench.results.report.terminal import draw
from upbench.system import progress

pytestmark = pytest.mark.drill("output")

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J"
UPBENCH = [sys.executable, "-m", "upbench"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose rows have names beyond ASCII."""
    place = tmp_path / "run" / "records"
    place.mkdir(parents=True)
    for each in (
        record("bilinear", values=(40.0, 42.0)),
        record("raysup", spec=MethodSpec("raysup", label="\U0001f642 Δ [red]x[/red] [/]")),
        record("jbu", status="skipped", reason="größer als “alles”"),
    ):
        write_record(place, each)
    return place.parent


def shell(script: str, *words: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    """`upbench WORDS` under a shell's redirections."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {script}', "sh", *UPBENCH, *words],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )


def one_line(stderr: bytes) -> str:
    text = stderr.decode()
    assert text.startswith("upbench: error: "), text
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "latin-1:strict", "cp437"])
def test_any_encoding_takes_any_table(folder, encoding):
    done = shell("", "report", str(folder), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding.partition(":")[0])
    assert "[red]x[/red] [/]" in text.replace("\\[", "[").replace("\\]", "]")  # as Markdown says it
    assert ("\U0001f642" if encoding == "utf-8" else "\\U0001f642") in text


def test_any_encoding_takes_any_error():
    done = shell("", "report", "größer\U0001f642", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert "gr\\xf6\\xdfer\\U0001f642" in one_line(done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "words",
    [("report", "RUN"), ("report", "RUN", "--format", "csv"), ("--help",), ("--version",), ("run", "--help")],
)
@pytest.mark.parametrize(("script", "why"), [("> /dev/full", "no space is left"), (">&-", "it is closed")])
def test_a_result_that_cannot_be_printed_is_no_success(folder, words, script, why):
    done = shell(script, *(str(folder) if word == "RUN" else word for word in words))
    assert done.returncode == 2
    assert f"cannot write to stdout: {why}" in one_line(done.stderr)


@pytest.mark.parametrize("script", ["2> /dev/full", "2>&-"])
def test_stderr_that_cannot_be_written_changes_nothing(folder, script):
    if "full" in script and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    done = shell(script, "report", str(folder / "no"))
    assert (done.returncode, done.stdout) == (2, b"")
    done = shell(script, "report", str(folder))
    assert done.returncode == 0
    assert b"Bilinear" in done.stdout


@pytest.mark.whole
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_run_whose_table_cannot_be_printed_keeps_its_records(toy, tmp_path):
    with open("/dev/full", "w") as full:
        words = toy.arguments(tmp_path / "run")
        driver = [sys.executable, "-c", toy.DRIVER, str(toy.PLUGIN), *words]
        done = subprocess.run(driver, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert b"cannot write to stdout" in done.stderr.splitlines()[-1]
    assert b"Traceback" not in done.stderr
    assert [each.status for each in load_records(tmp_path / "run")] == ["ok"]


def test_a_table_that_cannot_be_written_leaves_no_file(folder, tmp_path, capsys):
    (tmp_path / "table.md").mkdir()
    assert main(["report", str(folder), "--out", str(tmp_path / "table.md")]) == 2
    assert "it is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "table.md"]


def on_a_terminal(words: list[str]) -> tuple[int, str]:
    """Exit code and all that a terminal got."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [*UPBENCH, *words],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    ) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(leader)
    return process.returncode, seen.decode()


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """Records that somebody else wrote: their labels and reasons would take over a terminal."""
    place = tmp_path / "evil" / "records"
    place.mkdir(parents=True)
    write_record(place, record("bilinear", spec=MethodSpec("bilinear", label=f"a{EVIL}")))
    write_record(place, record("jbu", status="failed", reason=f"b{EVIL}", values=()))
    return place.parent


@pytest.mark.parametrize("format", ["md", "csv"])
def test_no_escape_of_a_record_reaches_a_terminal(evil, format):
    code, seen = on_a_terminal(["report", str(evil), "--format", format])
    assert code in (0, 2), seen
    assert "Traceback" not in seen
    assert "\x1b]0" not in seen
    assert "\x1b[31m" not in seen
    assert "\x9b" not in seen
    assert "\x07" not in seen


def test_no_escape_of_an_argument_reaches_a_terminal():
    code, seen = on_a_terminal(["report", f"no{EVIL}"])
    assert code == 2
    assert "\x1b" not in seen
    assert "\\x1b]0;owned\\x07" in seen


def test_brackets_are_no_markup_on_a_terminal(folder):
    out = io.StringIO()
    tables = build_tables(load_records(folder))
    draw(tables, Console(file=out, force_terminal=True, width=200, no_color=True))
    assert "[red]x[/red] [/]" in out.getvalue()


def test_brackets_in_headings(tmp_path):
    out = io.StringIO()
    spec = MethodSpec("bilinear", label="[blink]x")
    tables = build_tables([record("bilinear", spec=spec, reason="")])
    titled = [table.__class__(**{**vars(table), "title": "[/] [bold]t"}) for table in tables]
    draw(titled, Console(file=out, force_terminal=True, width=200, no_color=True))
    assert "[/] [bold]t" in out.getvalue()
    assert "[blink]x" in out.getvalue()


PLUGIN = """
from upbench import Upsampler

class Painted(Upsampler):
    '''\x1b[31mred\x9b'''
    name = "painted"
    title = paper = license = "\\x1b]0;owned\\x07\\x9b\\u202e"

    def forward(self, image, features, output_size):
        return features
"""


@pytest.mark.parametrize("words", [("list", "methods"), ("describe", "method", "painted")])
def test_listings_hold_no_escapes(tmp_path, capsys, words):
    (tmp_path / "painted.py").write_text(PLUGIN)
    for more in ([], ["--json"]):
        with restored():
            assert main([*words, "--plugin", str(tmp_path / "painted.py"), *more]) == 0
        text = capsys.readouterr().out
        assert "owned" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    found = json.loads(text)
    found = found if isinstance(found, dict) else next(row for row in found if row["name"] == "painted")
    assert found["license"] == "\x1b]0;owned\x07\x9b\u202e", "JSON says what there is"


def test_progress_holds_no_escapes(capsys):
    progress.say(f"cell {EVIL}\nnext")
    with progress.bar(f"train {EVIL}", total=2) as bar:
        bar.note(EVIL)
    text = capsys.readouterr().err
    assert text == "cell \\x1b]0;owned\\x07\\x1b[31m\\x9b2J\nnext\n"
    assert bar.description == "train \\x1b]0;owned\\x07\\x1b[31m\\x9b2J"


def test_progress_that_cannot_be_written_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    progress.say("a line")


def test_the_traceback_is_there_for_who_asks(capsys, monkeypatch):
    monkeypatch.setenv("UPBENCH_TRACEBACK", "1")
    assert main(["run", "--seeds", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("upbench: error: seeds must be")


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error", "a\x1b"),
        MemoryError(),
        RecursionError("deep"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    ],
)
def test_what_no_place_foresaw_is_one_line(capsys, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr("upbench.results.records.load_records", fail)
    assert main(["report"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("upbench: error: cannot go on")
    assert line.count("\n") == 1
    assert "UPBENCH_TRACEBACK=1" in line
    assert "\x1b" not in line
