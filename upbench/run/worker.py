"""The work of cells, in whichever process an executor chose."""

from __future__ import annotations

import pdb
import time
import traceback
from collections.abc import Iterator
from typing import Any

from upbench.contracts.backbone import Backbone
from upbench.contracts.task import Task
from upbench.errors import UpbenchError, shown
from upbench.features import backbones
from upbench.results.records import Record
from upbench.run.context import DataScope, MethodScope, RunContext
from upbench.run.describe import assemble, checked, describe_error
from upbench.run.jobs import Job, PlannedCell, settings_kept


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
        """Each cell's record, as soon as there is one; an error in a cell becomes a failed record.

        So does a plugin's `sys.exit`, or whatever else it raises, but for the user's Ctrl-C.
        """
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
            with settings_kept():
                _check_skips(planned)
                context = RunContext(planned, self.data(planned), self.method(planned), tasks)
                scores = checked(planned, planned.task.evaluate(context))
            self._check_shared()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            text = traceback.format_exc()
            if debug:
                print(text)
                pdb.post_mortem(error.__traceback__)
            self._drop_changed()
            seconds = time.perf_counter() - start
            return assemble(planned, "failed", reason=describe_error(error), traceback=text, seconds=seconds)
        return assemble(planned, "ok", scores=scores, seconds=time.perf_counter() - start)

    def _check_shared(self) -> None:
        """Raises UpbenchError where the latest cell has changed what others use, too."""
        if self._data is not None:
            self._data[1].check()

    def _drop_changed(self) -> None:
        """Lets go of what a cell has changed: the next one has it made anew."""
        try:
            self._check_shared()
        except UpbenchError:
            self._method = self._data = self._backbone = None


def _check_skips(planned: PlannedCell) -> None:
    """Raises what a plugin's `skip_reason` raised while the run was planned, so that its cell tells."""
    for plugin, given in (
        (planned.method, (planned.setting,)),
        (planned.task, (planned.dataset, planned.protocol)),
    ):
        reason: Any = plugin.skip_reason(*given)  # type: ignore[attr-defined]
        if reason is not None and not isinstance(reason, str):
            raise TypeError(f"skip_reason of '{plugin.name}' must give text or None, got {shown(reason)}")
