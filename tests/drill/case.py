"""A case of the drill: words for `upbench`, the folder that it meets, and what is promised."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from upbench.cli import main

#: The longest line that an error may be. A name that a user gave is cut, not printed in full.
LONGEST = 500
#: Seconds after which a command that should be refused counts as hanging (a FIFO that is read, a lock).
HANGS = 300

Tree = dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Exit code.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        before: The working folder's files before the command: their digests by path.
        after: The same after it.
    """

    code: int
    out: str
    err: str
    before: Tree
    after: Tree


Promise = Callable[[Outcome], None]


def nothing(folder: Path) -> None:
    """Makes no file."""


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        group: What the drill's report counts it under.
        name: Its name within the group.
        arguments: The words after `upbench`.
        promise: Raises AssertionError where what came is not what is promised.
        given: Makes what the case needs in the working folder, which is new and empty.
        whole: It is slow: only `make drill` runs it.
        fresh: It needs an interpreter of its own (encodings, a closed stdout, signals).
        environment: Variables to set, for a fresh one.
    """

    group: str
    name: str
    arguments: tuple[str, ...]
    promise: Promise
    given: Callable[[Path], None] = nothing
    whole: bool = False
    fresh: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, folder: Path) -> None:
        """Makes the folder, runs the command in it and checks the promise."""
        self.given(folder)
        before = tree(folder)
        code, out, err = self._fresh(folder) if self.fresh else self._inside(folder)
        self.promise(Outcome(code, out, err, before, tree(folder)))

    def _inside(self, folder: Path) -> tuple[int, str, str]:
        """Runs it in this process, which spares the import of torch."""
        out, err = io.StringIO(), io.StringIO()
        here = Path.cwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(self.arguments)
        except SystemExit as exit:  # argparse: --help, --version
            code = exit.code if isinstance(exit.code, int) else 1
        finally:
            os.chdir(here)
        return code, out.getvalue(), err.getvalue()

    def _fresh(self, folder: Path) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "upbench", *self.arguments],
            cwd=folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            timeout=HANGS,
            check=False,
        )
        return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def refused(*words: str, kept: bool = True) -> Promise:
    """Exit code 2 and one printable line on stderr that holds every word.

    Args:
        words: What the line must name, in any case.
        kept: No file of the working folder was made, changed or removed.
    """

    def promise(outcome: Outcome) -> None:
        assert outcome.code == 2, f"exit code {outcome.code}\n{outcome.err[-2000:]}{outcome.out[-500:]}"
        lines = outcome.err.strip("\n").split("\n")
        assert len(lines) == 1, f"{len(lines)} lines:\n{outcome.err[-2000:]}"
        line = lines[0]
        assert line.startswith("upbench: error: "), line
        assert line.isprintable(), ascii(line)
        assert len(line) <= LONGEST, f"{len(line)} characters: {line[:LONGEST]} ..."
        for word in words:
            assert word.lower() in line.lower(), f"no '{word}' in: {line}"
        if kept:
            assert outcome.after == outcome.before, changes(outcome)

    return promise


def done(*words: str, code: int = 0) -> Promise:
    """This exit code, no traceback, and every word in what was written.

    Args:
        words: What stdout and stderr together must hold, in any case.
        code: Exit code: 0, or 1 where a cell is to fail.
    """

    def promise(outcome: Outcome) -> None:
        written = outcome.out + outcome.err
        assert "Traceback (most recent call last)" not in written, written[-3000:]
        assert outcome.code == code, f"exit code {outcome.code}\n{written[-2000:]}"
        for word in words:
            assert word.lower() in written.lower(), f"no '{word}' in: {written[-2000:]}"

    return promise


def tree(folder: Path) -> Tree:
    """What lies in a folder: a digest of each file, the target of each link, the kind of all else."""
    found: Tree = {}
    for path in folder.rglob("*"):
        name = ascii(str(path.relative_to(folder)))
        if path.is_symlink():
            found[name] = f"-> {str(path.readlink())!a}"
        elif path.is_file() and os.access(path, os.R_OK):
            found[name] = sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = str(stat.S_IFMT(path.lstat().st_mode))
    return found


def changes(outcome: Outcome) -> str:
    """What the command did to its working folder, in a line."""
    before, after = outcome.before, outcome.after
    made = sorted(after.keys() - before.keys())
    removed = sorted(before.keys() - after.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    return f"made {made}, removed {removed}, changed {changed}"
