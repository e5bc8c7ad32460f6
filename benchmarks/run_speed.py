"""`upbench run` of two checkouts side by side: the matrix of `make demo`, and five seeds beside five runs.

    python benchmarks/run_speed.py --old OLD --new NEW [--repeats 3] [--work DIR] [--out FILE.json]

A checkout is a folder with an interpreter in `.venv/bin/python` that has its upbench installed. Each keeps
features and costs in a cache of its own, filled by a run before the clock starts; what is timed begins with
an empty folder of records. Cases:

    matrix   all methods on all tasks, three seeds: one command
    seeds    all methods on `--seeds-task` with five seeds: one command
    single   the same with one seed; five such runs are what `seeds` is compared with

Every repeat runs each case in both checkouts, one after the other, the older one first in every second
repeat, so that whatever else the machine does meets both. Ratios are taken within a repeat: the table has
their median, with the smallest and the largest. CPU seconds are those of the process and its children on all
cores. The second table has the seconds of each cell as its record states them (medians over the repeats),
with the task's main metric on the first split, to see that both did the same work; "beside the cells" is the
rest of the command: starting, planning, looking at the data, the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CASES = ("matrix", "seeds", "single")
SIDES = ("old", "new")
SEEDS = 5


def main() -> int:
    """Measures, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--old", type=Path, required=True, metavar="DIR", help="a checkout")
    add("--new", type=Path, required=True, metavar="DIR", help="another one, or the same")
    add("--methods", default="bilinear,raysup,anyup")
    add("--tasks", default="seg,depth", help="of the matrix")
    add("--seeds", type=int, default=3, help="of the matrix")
    add("--seeds-task", default="seg", metavar="NAME", help="of the cases 'seeds' and 'single'")
    add("--preset", default="quick", help="name of the protocol")
    add("--limit", type=int, help="images of every split, for a trial")
    add("--probe", action="append", default=[], metavar="KEY=VALUE", help="for a trial")
    add("--cases", default=",".join(CASES), help="which of them")
    add("--repeats", type=int, default=3)
    add("--work", type=Path, default=Path("runs/run_speed"), metavar="DIR", help="caches and records")
    add("--out", type=Path, metavar="FILE", help="JSON file; written after every repeat")
    arguments = parser.parse_args()
    for wrong in set(arguments.cases.split(",")) - set(CASES):
        parser.error(f"unknown case '{wrong}'; known: {', '.join(CASES)}")
    sides = {
        side: Side(side, getattr(arguments, side).resolve(), arguments.work.resolve() / side)
        for side in SIDES
    }
    for side in sides.values():
        if not side.python.is_file():
            parser.error(f"no interpreter in {side.python}")
    try:
        runs = list(measure(arguments, sides))
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)}\n{error.stderr[-2000:]}", file=sys.stderr)
        return 2
    print("\n".join([*summary(runs), "", *cells(runs)]))
    return 0


@dataclass(frozen=True)
class Side:
    """A checkout.

    Attributes:
        name: "old" or "new".
        checkout: Its folder.
        work: Folder of its cache and its records.
    """

    name: str
    checkout: Path
    work: Path

    @property
    def python(self) -> Path:
        """Its interpreter; a link that is not followed, as an environment is found by it."""
        return self.checkout / ".venv" / "bin" / "python"

    def run(self, case: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Runs a command of upbench in an empty folder of records.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        out = self.work / case
        shutil.rmtree(out / "records", ignore_errors=True)  # what was measured of the cost stays
        command = [str(self.python), "-m", "upbench", "run", *arguments, "--out", str(out)]
        log = self.work / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "UPBENCH_CACHE": str(self.work / "cache")}
        with log.open("w") as file:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=self.checkout)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr=log.read_text())
        return {
            "side": self.name,
            "case": case,
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "cells": [cell_of(path) for path in sorted((out / "records").glob("*.json"))],
        }


def cell_of(path: Path) -> dict[str, Any]:
    """A record's cell, seconds and main metric."""
    record = json.loads(path.read_text())
    if record["status"] != "ok":
        raise SystemExit(f"error: {path}: {record['status']}: {record['reason']}")
    main = record["columns"][0]
    split, metrics = next(iter(record["metrics"].items()))
    values = metrics[main["name"]]
    values = values["values"] if isinstance(values, dict) else values
    return {
        "method": record["cell"]["method"]["name"],
        "task": record["cell"]["task"],
        "seconds": record["seconds"],
        "split": split,
        "metric": main["title"],
        "value": statistics.fmean(values),
    }


def measure(arguments: argparse.Namespace, sides: dict[str, Side]) -> Iterator[dict[str, Any]]:
    """Every run, in the order in which they were made."""
    chosen = [case for case in CASES if case in arguments.cases.split(",")]
    for side in sides.values():
        for case in chosen:  # features, and what a method costs; a short training
            print(f"{side.name}: {case}, before the clock starts", file=sys.stderr, flush=True)
            side.run(case, words(arguments, case, epochs=1))
    runs: list[dict[str, Any]] = []
    for repeat in range(arguments.repeats):
        for case in chosen:
            order = SIDES if repeat % 2 == 0 else SIDES[::-1]
            for name in order:
                found = {"repeat": repeat, **sides[name].run(case, words(arguments, case))}
                print(f"{name}: {case} {repeat + 1}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
                runs.append(found)
                yield found
        if arguments.out:
            write(arguments, sides, runs)


def words(arguments: argparse.Namespace, case: str, epochs: int | None = None) -> list[str]:
    """The arguments of `upbench run` for a case; `epochs` in the place of those that are asked for."""
    tasks = arguments.tasks if case == "matrix" else arguments.seeds_task
    seeds = {"matrix": arguments.seeds, "seeds": SEEDS, "single": 1}[case]
    given = ["--methods", arguments.methods, "--tasks", tasks, "--seeds", str(seeds)]
    given += ["--preset", arguments.preset, "--device", "cpu"]
    if arguments.limit:
        given += ["--limit", str(arguments.limit)]
    probe = arguments.probe
    if epochs is not None:
        probe = [setting for setting in probe if not setting.startswith("epochs=")] + [f"epochs={epochs}"]
    return given + [word for setting in probe for word in ("--probe", setting)]


def write(arguments: argparse.Namespace, sides: dict[str, Side], runs: Sequence[dict[str, Any]]) -> None:
    """All runs so far, with the state of both checkouts, as JSON."""
    given = vars(arguments).items()
    settings = {name: str(value) for name, value in given if not isinstance(value, Path)}  # no places
    commits = {name: commit(side.checkout) for name, side in sides.items()}
    result = {
        "arguments": settings,
        "commits": commits,
        "threads": os.environ.get("OMP_NUM_THREADS", "as PyTorch chooses"),
        "cores": os.cpu_count(),
        "runs": list(runs),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def commit(checkout: Path) -> str:
    """The commit of a checkout, with "+" where files were changed; "" where that cannot be told."""
    texts = []
    for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return ""
        texts.append(done.stdout.strip())
    return texts[0] + ("+" if texts[1] else "")


# What is printed


def summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Seconds of each command in both checkouts, and five seeds beside five runs."""
    lines = [
        "| command | old (s) | new (s) | old / new | old, CPU s | new, CPU s | old / new, CPU |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for case in dict.fromkeys(run["case"] for run in runs):
        parts = []
        for key in ("seconds", "cpu_seconds"):
            old, new = (series(runs, case, side, key) for side in SIDES)
            parts += [f"{statistics.median(old):.1f}", f"{statistics.median(new):.1f}", spread(old, new)]
        lines.append(f"| {case} | {' | '.join(parts)} |")
    if {"seeds", "single"} <= {run["case"] for run in runs}:
        lines += ["", "| five seeds in one run | five runs / one run | of the cells alone |", "|---|--:|--:|"]
        for side in SIDES:
            ratios = []
            for key in ("seconds", "cells"):
                each, together = (series(runs, case, side, key) for case in ("single", "seeds"))
                ratios.append(spread([SEEDS * value for value in each], together))
            lines.append(f"| {side} | {' | '.join(ratios)} |")
    return lines


def cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where the time goes: seconds of each cell in both checkouts."""
    lines = ["| command | cell | old (s) | new (s) | old / new | metric | old | new |"]
    lines.append("|---|---|--:|--:|--:|---|--:|--:|")
    for case in dict.fromkeys(run["case"] for run in runs):
        own = {side: [r for r in runs if (r["case"], r["side"]) == (case, side)] for side in SIDES}
        known = [(cell["method"], cell["task"]) for cell in own["new"][0]["cells"]]
        for method, task in known:
            found = {
                side: [cell for run in of_side for cell in run["cells"] if _is(cell, method, task)]
                for side, of_side in own.items()
            }
            old, new = ([cell["seconds"] for cell in found[side]] for side in SIDES)
            title = f"{found['new'][0]['split']} {found['new'][0]['metric']}"
            values = " | ".join(f"{found[side][0]['value']:.3f}" for side in SIDES)
            times = f"{statistics.median(old):.1f} | {statistics.median(new):.1f} | {spread(old, new)}"
            lines.append(f"| {case} | {method}, {task} | {times} | {title} | {values} |")
        rest = {side: [run["seconds"] - _cells(run) for run in of_side] for side, of_side in own.items()}
        times = " | ".join(f"{statistics.median(rest[side]):.1f}" for side in SIDES)
        lines.append(f"| {case} | beside the cells | {times} | {spread(*rest.values())} | | | |")
    return lines


def series(runs: Sequence[dict[str, Any]], case: str, side: str, key: str) -> list[float]:
    """A number of each repeat: "seconds", "cpu_seconds", or the seconds of all "cells"."""
    own = [run for run in runs if (run["case"], run["side"]) == (case, side)]
    return [_cells(run) if key == "cells" else run[key] for run in own]


def spread(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Ratios within a repeat: their median, the smallest and the largest, as in "2.1 (1.9-2.2)"."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True) if b > 0]
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def _cells(run: dict[str, Any]) -> float:
    return float(sum(cell["seconds"] for cell in run["cells"]))


def _is(cell: dict[str, Any], method: str, task: str) -> bool:
    return (cell["method"], cell["task"]) == (method, task)


if __name__ == "__main__":
    sys.exit(main())
