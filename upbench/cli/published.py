"""`upbench published`: what the papers report."""

from __future__ import annotations

import argparse
from contextlib import suppress

from upbench.cli._parser import Command
from upbench.errors import UpbenchError, unknown

FORMATS = ("md", "csv", "json")
_FILTERS = ("method", "dataset", "task", "protocol", "backbone", "paper", "metric", "split")
_SHOWN = (
    *("method", "variant", "weights", "task", "dataset", "split", "backbone", "image", "output", "protocol"),
    *("metric", "printed", "unit", "source"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    for name in _FILTERS:
        parser.add_argument(f"--{name}", metavar="NAME", help=f"only numbers of this {name}")
    parser.add_argument(
        "--format",
        default="md",
        metavar="|".join(FORMATS),
        help="Markdown, CSV or JSON (default: %(default)s)",
    )


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if arguments.format not in FORMATS:
        raise unknown("format", arguments.format, FORMATS)
    from upbench.results.papers import load_published, protocols_of, select
    from upbench.system.outputs import emit

    every = load_published()
    wanted = {name: getattr(arguments, name) for name in _FILTERS}
    if wanted["protocol"] is not None and wanted["protocol"] not in protocols_of(every):
        wanted["protocol"] = _own_name(wanted["protocol"])
    rows = select(every, **wanted)
    lines = [{**row.to_dict(), "source": row.source} for row in rows]
    if arguments.format == "json":
        import json

        emit(json.dumps(lines, indent=1, ensure_ascii=False))
    elif arguments.format == "csv":
        import csv
        import io

        from upbench.results.report.marks import cell

        names = list(lines[0]) if lines else list(_SHOWN)
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in line.items()} for line in lines)
        emit(text.getvalue(), end="")
    elif not lines:
        emit("none")
    else:
        from upbench.results.report.marks import markdown
        from upbench.results.report.text import table_lines

        shown = [name for name in _SHOWN if any(line[name] not in ("", None) for line in lines)]
        head = ["value" if name == "printed" else name for name in shown]
        body = [["" if line[name] is None else markdown(line[name]) for name in shown] for line in lines]
        right = {shown.index(name) for name in ("image", "output", "printed") if name in shown}
        emit("\n".join(table_lines(head, body, right)))
    return 0


def _own_name(protocol: str) -> str:
    """The name of a protocol that has others, too; a name that nothing has as it is."""
    from upbench.registry import find_protocol

    with suppress(UpbenchError):
        return find_protocol(protocol).name
    return protocol


COMMAND = Command(
    "list what the papers report, with protocol and source",
    add_arguments,
    call,
    "Lists published numbers. Those that were read in notes on a paper, not in the paper, say so.",
)
