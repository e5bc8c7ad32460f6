"""`kill -9` at twenty moments, of a run and of its workers: nothing is half-written, nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drill.nursery import Nursery, Run, all_gone, nursery, words, workers_of
from upbench.results.records import Record, load_records

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
    pytest.mark.drill("kill -9"),
    pytest.mark.whole,
]

METHODS = "toy_smooth,toy_posed,toy_trained:none"
MOMENTS = 20
WORKERS = ("--executor", "process", "--workers", "2")


@pytest.fixture(scope="module")
def runs() -> Iterator[Nursery]:
    with nursery() as found:
        yield found


def start(runs: Nursery, folder: Path, *more: str) -> Run:
    return runs.start(
        words(folder / "run", METHODS, *more), folder / "log", UPBENCH_CACHE=str(folder / "cache")
    )


def finished(runs: Nursery, folder: Path, *more: str) -> list[Record]:
    """The records of a run that nobody disturbs."""
    run = start(runs, folder, *more)
    assert run.wait() == 0, run.log.read_text()
    return whole(folder)


def whole(folder: Path) -> list[Record]:
    """The records of a run's folder, after a look at whether all that is in it is whole."""
    out = folder / "run"
    for path in [*out.glob("cost/*.json"), *out.glob("data/*.json")]:
        json.loads(path.read_text())
    return load_records(out) if list(out.glob("records/*.json")) else []


def numbers(records: list[Record]) -> dict[str, object]:
    return {record.cell.key: (record.status, record.metrics, record.per_image) for record in records}


def check_after_a_kill(runs: Nursery, folder: Path, expected: dict[str, object]) -> None:
    """What is there is right, and the same run again completes it."""
    kept = whole(folder)
    for key, value in numbers(kept).items():
        assert value == expected[key], "what was finished is right"
    records = finished(runs, folder)
    assert numbers(records) == expected
    started = {record.cell.key: record.started for record in records}
    assert all(started[record.cell.key] == record.started for record in kept), "what was finished is kept"
    left = [path for path in folder.rglob("*") if path.suffix in (".tmp", ".lock")]
    assert not left, "nothing half-written is left"


def moments(count: int, total: float) -> list[float]:
    return [(i + 0.5) / count * total for i in range(count)]


def measured(runs: Nursery, folder: Path, *more: str) -> tuple[dict[str, object], float]:
    begin = time.monotonic()
    records = finished(runs, folder, *more)
    assert len(records) == 6
    return numbers(records), time.monotonic() - begin


def test_a_run_in_one_process(runs, tmp_path):
    expected, total = measured(runs, tmp_path / "reference")
    for i, moment in enumerate(moments(MOMENTS, total)):
        folder = tmp_path / str(i)
        run = start(runs, folder)
        time.sleep(moment)
        run.kill(signal.SIGKILL)
        run.wait()
        check_after_a_kill(runs, folder, expected)


def test_a_run_with_workers_and_its_workers(runs, tmp_path):
    """Every second time a worker is killed instead: the run goes on, and the worker's cell is tried again."""
    expected, _ = measured(runs, tmp_path / "reference")
    shutil.copytree(tmp_path / "reference" / "run" / "cost", tmp_path / "again" / "run" / "cost")
    same, total = measured(runs, tmp_path / "again", *WORKERS)
    assert same == expected
    killed = 0
    for i, moment in enumerate(moments(MOMENTS, total)):
        folder = tmp_path / str(i)
        # What costs a worker of its own is there before: starting it would take most of the time.
        shutil.copytree(tmp_path / "reference" / "run" / "cost", folder / "run" / "cost")
        run = start(runs, folder, *WORKERS[:-1], str(2 - i % 2))
        time.sleep(moment)
        workers = workers_of(run.pid)
        if i % 2:
            for pid in workers[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            assert run.wait() == 0, run.log.read_text()
            assert numbers(whole(folder)) == expected, run.log.read_text()
        else:
            run.kill(signal.SIGKILL)
            run.wait()
            assert all_gone(workers), "workers end with their run"
            check_after_a_kill(runs, folder, expected)
        assert "Traceback" not in run.log.read_text()
    assert killed, "no worker was ever there: the drill is no drill"
