"""Where jobs run: in this process, in worker processes, or on a Ray cluster.

An executor takes a function that turns a job into results one by one, and yields them as they come. A job
that dies with its worker (out of memory, a crash in native code, `kill -9`), or whose worker gives no sign of
life for too long, ends in `Lost`; the other jobs go on.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Generic, TypeVar

from upbench.errors import UpbenchError, unknown
from upbench.system.environment import usable_cores
from upbench.system.parent import end_with_parent

LOST_AFTER = 120.0
"""Seconds without a sign of life after which a worker is given up."""

_BEATS = 8
"""Signs of life in that time."""

_LONGEST_BEAT = 5.0
_STARTING = 60.0
"""Seconds that a worker has to start, if that is longer."""

_BEAT = b""
_PATIENCE = 5.0
"""Seconds that workers have to end when they are told to."""

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
    work: Work[Job, Result],
    jobs: Iterable[Job],
    workers: int = 1,
    devices: Sequence[str] = (),
    lost_after: float = LOST_AFTER,
) -> Outcomes[Job, Result]:
    """One job after the other in this process; what `work` keeps between jobs stays shared."""
    for job in jobs:
        for result in work(job):
            yield job, result


def process(
    work: Work[Job, Result],
    jobs: Iterable[Job],
    workers: int = 2,
    devices: Sequence[str] = (),
    lost_after: float = LOST_AFTER,
) -> Outcomes[Job, Result]:
    """Jobs in spawned processes, which no state of this one leaks into; one that dies is replaced.

    A job is asked for when a worker is free for it. With `devices` each worker sees one GPU, in turn. A
    thread of each worker says now and then that it lives: one that is stopped, or lies on a machine that
    hangs, is ended after `lost_after` seconds without it, however long a job may take.
    """
    waiting = iter(jobs)
    staff: list[_Worker[Job]] = []
    heard: _Heard = queue.SimpleQueue()
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
                    device = _unused(devices, [each.device for each in staff])
                    with _interrupts_later():
                        worker = _Worker(work, threads, heard, lost_after, device)
                        staff.append(worker)
                worker.start(job)
            if not any(worker.busy for worker in staff):
                return
            worker, kind, value = _next(heard, staff, lost_after)
            if kind == "result":
                yield worker.job, value
                continue
            worker.busy = False
            if kind == "raised":
                yield worker.job, Lost(value)
            elif kind == "died":
                staff.remove(worker)
                _dismiss([worker])
                yield worker.job, Lost(value)
    finally:
        _dismiss(staff)


def ray(
    work: Work[Job, Result],
    jobs: Iterable[Job],
    workers: int = 2,
    devices: Sequence[str] = (),
    lost_after: float = LOST_AFTER,
) -> Outcomes[Job, Result]:
    """Each job as a task of a Ray cluster: the one in `RAY_ADDRESS`, else one that is started on this
    machine. Tasks ask for what is there: cores always, GPUs where the cluster has some and cells run on one.
    Which of them are lost Ray finds out by itself; `lost_after` is not looked at.

    Raises:
        UpbenchError: Ray is not installed.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise UpbenchError("executor 'ray' needs the extra 'ray': pip install 'upbench[ray]'") from error

    started = not cluster.is_initialized()
    if started:
        with _own_signals():
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

    Nothing here waits for it: a thread listens to it, and a thread hands it its job, so that one that is
    stopped in the middle of a message holds up nobody.

    Attributes:
        job: The latest that it was given.
        device: The GPU that it sees, or None for what this process sees.
        busy: Whether it is at it.
        silent: Seconds since it was last heard of, as far as it is busy.
        answers: Whether it was heard of at all.
    """

    job: Job

    def __init__(
        self, work: Work[Job, Any], threads: int, heard: _Heard, lost_after: float, device: str | None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.device, self.busy, self.silent, self.answers = device, False, 0.0, False
        self._pipe, theirs = context.Pipe()
        beat = min(_LONGEST_BEAT, lost_after / _BEATS)
        arguments = (pickle.dumps(work), theirs, threads, beat)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with _environment("CUDA_VISIBLE_DEVICES", device):
            self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self._listener = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._listener.start()

    def start(self, job: Job) -> None:
        """Hands over a job."""
        self.job, self.busy, self.silent = job, True, 0.0
        threading.Thread(target=self._send, args=(pickle.dumps(job),), daemon=True).start()

    def death(self) -> str:
        """How the process ended, in words."""
        self.process.join(_PATIENCE)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"the worker process was killed by {name}{hint}"
        return f"the worker process ended with exit code {code}"

    def hang_up(self) -> None:
        """Closes the pipe, after its process has ended."""
        if sys.platform != "win32":  # a process that the worker has started may still have the other end
            with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)
        self._listener.join(_PATIENCE)
        self._pipe.close()

    def _send(self, message: bytes) -> None:
        with suppress(OSError):  # it died before its job: the listener tells
            self._pipe.send_bytes(message)

    def _listen(self, heard: _Heard) -> None:
        """Passes on what the process says, and None when it has ended."""
        while True:
            try:
                message = self._pipe.recv_bytes()
            except (EOFError, OSError):  # OSError: in the middle of a message
                heard.put((self, None))
                return
            heard.put((self, message))


_Heard = queue.SimpleQueue[tuple[_Worker[Any], "bytes | None"]]


def _next(heard: _Heard, staff: Sequence[_Worker[Any]], lost_after: float) -> tuple[_Worker[Any], str, Any]:
    """The next that a worker says: ("result", it), ("done", None), ("raised", why), or ("died", how).

    Silence is counted in steps: while this process is stopped itself (Ctrl-Z), no worker is lost.
    """
    step = min(1.0, lost_after / _BEATS)
    while True:
        before = time.monotonic()
        worker: _Worker[Any] | None = None
        message: bytes | None = None
        with suppress(queue.Empty):
            worker, message = heard.get(timeout=step)
        passed = min(time.monotonic() - before, 2 * step)
        for each in staff:
            each.silent += passed * each.busy
        if worker is not None and worker not in staff:
            continue  # it was given up: what it said before it ended comes too late
        if worker is not None:
            worker.silent, worker.answers = 0.0, True
        if worker is not None and message:
            try:
                kind, value = pickle.loads(message)
            except Exception as error:  # whatever a class makes of it
                worker.process.kill()
                kind, value = "died", f"a result of the worker process cannot be read: {_told(error)}"
            return worker, kind, value
        if worker is not None and message is None:
            return worker, "died", worker.death()
        for each in staff:
            if each.busy and each.silent > (lost_after if each.answers else max(lost_after, _STARTING)):
                each.process.kill()
                silence = f"no sign of life for {lost_after:g} s (--lost-after)"
                return each, "died", f"the worker process gave {silence} and was ended"
            if each.busy and each.silent > 2 * step and each.process.exitcode is not None:
                return each, "died", each.death()  # somebody else holds its end of the pipe


def _dismiss(staff: Sequence[_Worker[Any]]) -> None:
    """Ends processes, whatever they are at."""
    for worker in staff:
        worker.process.terminate()
    patience = time.monotonic() + _PATIENCE
    for worker in staff:
        worker.process.join(max(0.0, patience - time.monotonic()))
        worker.process.kill()
    for worker in staff:
        worker.process.join()
        worker.hang_up()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C and SIGTERM come after the block; a process that is started in it does not see Ctrl-C, which is
    this process's business, before it has said that it ignores it."""
    caught: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        resource_tracker.ensure_running()  # else it starts in the block, and lets go of the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handlers = [signal.getsignal(n) for n in numbers]
    if main:
        for number in numbers:
            signal.signal(number, lambda *event: caught.append(event))
    try:
        yield
    finally:
        if main:
            _restore(numbers, handlers)
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for event in caught[:1]:
            handler = handlers[[int(number) for number in numbers].index(event[0])]
            if callable(handler):
                handler(*event)


@contextmanager
def _own_signals() -> Iterator[None]:
    """A block after which signals do what they did before: Ray has SIGTERM end the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            _restore(numbers, handlers)


def _restore(numbers: Sequence[int], handlers: Sequence[Any]) -> None:
    for number, handler in zip(numbers, handlers, strict=True):
        if handler is not None:  # one that Python did not install
            signal.signal(number, handler)


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


def _serve(work: bytes, pipe: Connection, threads: int, beat: float) -> None:
    """What a worker process does: jobs until there are no more."""
    from upbench.system.progress import be_quiet

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business: it ends its workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    end_with_parent(None if parent is None else lambda: wait([parent.sentinel]))
    be_quiet()
    turn = threading.Lock()

    def say(message: bytes) -> None:
        try:
            with turn:
                pipe.send_bytes(message)
        except OSError:  # the parent is gone
            os._exit(1)

    def live() -> None:
        while True:
            say(_BEAT)
            time.sleep(beat)

    threading.Thread(target=live, name="upbench-beat", daemon=True).start()
    do: Work[Any, Any] | None = None
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            do = do or pickle.loads(work)  # only now, as it may take a while: modules are imported
            job = pickle.loads(message)
            if torch := sys.modules.get("torch"):  # workers that all use all cores wait for one another
                torch.set_num_threads(
                    min(threads, torch.get_num_threads())
                )  # OMP_NUM_THREADS may ask for fewer
            for result in do(job):
                say(pickle.dumps(("result", result)))
            say(pickle.dumps(("done", None)))
        except BaseException as error:  # `sys.exit` of a plugin, too
            say(pickle.dumps(("raised", _told(error))))


def _generate(work: Work[Job, Result], job: Job) -> Iterator[Result]:
    from upbench.system.progress import be_quiet

    be_quiet()
    yield from work(job)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
