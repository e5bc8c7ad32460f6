"""The only loop over cells: plan, keep what is finished, run the rest, write each record as it comes.

Nothing is written before every name and input was looked at. A cell that fails leaves a `failed` record and
the run goes on; Ctrl-C and `kill -9` lose at most the cells in flight.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import UpbenchError
from upbench.results.records import FOLDER, Record, Spread, read_record, write_json, write_record
from upbench.run.config import RunConfig
from upbench.run.executors import Lost, find_executor
from upbench.system.cache import replacing
from upbench.system.progress import bar, duration, say

if TYPE_CHECKING:
    from upbench.run.plan import PlannedCell
    from upbench.run.worker import Job, Worker


def run(config: RunConfig, debug: bool = False) -> list[Record]:
    """Runs every cell of a run that is not finished yet.

    Args:
        config: What to run and where to leave the records.
        debug: Whether to open a debugger where a cell fails; for the executor "inline".

    Returns:
        The records of all cells of the run, those from before included, in the order of the cells.

    Raises:
        UpbenchError: Bad input (nothing was written), or a disk that cannot be written (what is finished is
            kept).
        KeyboardInterrupt: After saying what is kept.
    """
    from upbench.run.plan import make_plan
    from upbench.run.worker import Worker

    if debug and config.executor != "inline":
        raise UpbenchError("a debugger needs the executor 'inline'")
    folder = Path(config.out).expanduser() / FOLDER
    _check_folder(folder)
    execute = find_executor(config.executor)
    worker = Worker()
    plan = make_plan(config, worker.backbone)
    records = {} if config.force else _finished(folder, plan)
    todo = [planned for planned in plan if planned.cell.key not in records]
    pending = [planned for planned in todo if not planned.skip]
    _announce(plan, records, config)
    _prepare(worker, pending)
    _create(folder)
    for planned in todo:
        if planned.skip:
            record = worker.skipped(planned)
            write_record(folder, record)
            records[record.cell.key] = record
    costs = _costs(pending, config, Path(config.out).expanduser() / "cost")
    jobs = _jobs(pending, config, debug)
    try:
        with (
            bar("cells", total=len(pending)) as progress,
            closing(execute(worker, jobs, config.workers)) as outcomes,
        ):
            for job, outcome in outcomes:
                done = (
                    [outcome] if isinstance(outcome, Record) else list(_lost(worker, job, outcome, records))
                )
                for record in done:
                    record = _with_cost(record, costs[record.cell.key])
                    write_record(folder, record)
                    records[record.cell.key] = record
                    progress.advance()
                    say(f"[{len(records)}/{len(plan)}] {record.cell}: {summary(record)}")
    except KeyboardInterrupt:
        say(f"stopped: {len(records)} of {len(plan)} cells are kept in {folder}; run the same again to go on")
        raise
    return [records[planned.cell.key] for planned in plan]


def summary(record: Record) -> str:
    """A record in a few words, for the log."""
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    parts = []
    primary = record.columns[0]
    for split, metrics in record.metrics.items():
        spread = Spread.of(metrics[primary["name"]])
        deviation = "" if spread.std is None else f" ± {spread.std:.3g}"
        parts.append(f"{split} {primary['title']} {spread.mean:.4g}{deviation}")
    return f"{', '.join(parts)} ({duration(record.seconds)})"


def _check_folder(folder: Path) -> None:
    """Fails early where the folder could not be made, without making it.

    Raises:
        UpbenchError: It, or what stands in its place, is not a folder or cannot be written.
    """
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not place.is_dir():
        raise UpbenchError(f"output folder {folder.parent} cannot be made: {place} is a file")
    if place == folder:
        _probe(folder)
        return
    import os

    if not os.access(place, os.W_OK | os.X_OK):
        raise UpbenchError(f"output folder {folder.parent} cannot be written: no permission in {place}")


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpbenchError(f"output folder {folder.parent} cannot be made: {error.strerror}") from error
    _probe(folder)


def _probe(folder: Path) -> None:
    """Writes a byte and takes it away again: permissions say nothing about a full disk."""
    place = folder / ".probe"
    with replacing(place) as temporary:
        temporary.write_bytes(b"\n")
    place.unlink(missing_ok=True)


def _finished(folder: Path, plan: Sequence[PlannedCell]) -> dict[str, Record]:
    """Records of the plan's cells that still hold, by key."""
    kept: dict[str, Record] = {}
    for planned in plan:
        key = planned.cell.key
        for path in sorted(folder.glob(f"*-{key[:8]}.json")) if folder.is_dir() else ():
            try:
                record = read_record(path)
            except UpbenchError as error:
                say(f"{error} (its cell is run again)")
                continue
            if record.cell.key != key or record.status != "ok" or planned.skip:
                continue
            if record.inputs != planned.inputs:
                changed = [name for name in planned.inputs if record.inputs.get(name) != planned.inputs[name]]
                say(f"{record.cell}: run again, since its {', '.join(changed)} changed")
                continue
            kept[key] = _relabelled(folder, path, record, planned)
    return kept


def _relabelled(folder: Path, path: Path, record: Record, planned: PlannedCell) -> Record:
    """The record under the label that its row has now."""
    if record.cell.method.label == planned.cell.method.label:
        return record
    record = replace(record, cell=planned.cell)
    if write_record(folder, record) != path:
        path.unlink(missing_ok=True)
    return record


def _announce(plan: Sequence[PlannedCell], kept: dict[str, Record], config: RunConfig) -> None:
    skipped = sum(bool(planned.skip) for planned in plan)
    parts = [f"{len(plan)} cells"]
    parts += [f"{len(kept)} finished before"] if kept else []
    parts += [f"{skipped} skipped"] if skipped else []
    say(f"{', '.join(parts)}; records in {Path(config.out) / FOLDER}")
    if config.limit is not None:
        say(f"WARNING: --limit {config.limit}: only that many images of every split; not for reporting")


def _prepare(worker: Worker, pending: Iterable[PlannedCell]) -> None:
    """Computes the backbones' features into the cache: once, and before anything else, as they tell bad
    input.

    Raises:
        UpbenchError: Images that cannot be read, labels out of range, or features that are not finite.
    """
    from upbench.run.build import splits

    seen: set[tuple[object, ...]] = set()
    for planned in pending:
        cell = planned.cell
        for split in splits(worker.dataset(cell)):
            key = (cell.backbone, cell.dataset, split, cell.preset, cell.limit)
            if key not in seen:
                seen.add(key)
                worker.features(cell, split)


def _jobs(pending: Sequence[PlannedCell], config: RunConfig, debug: bool) -> list[Job]:
    """Cells that share a backbone, a dataset and a method go together."""
    from upbench.run.worker import Job

    groups = itertools.groupby(pending, key=lambda p: (p.cell.backbone, p.cell.dataset, p.cell.method))
    return [Job(tuple(cells), tuple(config.plugins), debug) for _, cells in groups]


def _costs(pending: Sequence[PlannedCell], config: RunConfig, folder: Path) -> dict[str, dict[str, Any]]:
    """What the method of each cell costs on each device, by the cell's key.

    Measured on this machine, before the cells, one at a time with nothing beside it; once per method and
    configuration.
    """
    from upbench.run.costs import CostJob, cost_key, measure_cost

    names: dict[str, dict[str, str]] = {}
    jobs: dict[str, CostJob] = {}
    for planned in pending:
        devices = dict.fromkeys(("cpu", planned.cell.device))
        names[planned.cell.key] = {device: cost_key(planned, device) for device in devices}
        for device, name in names[planned.cell.key].items():
            jobs.setdefault(name, CostJob(planned, device, name, tuple(config.plugins)))
    found = (
        {} if config.force else {name: read for name in jobs if (read := _read_cost(folder / f"{name}.json"))}
    )
    missing = [job for name, job in jobs.items() if name not in found]
    if missing:
        _create(folder)
        execute = find_executor("inline" if config.executor == "inline" else "process")
        with (
            bar("cost", total=len(missing)) as progress,
            closing(execute(measure_cost, missing, 1)) as outcomes,
        ):
            for job, outcome in outcomes:
                result = {"error": outcome.reason} if isinstance(outcome, Lost) else outcome
                found[job.key] = result
                if "error" in result:
                    say(f"cost of {job.planned.cell.method.title} on {job.device}: {result['error']}")
                else:
                    write_json(folder / f"{job.key}.json", result)
                progress.advance()
    return {key: {device: found[name] for device, name in of_cell.items()} for key, of_cell in names.items()}


def _read_cost(path: Path) -> dict[str, Any] | None:
    """A measurement from before; None where there is none, or it is damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _with_cost(record: Record, costs: dict[str, dict[str, Any]]) -> Record:
    """The record with its method's cost, and with what could not be measured among the warnings."""
    notes = [f"cost on {device}: {cost['error']}" for device, cost in costs.items() if "error" in cost]
    measured = {device: cost for device, cost in costs.items() if "error" not in cost}
    return replace(record, cost=measured, warnings=[*record.warnings, *notes])


def _lost(worker: Worker, job: Job, lost: Lost, records: dict[str, Record]) -> Iterator[Record]:
    """Failed records for the cells that a dead worker left open."""
    for planned in job.cells:
        if planned.cell.key not in records:
            yield worker.failed(planned, lost.reason)
