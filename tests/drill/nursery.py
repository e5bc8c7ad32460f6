"""Runs of `upbench` in the toy world that begin at once: forked from a process that has imported all.

A drill that kills a run at twenty moments would else spend its time on importing torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLUGIN = Path(__file__).parents[1] / "toy_plugin.py"

_PROGRAM = """
import json, os, signal, sys, traceback
import torch
torch.set_num_threads(1)
from upbench.registry import load_plugin_file
load_plugin_file(sys.argv[1])
import upbench.results.report, upbench.run.loop, upbench.run.plan, upbench.run.worker
from upbench.cli.dispatch import main

for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        _, status = os.waitpid(asked["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    os.environ.update(asked["environ"])
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = main(asked["words"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


class Run:
    """A run of the command line.

    Attributes:
        pid: Its process, which leads a group of its own.
        log: File of all that it says.
    """

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery, self.pid, self.log = nursery, pid, log

    def wait(self) -> int:
        """Its exit code, minus the signal's number where one killed it."""
        return self._nursery.ask(wait=self.pid)

    def kill(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)


class Nursery:
    """What runs are forked from."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **asked: Any) -> int:
        """One line there, one number back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, words: list[str], log: Path, **environ: str) -> Run:
        """A run of `upbench WORDS`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        return Run(self, self.ask(words=words, log=str(log), environ=environ), log)


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery, for as long as the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(PLUGIN)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()


def words(out: Path, methods: str, *more: str) -> list[str]:
    """A small run in the toy world."""
    text = (
        f"run --methods {methods} --tasks seg,depth --backbones tiny --datasets toy --protocol tiny --seeds 2"
    )
    return [*text.split(), "--out", str(out), "--device", "cpu", "--plugin", str(PLUGIN), *more]


def children(pid: int) -> list[int]:
    """Processes that one has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except (OSError, ValueError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def workers_of(pid: int) -> list[int]:
    """Worker processes of a run."""
    return [child for child in children(pid) if "spawn_main" in _command(child)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def all_gone(pids: list[int]) -> bool:
    """Whether processes end, given the time that a busy machine needs."""
    patience = time.monotonic() + 30
    while time.monotonic() < patience:
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
