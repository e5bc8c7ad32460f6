"""`upbench report`: records to tables."""

from __future__ import annotations

import argparse
from typing import Any

from upbench.cli._parser import Command
from upbench.errors import unknown
from upbench.run.config import RunConfig

FORMATS = ("md", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        default=[RunConfig().out],
        metavar="DIR",
        help="folders of runs (default: %(default)s)",
    )
    add("--format", default="md", metavar="|".join(FORMATS), help="Markdown or CSV (default: %(default)s)")
    add("--out", metavar="FILE", help="write to a file instead of stdout")
    add(
        "--metrics",
        default="main",
        metavar="main|all",
        help="a few metrics of each task, or all (default: main)",
    )
    add(
        "--against",
        metavar="ROW",
        help="add differences to this row or method, with 95 %% intervals over images",
    )
    add(
        "--published",
        action="store_true",
        help="add what papers report for the same protocol, dataset, split, backbone, sizes and method",
    )
    add(
        "--published-rows",
        action="store_true",
        help="the same, and a row for each published method that was not measured",
    )


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from upbench.results.records import load_records
    from upbench.results.report import show, write
    from upbench.system.outputs import writable_file

    for name, value, choices in (
        ("format", arguments.format, FORMATS),
        ("choice for --metrics", arguments.metrics, ("main", "all")),
    ):
        if value not in choices:
            raise unknown(name, value, choices)
    place = writable_file("table", arguments.out) if arguments.out is not None else None
    records = load_records(arguments.folders)
    options: dict[str, Any] = {"metrics": arguments.metrics, "against": arguments.against}
    if arguments.published or arguments.published_rows:
        from upbench.results.papers import load_published

        options |= {"published": load_published(), "unmeasured": arguments.published_rows}
    if place is not None:
        write(records, arguments.format, place, **options)
    else:
        show(records, arguments.format, **options)
    return 0


COMMAND = Command("print the table of a run's records", add_arguments, call)
