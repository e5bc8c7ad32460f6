"""Whether the probe's training is long enough: the same cells with more epochs, side by side.

    python benchmarks/probe_convergence.py [--tasks seg,depth,normals] [--method bilinear] [--factors 1,3]

Each task is run under the preset as it is (x1) and with its epochs multiplied. The table has every metric
on every split, the mean over seeds, and the largest change. docs/protocol.md shows what it printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from upbench.errors import UpbenchError
from upbench.registry import find_protocol, find_task
from upbench.results.records import Record
from upbench.run.config import RunConfig
from upbench.run.loop import run


def main() -> int:
    """Runs the cells and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", default="seg,depth,normals")
    parser.add_argument("--method", default="bilinear")
    parser.add_argument("--backbone", default=RunConfig.backbones[0])
    parser.add_argument("--dataset", help="NAME or NAME:FOLDER (default: each task's own)")
    parser.add_argument("--preset", "--protocol", default="quick")
    parser.add_argument(
        "--factors", default="1,3", help="what epochs are multiplied with; the first is compared to"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/probe_convergence"))
    arguments = parser.parse_args()
    factors = [int(factor) for factor in arguments.factors.split(",")]
    try:
        lines = []
        for task in arguments.tasks.split(","):
            lines += rows(task, factors, [measure(arguments, task, factor) for factor in factors])
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    titles = " | ".join(f"x{factor}" for factor in factors)
    print(f"| task | split | metric | {titles} | largest change |")
    print(f"|---|---|---|{'--:|' * len(factors)}--:|")
    print("\n".join(lines))
    return 0


def measure(arguments: argparse.Namespace, task: str, factor: int) -> Record:
    """The record of a task with its epochs multiplied; kept from an earlier call where it is there."""
    settings = find_task(task)().settings().get("probe")
    if settings is None:
        raise UpbenchError(f"task '{task}' trains no probe")
    epochs = find_protocol(arguments.preset)().recipe_for(settings).epochs * factor
    config = RunConfig(
        methods=[arguments.method],
        tasks=[task],
        backbones=[arguments.backbone],
        datasets=[arguments.dataset] if arguments.dataset else [],
        protocol=arguments.preset,
        seeds=arguments.seeds,
        probe={} if factor == 1 else {"epochs": epochs},
        out=str(arguments.out / f"x{factor}"),
    )
    (record,) = run(config)
    if record.status != "ok":
        raise UpbenchError(f"{task} x{factor} {record.status}: {record.reason}")
    return record


def rows(task: str, factors: Sequence[int], records: Sequence[Record]) -> list[str]:
    """A line for each split and metric; the primary metric in bold."""
    lines = []
    for split in records[0].metrics:
        for place, column in enumerate(records[0].columns):
            values = [statistics.fmean(record.metrics[split][column["name"]]) for record in records]
            change = max((value - values[0] for value in values[1:]), key=abs, default=0.0)
            title = f"{column['title']} ({column['unit']})" if column["unit"] else column["title"]
            title = f"**{title}**" if place == 0 else title
            digits = 2 if column["unit"] in ("%", "deg") else 3
            cells = " | ".join(f"{value:.{digits}f}" for value in values)
            lines.append(f"| {task} | {split} | {title} | {cells} | {change:+.{digits}f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
