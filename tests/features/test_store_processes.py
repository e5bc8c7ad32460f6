"""Processes and threads that share a feature store, and those that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from storing import Pictures, check_all, direct, files, open_store, same_moments
from storing import own_cache as own_cache  # each test has one

from upbench.features import shards as shards_module
from upbench.features.moments import RunningMoments
from upbench.features.shards import ShardWriter

forks = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
no_warning = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(work: Callable[[], object]) -> multiprocessing.Process:
    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
        torch.set_num_threads(1)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(function: Callable, number: int) -> Callable:
    """The function, whose call of this number kills the process."""
    calls = []

    def wrapper(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == number:
            die()
        return function(*args, **kwargs)

    return wrapper


MOMENTS_OF_DEATH = {  # what is called, the number of the call, and the images that are left to compute
    "first image": (Pictures, "image", 1, 10),
    "image of the second shard": (Pictures, "image", 6, 6),
    "features are written": (ShardWriter, "add", 6, 6),
    "before the header": (ShardWriter, "finish", 2, 6),
    "before the rename": (os, "replace", 4, 6),  # after store.json, a shard and its moments
    "before the moments": (RunningMoments, "save", 2, 2),
    "while the moments are written": (os, "replace", 5, 2),
    "before the last moments": (RunningMoments, "save", 3, 0),
}


@forks
@no_warning
@pytest.mark.parametrize("moment", MOMENTS_OF_DEATH)
def test_killed(moment: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`kill -9`, then a second start: whole shards stay, the rest is computed, and nothing else is left."""
    place, name, number, left = MOMENTS_OF_DEATH[moment]

    def work() -> None:
        setattr(place, name, at_call(getattr(place, name), number))
        open_store().prepare()

    victim = in_child(work)
    victim.join(60)
    assert victim.exitcode == -signal.SIGKILL
    store = open_store(images := Pictures())
    store.prepare()
    assert images.read == list(range(10 - left, 10))
    check_all(store, Pictures())
    moments = store.moments()
    assert not [name for name in files(cache) if name.endswith(".tmp")]
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "once"))
    once = open_store()
    assert same_moments(once.moments(), moments)
    for name in ("00000.safetensors", "00002.safetensors", "moments.safetensors"):
        assert (once.folder / name).read_bytes() == (store.folder / name).read_bytes()


@forks
@no_warning
def test_three_processes_at_once(cache: Path, tmp_path: Path):
    log = tmp_path / "log"
    errors = [tmp_path / f"err{i}" for i in range(3)]
    waiting = "another process computes them; waiting"

    class Shared(Pictures):
        """The first image is read when two of the three have nothing to do but to wait."""

        def image(self, index: int) -> torch.Tensor:
            deadline = time.monotonic() + 60
            while sum(waiting in error.read_text() for error in errors if error.exists()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return super().image(index)

    def work(error: Path) -> None:
        sys.stderr = error.open("w", buffering=1)
        open_store(Shared(log=log), workers=2).prepare()
        sys.stderr.close()

    processes = [in_child(lambda error=error: work(error)) for error in errors]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(10))
    said = "".join(error.read_text() for error in errors)
    assert said.count(waiting) == 2
    assert said.count("10 images, 4.3 kB in") == 1
    assert not [name for name in files(cache) if name.endswith(".tmp")]
    check_all(open_store(), Pictures())


@forks
@no_warning
def test_the_lock_of_a_killed_process_is_free(cache: Path):
    victim = in_child(lambda: open_store(Pictures(seconds=30)).prepare())
    deadline = time.monotonic() + 60
    while not list(cache.rglob("lock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    check_all(open_store(), Pictures())


@forks
@no_warning
@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted(cache: Path, workers: int):
    """Ctrl-C ends at once, although the readers are slow."""
    child = in_child(lambda: open_store(Pictures(seconds=30), workers=workers).prepare())
    deadline = time.monotonic() + 60
    while not list(cache.rglob("lock")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    child.join(10)
    assert child.exitcode not in (None, 0)
    assert files(cache) == ["lock"]


def test_without_locks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards_module, "fcntl", None)
    check_all(open_store(), Pictures())


def test_threads_read_one_store():
    store = open_store(Pictures(20), memory=0)
    wrong = []

    def work(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, 20, 50):
            if not torch.equal(store.features(int(index)), direct(Pictures(20), int(index))):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
