"""The work of cells: features, upsampling, probes. Runs in whichever process an executor chose.

What cells share is made once: a `Worker` keeps the latest of each kind (backbone, split, method, upsampled
view), and jobs come in an order in which that is enough.
"""

from __future__ import annotations

import pdb
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from upbench import backbones, cost, environment, features
from upbench.base import Camera, Task, Upsampler
from upbench.config import Cell
from upbench.datasets.base import Dataset, Sample
from upbench.errors import UpbenchError
from upbench.ops.operator import Operator
from upbench.plan import PlannedCell, build_method, make_task, probe_config, splits
from upbench.probes import evaluate, train_probe, training_steps
from upbench.progress import bar
from upbench.protocol import Preset, find_preset
from upbench.records import Record
from upbench.registry import find_method, load_plugin_files, open_dataset
from upbench.upsampled import Upsampled
from upbench.weights import options_unlike_training

T = TypeVar("T")

VIEW_BYTES = 4_500_000_000
"""What all upsampled views of a method may keep. Fixed, as what does not fit is kept in float16."""
SAMPLE_BYTES = 1_500_000_000
"""What all samples of a dataset may keep; those beyond are read anew."""


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

    def backbone(self, name: str, device: str) -> backbones.Backbone:
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


@dataclass(frozen=True)
class CostJob:
    """A measurement of a method's cost, for all cells that share it.

    Attributes:
        planned: One of these cells.
        device: "cpu" or "cuda".
        key: Name of the measurement.
        plugins: Files to load first.
    """

    planned: PlannedCell
    device: str
    key: str
    plugins: Sequence[str] = ()


def cost_key(planned: PlannedCell, device: str) -> str:
    """Name of the measurement of a cell's method on a device."""
    cell, options = planned.cell, dict(planned.cell.method.options)
    options["weights"] = planned.inputs["weights"]["sha256"]  # a checkpoint decides on sizes, too
    return cost.cost_key(
        cell.method.name,
        options,
        **_sizes(planned),
        device=device,
        dtype=cell.dtype,
        backbone=cell.backbone,
    )


def measure_cost(job: CostJob) -> Iterator[dict[str, Any]]:
    """What a method costs, or {"error": why that cannot be told}."""
    load_plugin_files(job.plugins)
    cell = job.planned.cell
    try:
        method = build_method(
            cell.method,
            job.planned.setting.channels,
            backbone=lambda: backbones.load_backbone(cell.backbone, job.device),
        )
        yield cost.measure(method, **_sizes(job.planned), device=job.device, dtype=cell.dtype).to_dict()
    except Exception as error:
        yield {"error": describe_error(error)}


def _sizes(planned: PlannedCell) -> dict[str, Any]:
    setting = planned.setting
    return {
        "channels": setting.channels,
        "image_size": setting.image_size,
        "feature_size": setting.feature_size,
        "output_size": setting.output_size,
    }


class Samples(Sequence[Sample]):
    """The samples of a split at one size, read when asked for and kept while they fit a budget."""

    def __init__(self, dataset: Dataset, split: str, size: int, limit: int | None, budget: int) -> None:
        """Args: as `Dataset.load`; limit: at most so many; budget: bytes to keep samples in."""
        self._dataset, self._split, self._size = dataset, split, size
        self._length = len(dataset.names(split)[:limit])
        self._budget = budget
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self._length:
            raise IndexError(index)
        sample = self._kept.get(index)
        if sample is None:
            sample = self._dataset.load(self._split, index, self._size)
            size = sum(part.nbytes for part in vars(sample).values() if isinstance(part, Tensor))
            if size <= self._budget:
                self._budget -= size
                self._kept[index] = sample
        return sample


class _InDtype(Upsampler):
    """A method that works in another dtype inside, and in float32 to the outside."""

    def __init__(self, method: Upsampler, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.method = method.to(dtype)
        self.dtype = dtype
        self.__dict__.update(name=method.name, uses_camera=method.uses_camera)

    def normalize(self, image01: Tensor) -> Tensor:
        return self.method.normalize(image01)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int], **camera: Any) -> Tensor:
        out: Tensor = self.method(self._image(image), features.to(self.dtype), output_size, **camera)
        return out.to(features.dtype)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Operator | None:
        operator = self.method.operator(self._image(image), features.to(self.dtype), output_size, camera)
        return operator if operator is None else operator.to(torch.float32)

    def _image(self, image: Tensor) -> Tensor:
        return image if self.method.precise_image else image.to(self.dtype)


def in_dtype(method: Upsampler, dtype: torch.dtype) -> Upsampler:
    """The method itself for float32, else a module that runs it in `dtype` on float32 inputs and outputs."""
    return method if dtype == torch.float32 else _InDtype(method, dtype).eval()


def describe_error(error: BaseException) -> str:
    """An error in one line; its type where it was not foreseen."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UpbenchError) else f"{type(error).__name__}: {text}"


def protocol_of(cell: Cell, task: Task) -> dict[str, Any]:
    """What a record says about the protocol."""
    preset: Preset = find_preset(cell.preset)
    return {
        "name": preset.protocol,
        "version": preset.version,
        "image_size": preset.image_size,
        "output_size": preset.output_size,
        "probe": vars(probe_config(cell, task)),
    }


def about(method: str) -> dict[str, Any]:
    """What a table says about a method beside its numbers."""
    cls = find_method(method)
    return {
        "title": cls.title or method,
        "paper": cls.paper,
        "year": cls.year,
        "licence": cls.licence,
        "native_ratio": cls.native_ratio,
    }


def columns(task: Task) -> list[Mapping[str, Any]]:
    """A task's metrics as records hold them, the primary one first."""

    ordered = sorted(task.metrics, key=lambda metric: metric.name != task.primary)
    main = {task.primary, *(task.headline or [metric.name for metric in ordered[:2]])}
    return [{**vars(metric), "main": metric.name in main} for metric in ordered]


def warnings_of(cell: Cell) -> list[str]:
    """What a reader of a cell's numbers must know."""
    found = []
    if cell.limit is not None:
        found.append(f"only the first {cell.limit} images of every split (--limit): not for reporting")
    if cell.probe:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(cell.probe.items()))
        found.append(f"probe settings differ from the protocol: {settings}")
    if cell.method.weights == "none":
        found.append("random weights")
    elif cell.method.options:
        cls = find_method(cell.method.name)
        unlike = options_unlike_training(cls, cell.method.weights, cell.method.options)
        if unlike:
            texts = [f"{name}={asked} (trained with {trained})" for name, (asked, trained) in unlike.items()]
            found.append(f"not retrained for {', '.join(texts)}")
    if smaller := budget_of(cell):
        settings = ", ".join(f"{key}={value}" for key, value in sorted(smaller.items()))
        found.append(f"options of the preset '{cell.preset}', not the method's own: {settings}")
    return found


def budget_of(cell: Cell) -> dict[str, Any]:
    """The options of a cell's method that are as the preset has them (`Upsampler.preset_options`)."""
    options = find_method(cell.method.name).preset_options.get(cell.preset, {})
    return {key: value for key, value in options.items() if cell.method.options.get(key) == value}
