"""What becomes of a run whose processes are killed, stopped or interrupted, and of the processes of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drill.nursery import all_gone, children, is_alive, nursery, words, workers_of
from upbench.cli.dispatch import main
from upbench.errors import UpbenchError
from upbench.run.config import RunConfig
from upbench.run.loop import _Run, run

PLUGIN = Path(__file__).with_name("bad_plugin.py")

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals"),
    pytest.mark.drill("processes"),
]


@pytest.mark.whole
def test_a_cell_whose_worker_is_stopped_is_tried_once_more(toy, costless, tmp_path, monkeypatch):
    """One stops each time, one the first time only; the other tasks of both are not lost with them."""
    monkeypatch.setenv("DRILL_MARK", str(tmp_path / "mark"))
    methods = [{"name": "stops_process", "how": how} for how in ("always", "once")]
    plugins = [str(toy.PLUGIN), str(PLUGIN)]
    values = {"executor": "process", "workers": 1, "lost_after": 5, "tasks": ["seg", "toy_noted"]}
    records = run(toy.config(tmp_path / "run", methods, plugins=plugins, **values))
    found = [(r.cell.method.options["how"], r.cell.task, r.status) for r in records]
    assert found == [
        ("always", "seg", "failed"),
        ("always", "toy_noted", "failed"),
        ("once", "seg", "ok"),
        ("once", "toy_noted", "ok"),
    ]
    assert records[0].reason.startswith("tried twice: the worker process gave no sign of life for 5 s")


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", True, None])
def test_the_time_after_which_a_worker_is_lost(value):
    with pytest.raises(UpbenchError, match="lost_after in seconds must be"):
        RunConfig(lost_after=value)


@pytest.fixture
def costless(monkeypatch):
    """Runs without a worker that measures costs."""
    costs = lambda self, pending: {planned.cell.key: {} for planned in pending}  # noqa: E731
    monkeypatch.setattr(_Run, "_measured", costs)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.whole
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_workers_start_print_no_traceback(tmp_path, number, code):
    """Ctrl-C goes to the whole group, as a terminal sends it."""
    with nursery() as runs:
        for i in range(8):
            folder = tmp_path / str(i)
            environ = {"UPBENCH_CACHE": str(folder / "cache")}
            more = ("--executor", "process")
            started = runs.start(words(folder / "run", "toy_smooth", *more), folder / "log", **environ)
            while not workers_of(started.pid):
                assert is_alive(started.pid), started.log.read_text()
                time.sleep(0.01)
            time.sleep(0.2 * i)
            if number == signal.SIGINT:
                os.killpg(started.pid, number)
            else:
                started.kill(number)
            assert started.wait() in (code, 0), started.log.read_text()
            log = started.log.read_text()
            assert "Traceback" not in log, log
            assert "stopped: " in log or i > 3, log


class Ray:
    """What is asked of Ray, and its habit of ending the process itself on SIGTERM."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self, number: int) -> None:
        self.number, self.ended = number, False

    def is_initialized(self):
        return False

    def init(self, **_):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

    def cluster_resources(self):
        return {"CPU": 2}

    def remote(self, **_):
        class Task:
            def __init__(self, function):
                """Args: function: what it does."""

            def remote(self, *_):
                return "stream"

        return Task

    def wait(self, running, **_):
        os.kill(os.getpid(), self.number)
        time.sleep(5)
        raise AssertionError("nobody was interrupted")

    def shutdown(self):
        self.ended = True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ray_is_stopped_as_other_executors_are(toy, costless, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(signal.SIGTERM)
    ray = Ray(number)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert main(toy.arguments(tmp_path, "toy_smooth", "--executor", "ray")) == 128 + number
    assert "stopped: 0 of 1 cells are kept" in capsys.readouterr().err
    assert ray.ended
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("when", ["starts", "works"])
def test_workers_end_with_a_run_that_is_killed(tmp_path, when):
    """While they start, too, and while native code holds Python's lock."""
    (tmp_path / "upbench_drill_work.py").write_text(
        "import ctypes, os, time\n" + ("time.sleep(60)\n" if when == "starts" else "") + "def work(job):\n"
        "    yield os.getpid()\n"
        "    ctypes.PyDLL(None).sleep(60)\n"  # PyDLL keeps the lock
    )
    boss = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib.machinery, pickle, types\n"
        "from upbench.run.executors import find_executor\n"
        "class Work:\n"
        "    def __reduce__(self): return getattr, (Module(), 'work')\n"
        "    def __call__(self, job): pass\n"
        "class Module:\n"
        "    def __reduce__(self): return __import__, ('upbench_drill_work',)\n"
        "for _ in find_executor('process')(Work(), [1], workers=1): print('works', flush=True)\n"
    )
    command = [sys.executable, "-c", boss, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        if when == "works":
            assert parent.stdout is not None
            assert parent.stdout.readline() == "works\n"
        while not workers_of(parent.pid):
            time.sleep(0.02)
        workers = children(parent.pid)
        time.sleep(0.5)
        parent.kill()
    assert all_gone(workers)
