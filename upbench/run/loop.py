"""The only loop over cells: plan, keep what is finished, run the rest, write each record as it comes.

Nothing is written before every name and input was looked at. A cell that fails leaves a `failed` record and
the run goes on; Ctrl-C and `kill -9` lose at most the cells in flight. Runs in one folder share its cells:
what one has claimed, another waits for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import UpbenchError, system_errors
from upbench.results.layout import check_cost
from upbench.results.records import FOLDER, Record, Spread, parse_json, read_record, write_json, write_record
from upbench.run.claims import Claims
from upbench.run.config import RunConfig
from upbench.run.executors import Lost, find_executor
from upbench.system.cache import cache_dir, replacing
from upbench.system.environment import without_home
from upbench.system.progress import Bar, bar, duration, say
from upbench.system.reading import read_file
from upbench.values import user_path

if TYPE_CHECKING:
    from upbench.run.jobs import Job, PlannedCell
    from upbench.run.worker import Worker

SECONDS_BETWEEN_LOOKS = 1.0
"""At cells that another run has claimed."""
_LARGEST_COST = 1 << 20


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
    out = user_path(config.out)
    with system_errors("make the output folder", config.out):
        _check_folder(out / FOLDER)
    worker = Worker()
    plan = make_plan(config, worker.backbone)
    with closing(_Run(config, debug, out, worker, plan)) as state:
        return state.everything()


class _Run:
    """One run: what is finished, what is this run's to do, and what other runs are at."""

    def __init__(
        self, config: RunConfig, debug: bool, out: Path, worker: Worker, plan: list[PlannedCell]
    ) -> None:
        self.config, self.debug, self.out, self.worker, self.plan = config, debug, out, worker, plan
        self.folder = out / FOLDER
        self.claims = Claims(out / "claims")
        self.before = {path: _version(path) for path in self.folder.glob("*.json")}
        self.records: dict[str, Record] = {}
        self.costs: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, str] = {}  # cells whose worker was lost once, with the reason

    def close(self) -> None:
        """Lets go of what this run had claimed."""
        self.claims.close()

    def everything(self) -> list[Record]:
        """Runs what is not finished; see `run`."""
        if not self.config.force:
            self.records = finished(self.folder, self.plan)
        todo = [planned for planned in self.plan if planned.cell.key not in self.records]
        if any(not planned.skip for planned in todo):
            cache_dir()  # bad input is told before anything else is
        self._announce()
        try:
            self._run_all(todo)
        except KeyboardInterrupt:
            kept = f"{len(self.records)} of {len(self.plan)} cells are kept in {self.folder}"
            say(f"stopped: {kept}; run the same again to go on")
            raise
        return [self.records[planned.cell.key] for planned in self.plan]

    def _run_all(self, todo: Sequence[PlannedCell]) -> None:
        """Writes a record for each of these cells."""
        pending = [planned for planned in todo if not planned.skip]
        _prepare(self.worker, pending)
        _create(self.folder)
        self._note_names()
        for planned in todo:
            if planned.skip:
                self._keep(self._skipped(planned))
        self.costs = self._measured(pending)
        with bar("cells", total=len(pending)) as progress:
            self._until_done(pending, progress)

    def _until_done(self, pending: Sequence[PlannedCell], progress: Bar) -> None:
        """Runs what can be claimed, then looks at the rest until other runs have finished or let go of it."""
        told = False
        while pending:
            others: list[PlannedCell] = []
            worked = self._run_jobs(self._jobs(pending, others, progress), others, progress)
            pending = [planned for planned in others if planned.cell.key not in self.records]
            if pending and not worked:
                if not told:
                    say(f"waiting for {len(pending)} cells that another run in {self.out} is at")
                    told = True
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _jobs(
        self, pending: Sequence[PlannedCell], others: list[PlannedCell], progress: Bar
    ) -> Iterator[Job]:
        """Jobs of cells that are claimed when the job is asked for, so that runs in one folder share evenly.

        Args:
            pending: The cells.
            others: Gets those that another run is at.
            progress: Told of cells that another run has finished.
        """
        from upbench.run.jobs import Job
        from upbench.run.plan import groups

        for group in groups(list(pending)):
            own = []
            for planned in group:
                if not self.claims.take(planned.cell.key):
                    others.append(planned)
                elif (record := self._by_another(planned)) is not None:
                    self.claims.drop(planned.cell.key)
                    self._done(record, progress)
                else:
                    own.append(planned)
            again = [planned for planned in own if planned.cell.key in self.lost]
            for cells in ([planned for planned in own if planned not in again], *([one] for one in again)):
                if cells:
                    yield Job(tuple(map(self._as_seen, cells)), tuple(self.config.plugins), self.debug)

    def _as_seen(self, planned: PlannedCell) -> PlannedCell:
        """The cell as a worker takes it: one that is given a GPU sees no other, whichever it is here."""
        if self.config.executor == "inline" or not planned.place.startswith("cuda"):
            return planned
        return replace(planned, place="cuda")

    def _by_another(self, planned: PlannedCell) -> Record | None:
        """The record of a cell that another run has finished since this one began; a failure counts, too."""
        for path in _files(self.folder, planned):
            if _version(path) not in (None, self.before.get(path)):
                record = _held(path, planned, ("ok", "failed"))
                if record is not None:
                    return record
        return None

    def _run_jobs(self, jobs: Iterable[Job], again: list[PlannedCell], progress: Bar) -> bool:
        """Whether there was anything to do; `again` gets the cells that are to be tried once more."""
        execute, config = find_executor(self.config.executor), self.config
        worked = False
        with closing(
            execute(self.worker, jobs, config.workers, self._devices(), config.lost_after)
        ) as outcomes:
            for job, outcome in outcomes:
                worked = True
                done = [outcome] if isinstance(outcome, Record) else list(self._lost(job, outcome, again))
                for record in done:
                    record = _with_cost(record, self.costs[record.cell.key])
                    write_record(self.folder, record)
                    self.claims.drop(record.cell.key)
                    self._done(record, progress)
        return worked

    def _devices(self) -> Sequence[str]:
        """Which GPUs workers may be given; none where cells run on the CPU."""
        place = self.plan[0].place if self.plan else "cpu"
        if not place.startswith("cuda"):
            return ()
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        number = place.partition(":")[2]
        return [there[int(number)]] if number else there

    def _done(self, record: Record, progress: Bar) -> None:
        self.records[record.cell.key] = record
        progress.advance()
        say(f"[{len(self.records)}/{len(self.plan)}] {record.cell}: {summary(record)}")

    def _keep(self, record: Record) -> None:
        write_record(self.folder, record)
        self.records[record.cell.key] = record

    def _skipped(self, planned: PlannedCell) -> Record:
        from upbench.run.describe import assemble

        return assemble(planned, "skipped", reason=planned.skip)

    def _lost(self, job: Job, lost: Lost, again: list[PlannedCell]) -> Iterator[Record]:
        """Failed records for the cells that were lost before; the others that a dead worker left open are
        tried once more, each by itself: one of them may have been its death."""
        from upbench.run.describe import assemble

        for planned in job.cells:
            key = planned.cell.key
            if key in self.records:
                continue
            if key in self.lost:
                once = "" if self.lost[key] == lost.reason else f"; the first time, {self.lost[key]}"
                yield assemble(planned, "failed", reason=f"tried twice: {lost.reason}{once}")
            else:
                self.lost[key] = lost.reason
                again += [each for each in self.plan if each.cell.key == key]
                say(f"{planned.cell}: {lost.reason}; it is tried once more")

    def _note_names(self) -> None:
        """Writes which images each split had, once for all records: they hold the digest that names the
        file."""
        folder = self.out / "data"
        for planned in self.plan:
            for split, facts in planned.data.items():
                path = folder / f"{facts['names']}.json"
                if not path.is_file():
                    _create(folder)
                    names = planned.dataset.names(split)[: planned.cell.limit]
                    write_json(path, {"dataset": planned.cell.dataset, "split": split, "names": names})

    def _announce(self) -> None:
        plan, config = self.plan, self.config
        skipped = sum(bool(planned.skip) for planned in plan)
        parts = [f"{len(plan)} cells"]
        parts += [f"shard {config.shard}"] if config.shard else []
        parts += [f"{len(self.records)} finished before"] if self.records else []
        parts += [f"{skipped} skipped"] if skipped else []
        say(f"{', '.join(parts)}; records in {Path(config.out) / FOLDER}")
        if config.limit is not None:
            say(f"WARNING: --limit {config.limit}: only that many images of every split; not for reporting")
        for planned in {planned.cell.data: planned for planned in plan}.values():
            for split, facts in planned.data.items():
                if facts["official"] and facts["available"] < facts["official"]:
                    there = f"{facts['available']} of {facts['official']} images"
                    say(f"WARNING: {planned.cell.dataset}/{split} is a partial copy: {there}")

    def _measured(self, pending: Sequence[PlannedCell]) -> dict[str, dict[str, Any]]:
        """What the method of each cell costs on each device, by the cell's key.

        Measured on this machine, before the cells, one at a time with nothing of this run beside it; once per
        method and configuration.
        """
        from upbench.run.costs import CostJob, cost_key, measure_cost
        from upbench.run.jobs import Job

        folder, plugins = self.out / "cost", tuple(self.config.plugins)
        names: dict[str, dict[str, str]] = {}
        jobs: dict[str, CostJob] = {}
        for planned in pending:
            devices = dict.fromkeys(("cpu", planned.cell.device))
            names[planned.cell.key] = {device: cost_key(planned, device) for device in devices}
            for device, name in names[planned.cell.key].items():
                jobs.setdefault(name, CostJob(Job((planned,), plugins), device, name))
        found: dict[str, dict[str, Any]] = {}
        if not self.config.force:
            found = {name: read for name in jobs if (read := _read_cost(folder / f"{name}.json"))}
        missing = [job for name, job in jobs.items() if name not in found]
        if missing:
            _create(folder)
            execute = find_executor("inline" if self.config.executor == "inline" else "process")
            with (
                bar("cost", total=len(missing)) as progress,
                closing(execute(measure_cost, missing, 1, (), self.config.lost_after)) as outcomes,
            ):
                for job, outcome in outcomes:
                    result = {"error": outcome.reason} if isinstance(outcome, Lost) else outcome
                    found[job.key] = result
                    if "error" in result:
                        say(f"cost of {job.planned.cell.method.title} on {job.device}: {result['error']}")
                    else:
                        write_json(folder / f"{job.key}.json", result)
                    progress.advance()
        return {key: {device: found[n] for device, n in of_cell.items()} for key, of_cell in names.items()}


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


def finished(
    folder: Path, plan: Sequence[PlannedCell], tell: Callable[[str], None] = say, rename: bool = True
) -> dict[str, Record]:
    """Records of a plan's cells that still hold, by key; with `rename` under the labels that rows have
    now."""
    kept: dict[str, Record] = {}
    for planned in plan:
        if planned.skip:
            continue
        for path in _files(folder, planned):
            record = _held(path, planned, ("ok",), tell)
            if record is not None:
                kept[planned.cell.key] = _relabelled(folder, path, record, planned) if rename else record
    return kept


def _files(folder: Path, planned: PlannedCell) -> list[Path]:
    """Where a cell's record may stand, whatever its row was called."""
    return sorted(folder.glob(f"*-{planned.cell.key[:8]}.json")) if folder.is_dir() else []


def _version(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that stood there before; None where there is none.

    No clock is asked: that of a file server may be another.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _held(
    path: Path, planned: PlannedCell, statuses: Sequence[str], tell: Callable[[str], None] = say
) -> Record | None:
    """A cell's record, if it holds; says why it does not."""
    _refuse_folder(path)
    try:
        record = read_record(path)
    except UpbenchError as error:
        tell(f"{error} (its cell is run again)")
        return None
    if record.cell.key != planned.cell.key or record.status not in statuses:
        return None
    from upbench.run.describe import lacks

    if record.status == "ok" and (lack := lacks(planned, record.metrics)):
        tell(f"{record.cell}: run again, since its record {lack}")
        return None
    if record.inputs != planned.inputs:
        changed = [name for name in planned.inputs if record.inputs.get(name) != planned.inputs[name]]
        tell(f"{record.cell}: run again, since its {', '.join(changed) or 'inputs'} changed")
        return None
    return record


def _refuse_folder(path: Path) -> None:
    """Raises UpbenchError where a folder is in the place of a file that is to be written: before the work."""
    if path.is_dir():
        raise UpbenchError(f"cannot write {path}: it is a folder; move it away")


def _relabelled(folder: Path, path: Path, record: Record, planned: PlannedCell) -> Record:
    """The record under the label that its row has now."""
    if record.cell.method.label == planned.cell.method.label and record.row == planned.row:
        return record
    record = replace(record, cell=planned.cell, row=planned.row)
    if write_record(folder, record) != path:
        path.unlink(missing_ok=True)
    return record


def _prepare(worker: Worker, pending: Iterable[PlannedCell]) -> None:
    """Computes the backbones' features into the cache: once, and before anything else, as they tell bad
    input.

    Raises:
        UpbenchError: Images that cannot be read, or features that are not finite.
    """
    seen: set[tuple[object, ...]] = set()
    for planned in pending:
        if planned.shares not in seen and planned.task.content == "images":
            seen.add(planned.shares)
            for split in planned.splits:
                worker.data(planned).features(split).prepare()


def _read_cost(path: Path) -> dict[str, Any] | None:
    """A measurement from before; None where there is none, or it is damaged, which is said."""
    if not os.path.lexists(path):
        return None
    _refuse_folder(path)
    try:
        read = parse_json(read_file(path, "cost file", _LARGEST_COST))
        check_cost(read)
    except (UpbenchError, ValueError) as error:
        text = error if isinstance(error, UpbenchError) else f"damaged cost file {path}: {error}"
        say(f"WARNING: {text} (measured again)")
        return None
    return dict(read)


def _with_cost(record: Record, costs: dict[str, dict[str, Any]]) -> Record:
    """The record with its method's cost, and with what could not be measured among the warnings."""
    notes = [
        f"cost on {device}: {without_home(cost['error'])}"
        for device, cost in costs.items()
        if "error" in cost
    ]
    measured = {device: cost for device, cost in costs.items() if "error" not in cost}
    return replace(record, cost=measured, warnings=[*record.warnings, *notes])
