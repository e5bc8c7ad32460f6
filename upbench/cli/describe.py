"""`upbench describe`: one thing, with all that its class says."""

from __future__ import annotations

import argparse

from upbench.cli._parser import Command
from upbench.errors import unknown

KINDS = ("method", "task", "dataset", "protocol", "backbone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("kind", metavar="|".join(KINDS), help="what it is")
    add("name", metavar="NAME", help="its name; of a dataset also NAME:FOLDER, of a backbone any of timm's")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins; repeatable")
    add("--json", action="store_true", help="as JSON, with every field")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if arguments.kind not in KINDS:
        raise unknown("kind", arguments.kind, KINDS)
    from upbench.cli.inventory import describing
    from upbench.cli.inventory.listing import as_json
    from upbench.registry import load_plugin_files
    from upbench.system.outputs import emit

    load_plugin_files(arguments.plugin)
    facts = describing.facts(arguments.kind, arguments.name)
    if arguments.json:
        emit(as_json(facts))
    else:
        emit(describing.as_text(facts))
    return 0


COMMAND = Command(
    "describe a method, a task, a dataset, a protocol or a backbone",
    add_arguments,
    call,
    "Prints what the class says: options, weights, splits, metrics, or every parameter of a protocol.",
)
