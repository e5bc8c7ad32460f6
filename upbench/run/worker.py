"""The work of cells: features, upsampling, probes. Runs in whichever process an executor chose.

What cells share is made once: a `Worker` keeps the latest of each kind (backbone, split, method, upsampled
view), and jobs come in an order in which that is enough.
"""

from __future__ import annotations

import pdb
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import torch

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense.precision import in_dtype
from upbench.dense.view import Upsampled
from upbench.evaluate.probe import evaluate, train_probe, training_steps
from upbench.evaluate.protocol import find_preset
from upbench.features import backbones
from upbench.features import store as features
from upbench.registry import load_plugin_files, open_dataset
from upbench.results.cell import Cell
from upbench.results.records import Record
from upbench.run.build import build_method, make_task, probe_config, splits
from upbench.run.describe import about, columns, describe_error, protocol_of, warnings_of
from upbench.run.plan import PlannedCell
from upbench.run.samples import SAMPLE_BYTES, Samples
from upbench.system import environment
from upbench.system.progress import bar

T = TypeVar("T")

VIEW_BYTES = 4_500_000_000
"""What all upsampled views of a method may keep. Fixed, as what does not fit is kept in float16."""


@dataclass(frozen=True)
class Job:
    """Cells that share a backbone, a dataset and a method, and differ in their task.

    Attributes:
        cells: The cells.
        plugins: Files to load first.
        debug: Whether to open a debugger where a cell fails.
    """

    cells: Sequence[PlannedCell]
    plugins: Sequence[str] = ()
    debug: bool = False


class Worker:
    """Turns jobs into records. Pickles as an empty one: another process makes everything for itself."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Any, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_latest": {}}

    def __call__(self, job: Job) -> Iterator[Record]:
        """Each cell's record, as soon as there is one; an error in a cell becomes a failed record."""
        load_plugin_files(job.plugins)
        for planned in job.cells:
            yield self._record(planned, job.debug)

    def backbone(self, name: str, device: str) -> Backbone:
        """A loaded backbone."""
        return self._keep("backbone", (name, device), lambda: backbones.load_backbone(name, device))

    def features(self, cell: Cell, split: str) -> features.FeatureSet:
        """Low-resolution features of a split, from the cache on disk where they are in it.

        Raises:
            UpbenchError: Features that are not finite, or an image that cannot be read.
        """
        size = find_preset(cell.preset).image_size
        backbone = self.backbone(cell.backbone, cell.device)
        dataset = self.dataset(cell)
        key = (cell.backbone, cell.dataset, split, size, cell.limit)
        return self._keep(
            f"features {split}",
            key,
            lambda: features.cached_features(
                backbone, dataset, split, size, limit=cell.limit, device=cell.device
            ),
        )

    def dataset(self, cell: Cell) -> Dataset:
        """The opened dataset of a cell."""
        return self._keep("dataset", cell.dataset, lambda: open_dataset(cell.dataset))

    def samples(self, cell: Cell, split: str) -> Sequence[Sample]:
        """Ground truth and guidance of a split, at the size of the output."""
        size = find_preset(cell.preset).output_size
        dataset = self.dataset(cell)
        budget = SAMPLE_BYTES // len(splits(dataset))
        key = (cell.dataset, split, size, cell.limit)
        return self._keep(f"samples {split}", key, lambda: Samples(dataset, split, size, cell.limit, budget))

    def upsampled(self, cell: Cell, split: str) -> Upsampled:
        """The method's view of a split, one for all tasks and seeds."""
        low = self.features(cell, split)
        method = self._method(cell, int(low.features.shape[1]))
        what = (cell.backbone, cell.dataset, split, cell.preset, cell.limit)
        key = (cell.method, cell.device, cell.dtype, *what)
        side = find_preset(cell.preset).output_size
        return self._keep(
            f"upsampled {split}",
            key,
            lambda: Upsampled(
                method,
                self.samples(cell, split),
                low.features,
                (side, side),
                camera=cell.method.camera or None,
                device=cell.device,
                budget=VIEW_BYTES // len(splits(self.dataset(cell))),
            ),
        )

    def _keep(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """The latest of its kind if it has this key, else a new one in its place."""
        held = self._latest.get(kind)
        if held is None or held[0] != key:
            self._latest.pop(kind, None)  # the old one goes before the new one comes
            held = self._latest[kind] = (key, make())
        value: T = held[1]
        return value

    def _method(self, cell: Cell, channels: int) -> Upsampler:
        key = (cell.method, cell.backbone, channels, cell.device, cell.dtype)

        def make() -> Upsampler:
            for kind in [kind for kind in self._latest if kind.startswith("upsampled")]:
                del self._latest[kind]  # views of the method before this one
            method = build_method(
                cell.method, channels, cell.device, lambda: self.backbone(cell.backbone, cell.device)
            )
            return in_dtype(method, getattr(torch, cell.dtype))

        return self._keep("method", key, make)

    def skipped(self, planned: PlannedCell) -> Record:
        """The record of a cell that cannot be had."""
        return self._close(planned, {"status": "skipped", "reason": planned.skip}, time.perf_counter())

    def failed(self, planned: PlannedCell, reason: str) -> Record:
        """The record of a cell that was lost with its process."""
        return self._close(planned, {"status": "failed", "reason": reason}, time.perf_counter())

    def _record(self, planned: PlannedCell, debug: bool) -> Record:
        """The record of a cell that is run here and now."""
        start = time.perf_counter()
        try:
            outcome = {"status": "ok", **self._measure(planned.cell)}
        except Exception as error:
            outcome = {
                "status": "failed",
                "reason": describe_error(error),
                "traceback": traceback.format_exc(),
            }
            if debug:
                traceback.print_exc()
                pdb.post_mortem(error.__traceback__)
        return self._close(planned, outcome, start)

    def _close(self, planned: PlannedCell, outcome: dict[str, Any], start: float) -> Record:
        cell = planned.cell
        task = make_task(cell.task)
        seconds = time.perf_counter() - start
        started = datetime.now(timezone.utc) - timedelta(seconds=seconds)
        return Record(
            cell,
            **outcome,
            about=about(cell.method.name),
            columns=columns(task),
            inputs=planned.inputs,
            protocol=protocol_of(cell, task),
            environment=environment.describe(cell.device),
            warnings=warnings_of(cell),
            started=started.isoformat(timespec="milliseconds"),
            seconds=round(seconds, 3),
        )

    def _measure(self, cell: Cell) -> dict[str, Any]:
        """Metrics and per-image values of a cell, over its seeds."""
        task, dataset = make_task(cell.task), self.dataset(cell)
        config = probe_config(cell, task)
        metrics: dict[str, dict[str, list[float]]] = {}
        per_image: dict[str, dict[str, Any]] = {}
        train = self.upsampled(cell, dataset.train_split)
        train_samples = self.samples(cell, dataset.train_split)
        for split in splits(dataset):
            self.upsampled(cell, split).prepare(f"{cell.method.title} · upsampling {split}")
        counts = {split: len(self.samples(cell, split)) for split in dataset.eval_splits}
        steps = len(cell.seeds) * (training_steps(len(train_samples), config) + sum(counts.values()))
        with bar(f"{cell.method.title} · {cell.task}", total=steps) as progress:
            for seed in cell.seeds:
                probe = train_probe(task, dataset, train, train_samples, config, seed, progress)
                for split in dataset.eval_splits:
                    view, samples = self.upsampled(cell, split), self.samples(cell, split)
                    result = evaluate(task, dataset, probe, view, samples, progress)
                    for name, value in result.metrics.items():
                        metrics.setdefault(split, {}).setdefault(name, []).append(float(value))
                    scores = per_image.setdefault(split, {"names": list(result.names), "values": []})
                    scores["values"].append([float(value) for value in result.per_image])
        return {"metrics": metrics, "per_image": per_image}
