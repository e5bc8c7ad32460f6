"""`upbench profile`: what methods cost."""

from __future__ import annotations

import argparse

from upbench.cli._parser import Command, check_sizes, integer
from upbench.errors import UpbenchError
from upbench.run.config import DEVICES, DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("--methods", default="all", metavar="NAME[:WEIGHTS],...", help="methods; wildcards (default: all)")
    add("--size", default="448", metavar="N|HxW,...", help="sizes of the image (default: %(default)s)")
    add("--backbone", metavar="NAME", help="of the features; methods that run it need one (default: none)")
    add("--channels", type=integer, metavar="C", help="of the features (default: the backbone's, or 384)")
    add("--stride", type=integer, metavar="N", help="pixels per feature (default: the backbone's, or 14)")
    add("--output", metavar="N|HxW", help="size of the output (default: that of the image)")
    add("--batch", type=integer, default=1, metavar="N", help="images at a time (default: %(default)s)")
    add("--device", default="auto", metavar="|".join(DEVICES), help="where to measure (default: %(default)s)")
    add("--dtype", default="float32", metavar="|".join(DTYPES), help="arithmetic (default: %(default)s)")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins; repeatable")
    add("--out", metavar="FILE.json", help="write every number to a file, too")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    check_sizes(arguments)
    from upbench.cli.inventory import listing
    from upbench.cost import profile as profiling
    from upbench.registry import load_plugin_files
    from upbench.results.records import write_json
    from upbench.system.outputs import emit, writable_file

    out = writable_file("measurements", arguments.out) if arguments.out is not None else None
    load_plugin_files(arguments.plugin)
    costs = list(
        profiling.profile(
            arguments.methods.split(","),
            [profiling.parse_size(text) for text in arguments.size.split(",")],
            channels=arguments.channels,
            stride=arguments.stride,
            output=profiling.parse_size(arguments.output) if arguments.output else None,
            batch=arguments.batch,
            device=arguments.device,
            dtype=arguments.dtype,
            backbone=arguments.backbone,
        )
    )
    if not costs:
        raise UpbenchError(
            "no method is left: all that were asked for run the backbone; name one with --backbone"
        )
    if out is not None:
        write_json(out, costs)
    emit(listing.as_text(profiling.table_row(cost) for cost in costs))
    first = costs[0]
    emit(f"{first['hardware']}; {first['dtype']}, batch {arguments.batch}, {first['channels']} channels")
    return 0


COMMAND = Command("measure what methods cost", add_arguments, call)
