"""`upbench run`: cells to records."""

from __future__ import annotations

import argparse
import dataclasses

from upbench.cli._parser import Command, integer, number, settings
from upbench.run.config import DEVICES, DTYPES, EXECUTORS, RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    default = RunConfig()
    add = parser.add_argument
    add(
        "--methods", metavar="NAME[:WEIGHTS],...", help="methods; wildcards such as 'b*', and 'all' (default)"
    )
    add("--tasks", metavar="NAME,...", help=f"tasks (default: {','.join(default.tasks)})")
    add("--backbones", metavar="NAME,...", help=f"backbones (default: {','.join(default.backbones)})")
    add("--datasets", metavar="NAME[:FOLDER],...", help="datasets (default: each task's own)")
    add(
        *("--protocol", "--preset"),
        metavar="NAME",
        help=f"rules of measurement, see 'upbench list protocols' (default: {default.protocol})",
    )
    add(
        "--config",
        metavar="FILE.yaml",
        help="a YAML file with any of these settings, and with parts; flags win over it",
    )
    add("--seeds", type=integer, metavar="N", help=f"trainings of the probe (default: {default.seeds})")
    add("--limit", type=integer, metavar="N", help="only N images of every split, for a trial")
    add(
        "--device",
        metavar="|".join((*DEVICES, "cuda:N")),
        help=f"where to compute (default: {default.device})",
    )
    add("--dtype", metavar="|".join(DTYPES), help=f"arithmetic of the method (default: {default.dtype})")
    add("--out", metavar="DIR", help=f"folder of the records (default: {default.out})")
    add(
        "--plugin", action="append", dest="plugins", metavar="FILE.py", help="a file with plugins; repeatable"
    )
    add("--force", action="store_true", default=None, help="redo cells that are finished")
    add("--executor", metavar="|".join(EXECUTORS), help=f"where cells run (default: {default.executor})")
    add("--workers", type=integer, metavar="N", help="cells at a time, for process and ray (default: 2)")
    add(
        "--lost-after",
        type=number,
        metavar="SECONDS",
        help="give up a worker that shows no sign of life for so long "
        f"(process; default: {default.lost_after:g})",
    )
    add(
        "--probe",
        action="append",
        metavar="KEY=VALUE",
        help="a probe setting other than the protocol's; repeatable",
    )
    add("--shard", metavar="I/N", help="only the I-th of N parts of the cells, as on N machines")
    add(
        "--dry-run",
        action="store_true",
        help="say what would be run and what is there for it, and run nothing",
    )
    add("--pdb", action="store_true", help="open a debugger where a cell fails")
    add("--quiet", action="store_true", help="no progress and no table, only errors")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from upbench.system.outputs import complain, emit, flush
    from upbench.system.progress import be_quiet

    names = {field.name for field in dataclasses.fields(RunConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["probe"] = settings("--probe", arguments.probe) if arguments.probe else None
    config = RunConfig.load(arguments.config, given)
    be_quiet(arguments.quiet)
    if arguments.dry_run:
        from upbench.cli.inventory.listing import as_text
        from upbench.run.preview import preview

        rows, notes = preview(config)
        emit("\n".join([as_text(rows), *notes]))
        return 0
    from upbench.run.loop import run

    records = run(config, debug=arguments.pdb)
    failed = [record for record in records if record.status == "failed"]
    try:
        if not arguments.quiet:
            from upbench.results.report import show

            show(records, "md")
            flush()
    finally:
        for record in failed:
            complain(f"upbench: failed: {record.cell}: {record.reason}")
    return 1 if failed else 0


COMMAND = Command(
    "run methods on tasks, one record a cell",
    add_arguments,
    call,
    "Runs every cell that is not finished yet, and prints the table. Run the same again to go on.",
)
