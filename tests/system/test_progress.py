"""Progress: on a terminal, in a log file, in a worker."""

from __future__ import annotations

import io

import pytest

from upbench.system import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_through_unchanged(capsys):
    assert list(progress.track(iter([3, 1, 2]), "numbers")) == [3, 1, 2]
    assert capsys.readouterr().err == "", "a loop of under two seconds says nothing"


def test_plain_lines_at_intervals_with_the_time_left(capsys, monkeypatch):
    clock = iter(float(t) for t in range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for _ in progress.track(range(40), "features"):
        pass
    captured = capsys.readouterr()
    assert captured.out == "", "stdout is for results"
    lines = captured.err.splitlines()
    assert lines == ["features: 2/40, 38 s left", "features: 17/40, 23 s left", "features: 32/40, 8 s left"]


def test_steps_of_an_earlier_run_do_not_shorten_the_time_left(capsys, monkeypatch):
    clock = iter(float(t) for t in range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("training", 100, done=60) as bar:
        for _ in range(40):
            bar.advance()
    assert capsys.readouterr().err.splitlines()[0] == "training: 62/100, 38 s left"


def test_a_loop_of_unknown_length_counts(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.0)
    with progress.bar("frames") as bar:
        bar.note("loss 0.5")
        bar.advance(3)
    assert capsys.readouterr().err == "frames: 3, loss 0.5\n"


def test_nested_bars_share_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    for _ in progress.track(range(2), "outer"):
        with progress.bar("inner [1]", total=3) as inner:
            inner.advance()
            inner.note("half")
            progress.say("kept [brackets]")
    assert progress._display is None, "the display is given back"
    text = terminal.getvalue()
    assert "outer" in text
    assert "inner [1]" in text
    assert text.count("kept [brackets]") == 2


def test_an_exception_closes_its_bars(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    with pytest.raises(KeyError), progress.bar("outer"), progress.bar("inner"):
        raise KeyError
    assert progress._display is None
    assert progress._open_bars == 0


def test_workers_are_quiet(capsys, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_AFTER", 0.0)
    progress.be_quiet()
    try:
        assert list(progress.track([1, 2, 3], "numbers")) == [1, 2, 3]
        progress.say("hello")
    finally:
        progress.be_quiet(False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
