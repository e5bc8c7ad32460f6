"""The work of cells, in whichever process an executor chose."""

from __future__ import annotations

import pdb
import time
import traceback
from collections.abc import Iterator
from typing import Any

from upbench.contracts.backbone import Backbone
from upbench.contracts.task import Scores, Task
from upbench.errors import UpbenchError
from upbench.features import backbones
from upbench.results.records import Record
from upbench.run.context import DataScope, MethodScope, RunContext
from upbench.run.describe import assemble, describe_error
from upbench.run.jobs import Job, PlannedCell


class Worker:
    """Turns jobs into records. What cells share is kept while the next cell shares it, too: jobs come in an
    order in which that is enough. Pickles as an empty one: another process makes everything for itself."""

    def __init__(self) -> None:
        self._backbone: tuple[tuple[str, str], Backbone] | None = None
        self._data: tuple[object, DataScope] | None = None
        self._method: tuple[object, MethodScope] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, job: Job) -> Iterator[Record]:
        """Each cell's record, as soon as there is one; an error in a cell becomes a failed record."""
        tasks = [planned.task for planned in job.cells]
        for planned in job.cells:
            yield self._record(planned, tasks, job.debug)

    def backbone(self, name: str, place: str) -> Backbone:
        """A loaded backbone, the latest one kept."""
        if self._backbone is None or self._backbone[0] != (name, place):
            self._backbone = None  # the old one goes before the new one comes
            self._backbone = (name, place), backbones.load_backbone(name, place)
        return self._backbone[1]

    def data(self, planned: PlannedCell) -> DataScope:
        """What a cell shares with those of its backbone, dataset and protocol."""
        key = planned.shares
        if self._data is None or self._data[0] != key:
            self._method = self._data = None
            name, place = planned.cell.backbone, planned.place
            self._data = key, DataScope(planned, lambda: self.backbone(name, place))
        return self._data[1]

    def method(self, planned: PlannedCell) -> MethodScope:
        """What a cell shares with those of its method, too."""
        data = self.data(planned)
        key = (planned.shares, planned.cell.method, planned.cell.dtype)
        if self._method is None or self._method[0] != key:
            self._method = None
            self._method = key, MethodScope(planned, data)
        return self._method[1]

    def _record(self, planned: PlannedCell, tasks: list[Task], debug: bool) -> Record:
        start = time.perf_counter()
        try:
            context = RunContext(planned, self.data(planned), self.method(planned), tasks)
            scores = planned.task.evaluate(context)
            _check(planned, scores)
        except Exception as error:
            text = traceback.format_exc()
            if debug:
                print(text)
                pdb.post_mortem(error.__traceback__)
            seconds = time.perf_counter() - start
            return assemble(planned, "failed", reason=describe_error(error), traceback=text, seconds=seconds)
        return assemble(planned, "ok", scores=scores, seconds=time.perf_counter() - start)


def _check(planned: PlannedCell, scores: Scores) -> None:
    """Raises UpbenchError where a task's scores are not what it declares."""
    task, declared = planned.task, {metric.name for metric in planned.task.metrics}
    missing = [split for split in planned.dataset.eval_splits if not scores.metrics.get(split)]
    if missing:
        raise UpbenchError(f"task '{task.name}' gives no scores for split '{missing[0]}'")
    for split, metrics in scores.metrics.items():
        if set(metrics) != declared:
            odd = sorted(set(metrics) ^ declared)
            raise UpbenchError(
                f"task '{task.name}' and its scores on '{split}' disagree about {', '.join(odd)}"
            )
