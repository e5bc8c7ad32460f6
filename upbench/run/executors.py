"""Where jobs run: in this process, in worker processes, or on a Ray cluster.

An executor takes a function that turns a job into results one by one, and yields them as they come. A job
that dies with its worker (out of memory, a crash in native code, `kill -9`) ends in `Lost`; the other jobs go
on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from upbench.errors import UpbenchError, unknown
from upbench.system.environment import usable_cores

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lost:
    """The end of a job whose worker died.

    Attributes:
        reason: How it died, in words.
    """

    reason: str


Work = Callable[[Job], Iterable[Result]]
"""What is done with a job; other processes find it by its name, so it stands at the top of a module."""
Outcomes = Generator[tuple[Job, "Result | Lost"], None, None]


def inline(
    work: Work[Job, Result], jobs: Iterable[Job], workers: int = 1, devices: Sequence[str] = ()
) -> Outcomes[Job, Result]:
    """One job after the other in this process; what `work` keeps between jobs stays shared."""
    for job in jobs:
        for result in work(job):
            yield job, result


def process(
    work: Work[Job, Result], jobs: Iterable[Job], workers: int = 2, devices: Sequence[str] = ()
) -> Outcomes[Job, Result]:
    """Jobs in spawned processes, which no state of this one leaks into; one that dies is replaced.

    A job is asked for when a worker is free for it. With `devices` each worker sees one GPU, in turn.
    """
    waiting = iter(jobs)
    staff: list[_Worker[Job]] = []
    try:
        while True:
            while free := [worker for worker in staff if not worker.busy] or len(staff) < workers:
                job = next(waiting, None)
                if job is None:
                    break
                if isinstance(free, list):
                    worker = free[0]
                else:
                    threads = max(1, usable_cores() // workers)
                    worker = _Worker(work, threads, _unused(devices, [each.device for each in staff]))
                    staff.append(worker)
                worker.start(job)
            if not any(worker.busy for worker in staff):
                return
            for connection in wait([worker.pipe for worker in staff if worker.busy]):
                worker = next(worker for worker in staff if worker.pipe is connection)
                kind, value = worker.receive()
                if kind == "result":
                    yield worker.job, value
                elif kind == "raised":
                    yield worker.job, Lost(value)
                elif kind == "died":
                    staff.remove(worker)
                    yield worker.job, Lost(value)
    finally:
        for worker in staff:
            worker.end()


def ray(
    work: Work[Job, Result], jobs: Iterable[Job], workers: int = 2, devices: Sequence[str] = ()
) -> Outcomes[Job, Result]:
    """Each job as a task of a Ray cluster: the one in `RAY_ADDRESS`, else one that is started on this
    machine. Tasks ask for what is there: cores always, GPUs where the cluster has some and cells run on one.

    Raises:
        UpbenchError: Ray is not installed.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise UpbenchError("executor 'ray' needs the extra 'ray': pip install 'upbench[ray]'") from error

    started = not cluster.is_initialized()
    if started:
        cluster.init(log_to_driver=False, include_dashboard=False)
    try:
        there = cluster.cluster_resources()
        share = {
            "num_cpus": max(1, int(there.get("CPU", 1)) // workers),
            "num_gpus": min(1.0, there.get("GPU", 0) / workers) if devices else 0,
        }
        remote = cluster.remote(num_returns="streaming", max_retries=0, **share)(_generate)
        waiting = iter(jobs)
        running: dict[Any, Job] = {}
        while True:
            while len(running) < workers and (job := next(waiting, None)) is not None:
                running[remote.remote(work, job)] = job
            if not running:
                return
            ready, _ = cluster.wait(list(running), num_returns=1, fetch_local=False)
            for stream in ready:
                try:
                    yield running[stream], cluster.get(next(stream))
                except StopIteration:
                    del running[stream]
                except cluster.exceptions.RayError as error:
                    yield running.pop(stream), Lost(f"the Ray task died: {_first_line(error)}")
    finally:
        if started:
            cluster.shutdown()


_EXECUTORS = {"inline": inline, "process": process, "ray": ray}


def find_executor(name: str) -> Callable[..., Outcomes[Any, Any]]:
    """The executor of that name.

    Raises:
        UpbenchError: There is none; the nearest name is suggested.
    """
    if name not in _EXECUTORS:
        raise unknown("executor", name, _EXECUTORS)
    return _EXECUTORS[name]  # type: ignore[return-value]


class _Worker(Generic[Job]):
    """A process with so many threads that is given one job after the other.

    Attributes:
        pipe: To the process.
        job: The latest that it was given.
        device: The GPU that it sees, or None for what this process sees.
        busy: Whether it is at it.
    """

    job: Job

    def __init__(self, work: Work[Job, Any], threads: int, device: str | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.device = device
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs, threads), daemon=True)
        with _environment("CUDA_VISIBLE_DEVICES", device):
            self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.busy = False

    def start(self, job: Job) -> None:
        """Hands over a job."""
        self.job, self.busy = job, True
        with suppress(BrokenPipeError):  # it died before its first job: `receive` tells
            self.pipe.send(job)

    def receive(self) -> tuple[str, Any]:
        """What the process says: ("result", it), ("done", None), ("raised", why) or ("died", how)."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            kind, value = "died", self._death()
        self.busy = kind == "result"
        return kind, value

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        self.process.terminate()
        self.process.join(timeout=5)
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _death(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"the worker process was killed by {name}{hint}"
        return f"the worker process ended with exit code {code}"


def _unused(devices: Sequence[str], taken: Sequence[str | None]) -> str | None:
    """The device that the fewest workers have; None where there are none."""
    return min(devices, key=taken.count, default=None)


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """A variable that a process started meanwhile finds; nothing for None."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _serve(work: Work[Job, Any], pipe: Connection, threads: int) -> None:
    """What a worker process does: jobs until there are no more."""
    from upbench.system.progress import be_quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business: it ends its workers
    be_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch := sys.modules.get("torch"):  # workers that all use all cores wait for one another
        torch.set_num_threads(min(threads, torch.get_num_threads()))  # OMP_NUM_THREADS may ask for fewer
    while True:
        try:
            job = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            for result in work(job):
                pipe.send(("result", result))
            pipe.send(("done", None))
        except Exception as error:
            pipe.send(("raised", f"{type(error).__name__}: {_first_line(error)}"))


def _end_with_parent() -> None:
    """Ends this process when its parent has gone (`kill -9` leaves it no chance to end its workers)."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _generate(work: Work[Job, Result], job: Job) -> Iterator[Result]:
    from upbench.system.progress import be_quiet

    be_quiet()
    yield from work(job)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
