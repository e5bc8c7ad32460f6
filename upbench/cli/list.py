"""`upbench list`: what there is."""

from __future__ import annotations

import argparse

from upbench.cli._parser import Command
from upbench.errors import unknown

LISTS = ("methods", "tasks", "datasets", "protocols", "backbones", "weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("what", metavar="|".join(LISTS), help="what to list")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with every field")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if arguments.what not in LISTS:
        raise unknown("list", arguments.what, LISTS)
    from upbench.cli.inventory import listing
    from upbench.registry import load_plugin_files
    from upbench.system.outputs import emit

    load_plugin_files(arguments.plugin)
    rows = listing.rows(arguments.what)
    emit(listing.as_json(rows) if arguments.json else listing.as_text(rows))
    return 0


COMMAND = Command("list methods, tasks, datasets, protocols, backbones or weights", add_arguments, call)
