"""Executors: every result arrives, a worker's death costs one job, and nothing is left running."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upbench.errors import UpbenchError
from upbench.run.executors import Lost, find_executor

WORK = '''
import os, signal, sys, time
import torch

def double(job):
    """Two results a job; some jobs end badly."""
    yield job, "first"
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "exits":
        os._exit(3)
    if job == "raises":
        raise ValueError("no such luck")
    yield job, "second"

def where(job):
    print("noise on stdout is nobody's result", file=sys.stderr)
    yield os.getpid()

def threads(job):
    yield torch.get_num_threads()

def gpu(job):
    """Waits for the others, so that no worker does the job of two."""
    folder, others = job
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while len(os.listdir(folder)) < others:
        time.sleep(0.02)
    yield os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

def gpu_or_die(job):
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    yield os.environ["CUDA_VISIBLE_DEVICES"]

def sleeps(job):
    yield os.getpid()
    time.sleep(600)
'''

LIGHT = '''
import gc, os, signal, struct, sys, time
from multiprocessing.connection import Connection

def half_a_message():
    """What a worker has sent when something happens to it in the middle of a result."""
    (pipe,) = (o for o in gc.get_objects() if isinstance(o, Connection) and o.writable)
    os.write(pipe.fileno(), struct.pack("!i", 1000) + b"half")

def ends(job):
    """Two results a job, with an odd end between them."""
    yield job, "first"
    if job == "killed while it sends":
        half_a_message()
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if job == "stopped while it sends":
        half_a_message()
        os.kill(os.getpid(), signal.SIGSTOP)
    if job == "leaves a child":
        if os.fork():
            os._exit(3)
        time.sleep(60)
        os._exit(0)
    if job == "sys.exit":
        sys.exit(0)
    if job == "not to be sent":
        yield lambda: None
    if job == "not to be read":
        yield Unreadable()
    yield job, "second"

class Unreadable:
    def __reduce__(self):
        return int, ("not a number",)

def rests(job):
    yield "asleep"
    time.sleep(4)
    yield "awake"
'''


@pytest.fixture
def light(tmp_path, monkeypatch):
    """A module without torch that worker processes can import, too."""
    (tmp_path / "upbench_test_light.py").write_text(LIGHT)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("upbench_test_light")
    yield module
    del sys.modules["upbench_test_light"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A module that worker processes can import, too."""
    (tmp_path / "upbench_test_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("upbench_test_work")
    yield module
    del sys.modules["upbench_test_work"]


@pytest.mark.parametrize("name", ["inline", "process"])
def test_every_result_of_every_job_arrives(work, name):
    outcomes = list(find_executor(name)(work.double, ["a", "b", "c"], workers=2))
    assert sorted(outcomes) == [(job, (job, part)) for job in "abc" for part in ("first", "second")]


def test_inline_keeps_the_order(work):
    outcomes = [result for _, result in find_executor("inline")(work.double, ["b", "a"])]
    assert outcomes == [("b", "first"), ("b", "second"), ("a", "first"), ("a", "second")]


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("killed", "was killed by SIGKILL, perhaps for want of memory"),
        ("exits", "ended with exit code 3"),
        ("raises", "ValueError: no such luck"),
    ],
)
def test_a_workers_death_costs_the_rest_of_one_job(work, job, reason):
    outcomes = list(find_executor("process")(work.double, [job, "fine"], workers=1))
    assert outcomes[0] == (job, (job, "first")), "what was done before counts"
    assert isinstance(outcomes[1][1], Lost)
    assert reason in outcomes[1][1].reason
    assert outcomes[2:] == [("fine", ("fine", "first")), ("fine", ("fine", "second"))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals and forks")
@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("killed while it sends", "was killed by SIGKILL"),
        ("stopped", "gave no sign of life for 1 s (--lost-after) and was ended"),
        ("stopped while it sends", "gave no sign of life for 1 s"),
        ("leaves a child", "ended with exit code 3"),
        ("sys.exit", "SystemExit: 0"),
        ("not to be sent", "Can't pickle"),
        ("not to be read", "cannot be read: ValueError"),
    ],
)
def test_odd_ends_cost_the_rest_of_one_job(light, job, reason):
    outcomes = list(find_executor("process")(light.ends, [job, "fine"], workers=1, lost_after=1))
    assert outcomes[0] == (job, (job, "first"))
    assert isinstance(outcomes[1][1], Lost)
    assert reason in outcomes[1][1].reason
    assert outcomes[2:] == [("fine", ("fine", "first")), ("fine", ("fine", "second"))]
    assert not multiprocessing.active_children()


@pytest.mark.drill("processes")
@pytest.mark.whole
def test_a_long_job_is_not_lost(light):
    """Its worker says that it lives; nothing is said about the job."""
    outcomes = [result for _, result in find_executor("process")(light.rests, [1], 1, lost_after=2)]
    assert outcomes == ["asleep", "awake"]


def test_workers_are_other_processes_and_none_is_left(work):
    pids = {pid for _, pid in find_executor("process")(work.where, [1, 2, 3], workers=1)}
    assert len(pids) == 1, "a worker takes one job after the other"
    assert os.getpid() not in pids
    assert not multiprocessing.active_children()


def test_workers_share_the_cores_and_heed_omp_num_threads(work, monkeypatch):
    monkeypatch.setattr("upbench.run.executors.usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [n for _, n in find_executor("process")(work.threads, [1], workers=2)] == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [n for _, n in find_executor("process")(work.threads, [1], workers=2)] == [1]


@pytest.mark.parametrize(
    ("devices", "workers", "expected"),
    [(("3", "5"), 3, ["3", "3", "5"]), ((), 1, ["before"])],
)
def test_each_worker_sees_one_gpu_in_turn(work, tmp_path, monkeypatch, devices, workers, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    jobs = [(str(meeting), workers)] * workers
    seen = dict(result for _, result in find_executor("process")(work.gpu, jobs, workers, devices))
    assert len(seen) == workers
    assert sorted(seen.values()) == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "before", "this process sees what it saw"


def test_a_worker_that_replaces_a_dead_one_gets_its_gpu(work):
    outcomes = list(find_executor("process")(work.gpu_or_die, ["dies", "lives", "lives"], 1, ("7",)))
    assert [kind for _, kind in outcomes if isinstance(kind, str)] == ["7", "7"]
    assert isinstance(outcomes[0][1], Lost)


def test_leaving_early_ends_the_workers(work):
    outcomes = find_executor("process")(work.double, ["a", "b", "c", "d"], workers=2)
    next(outcomes)
    outcomes.close()
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_worker_ends_with_a_parent_that_was_killed(work, tmp_path):
    """In the middle of a job, that is: one that waits notices by its pipe."""
    boss = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import upbench_test_work as work\n"
        "from upbench.run.executors import find_executor\n"
        "for _, pid in find_executor('process')(work.sleeps, [1], workers=1): print(pid, flush=True)\n"
    )
    command = [sys.executable, "-c", boss, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be there to bury an orphan


def test_names(monkeypatch):
    with pytest.raises(UpbenchError, match="did you mean 'process'"):
        find_executor("proces")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UpbenchError, match="needs the extra 'ray'"):
        list(find_executor("ray")(print, []))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray before 2.57 leaves processes and log files
def test_ray(work, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *([path] if path else [])]))
    with ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False):
        outcomes = list(find_executor("ray")(work.double, ["a", "killed", "b"], workers=2))
    by_job = {job: [r for j, r in outcomes if j == job] for job in ("a", "killed", "b")}
    for job in ("a", "b"):
        assert by_job[job] == [(job, "first"), (job, "second")]
    assert isinstance(by_job["killed"][-1], Lost)
