"""Runs in one folder share its cells: each is computed by one of them, none is lost with a run that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from upbench.errors import UpbenchError
from upbench.results.records import load_records
from upbench.run.claims import Claims
from upbench.run.loop import run

pytest.importorskip("fcntl", reason="this system has no locks on files")


def test_two_runs_at_once_compute_each_cell_once(toy, tmp_path):
    out, notes, meeting = tmp_path / "run", tmp_path / "notes", tmp_path / "meeting"
    meeting.mkdir()
    environ = {"TOY_NOTES": str(notes), "TOY_MEETING": str(meeting), "TOY_HEALED": "1"}
    methods = ("toy_smooth", "toy_posed", "toy_trained:none", "toy_fails")
    words = toy.arguments(out, ",".join(methods), "--tasks", "toy_noted")
    both = [toy.process(words, **environ) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in both]
    for (table, log), code in ends:
        assert code == 0, log
        assert "[4/4]" in log
        for row in ("Smooth", "toy_posed", "toy_trained:none", "toy_fails"):
            assert f"| {row} " in table, "all records, those of the other run included"
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert Counter(method for _, method in lines) == dict.fromkeys(
        ("toy_smooth", "toy_posed", "toy_trained", "toy_fails"), 1
    )
    assert len({pid for pid, _ in lines}) == 2, "they shared the work"
    assert len(load_records(out)) == 4
    assert {path.name for path in out.iterdir()} == {"records", "cost", "data"}, "no lock is left"


def test_a_run_that_is_killed_frees_its_cells(toy, tmp_path):
    out, mark = tmp_path / "run", tmp_path / "mark"
    first = toy.process(toy.arguments(out, "toy_stops"), TOY_MARK=str(mark))
    while not mark.exists():
        assert first.poll() is None, first.communicate()
    second = toy.process(toy.arguments(out, "toy_stops,toy_smooth"), TOY_HEALED="1")
    assert second.stderr is not None
    said = []
    for line in second.stderr:
        said.append(line)
        if "waiting for 1 cells that another run in" in line:
            break
    else:
        raise AssertionError("".join(said))
    assert any("[1/2] toy_smooth" in line for line in said), "what nobody has comes first"
    assert [r.cell.method.name for r in load_records(out)] == ["toy_smooth"]
    first.kill()
    first.communicate()
    _, rest = second.communicate()
    assert second.returncode == 0, rest
    assert "[2/2] toy_stops" in rest
    assert {r.cell.method.name: r.status for r in load_records(out)} == {
        "toy_stops": "ok",
        "toy_smooth": "ok",
    }
    assert {path.name for path in out.iterdir()} == {"records", "cost", "data"}, "no lock is left"


def test_what_another_run_finished_or_failed_is_not_done_again(toy, tmp_path, monkeypatch):
    """In the time between this run's plan and its claim."""
    out = tmp_path / "run"
    config = toy.config(out, "toy_fails,toy_smooth", tasks=["toy_noted"])
    take, ran = Claims.take, []

    def slow(self, key):
        if not ran:
            ran.append(True)
            monkeypatch.setenv("TOY_NOTES", str(tmp_path / "notes"))
            ran.append(run(config))
            monkeypatch.delenv("TOY_NOTES")
        return take(self, key)

    monkeypatch.setattr(Claims, "take", slow)
    records = run(config)
    assert [r.status for r in records] == ["failed", "ok"]
    assert [r.started for r in records] == [r.started for r in ran[1]]


def test_a_claim_is_one_runs(tmp_path):
    one, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert one.take("a")
    assert one.take("a"), "its own is its own"
    assert not other.take("a")
    assert other.take("b")
    one.drop("a")
    assert other.take("a")
    one.close()
    assert not one.take("b"), "others' claims do not end with it"
    other.close()
    one.close()
    assert not (tmp_path / "claims").exists()


def test_a_claim_ends_with_its_process(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from upbench.run.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); print(claims.take('a'), flush=True); time.sleep(600)"
    )
    folder = tmp_path / "claims"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        claims = Claims(folder)
        assert not claims.take("a")
        holder.kill()
    assert (folder / "a.lock").exists(), "a file without a lock, which is nobody's"
    assert claims.take("a")
    claims.close()
    assert not folder.exists()


def test_a_folder_that_vanishes_in_between_is_made_again(tmp_path, monkeypatch):
    """As when another run was through and took it away."""
    claims, opened = Claims(tmp_path / "claims"), []

    def gone(path, *arguments):
        if not opened:
            opened.append(path)
            claims.folder.rmdir()
        return original(path, *arguments)

    original = os.open
    monkeypatch.setattr("upbench.run.claims.os.open", gone)
    assert claims.take("a")
    assert opened
    claims.close()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("in the way")
    with pytest.raises(UpbenchError, match=r"cannot write .*a\.lock"):
        Claims(tmp_path / "claims").take("a")
