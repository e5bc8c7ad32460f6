"""What a run will do: every name and every input looked at before anything is written.

Planning raises on bad input, looks every name up once, decides which cells are skipped and why, and takes the
fingerprints by which a finished cell is known again. What comes out holds objects, not names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Task
from upbench.contracts.upsampler import Setting, Upsampler
from upbench.dense.camera import CameraChoice
from upbench.errors import UpbenchError, printable, unknown
from upbench.features import backbones
from upbench.registry import find_method, find_protocol, find_task, load_plugin_files, open_dataset, plugins
from upbench.results.cell import Cell, MethodSpec
from upbench.run import worker
from upbench.run.config import RunConfig
from upbench.run.describe import row_of
from upbench.run.jobs import PlannedCell, build_method, settings_kept
from upbench.system.cache import digest
from upbench.system.sources import closure, files_digest, source_fingerprint
from upbench.weights.load import images_seen
from upbench.weights.resolve import ResolvedWeights, resolve, weights_reason

T = TypeVar("T")


def make_plan(config: RunConfig, load: Callable[[str, str], Backbone] | None = None) -> list[PlannedCell]:
    """The cells of a run, looked at.

    Args:
        config: As the user gave it, wildcards and all.
        load: Gives the backbone of a name on a device.

    Returns:
        Every cell, part by part, in the order in which they share the most work: the task changes first, the
        backbone last.

    Raises:
        UpbenchError: Anything that is wrong with a name, a plugin file, a checkpoint, a dataset, a protocol
            or the device.
    """
    load_plugin_files(config.plugins)
    cells: dict[str, PlannedCell] = {}
    for part in config.each():
        for planned in _plan(part, load):
            cells.setdefault(planned.cell.key, planned)
    return _shard(list(cells.values()), *config.part())


def _plan(config: RunConfig, load: Callable[[str, str], Backbone] | None) -> Iterator[PlannedCell]:
    """The cells of one part of a run, which share a protocol."""
    named = {spec.name for spec in config.methods}
    config = config.select(plugins("method"), plugins("task"), plugins("dataset"))
    protocol: Protocol = find_protocol(config.protocol)()
    protocol.recipe_for({}, config.probe)
    place = _place(config.device)
    methods = [_method(_with_preset_options(spec, protocol)) for spec in config.methods]
    tasks: list[Task] = [find_task(name)().under(protocol) for name in config.tasks]
    sources = _Sources(protocol)
    datasets = _datasets(config, tasks)
    for name in dict.fromkeys(config.backbones):
        facts = _BackboneFacts.of((load or backbones.load_backbone)(name, place))
        for data in datasets:
            crossing = _Crossing(config, protocol, place, name, facts, data, sources)
            for method, task in itertools.product(methods, tasks):
                if config.datasets or data.spec in task.datasets:
                    yield crossing.cell(method, task, method.spec.name in named)


def groups(plan: list[PlannedCell]) -> Iterator[list[PlannedCell]]:
    """Cells that share a backbone, a dataset, a protocol and a method, in the order of the plan."""
    for _, cells in itertools.groupby(plan, key=lambda planned: (planned.shares, planned.cell.method)):
        yield list(cells)


def _shard(plan: list[PlannedCell], index: int, count: int) -> list[PlannedCell]:
    """Every `count`-th group of the plan: cells that share a method's view stay on one machine."""
    return [p for number, group in enumerate(groups(plan)) if number % count == index - 1 for p in group]


@dataclass(frozen=True)
class _BackboneFacts:
    """What a plan needs to know of a loaded backbone."""

    backbone: Backbone
    channels: int
    stride: int
    patch_size: int | None
    fingerprint: str

    @classmethod
    def of(cls, backbone: Backbone) -> _BackboneFacts:
        return cls(backbone, backbone.channels, backbone.stride, backbone.patch_size, backbone.fingerprint)


@dataclass(frozen=True)
class _Method:
    """A row, looked up."""

    spec: MethodSpec
    cls: type[Upsampler]
    weights: ResolvedWeights
    inputs: Mapping[str, Any]


class _Data:
    """A dataset, opened, with what is to be known of its splits."""

    def __init__(self, spec: str, dataset: Dataset, limit: int | None) -> None:
        self.spec, self.dataset = spec, dataset
        self.facts: dict[str, dict[str, Any]] = {}
        for split in dataset.splits:
            names = dataset.names(split)
            if not names:
                raise UpbenchError(f"split '{split}' of dataset '{dataset.name}' has no images")
            self.facts[split] = {
                "images": len(names[:limit]),
                "available": len(names),
                "official": dataset.counts.get(split),
                "fingerprint": dataset.fingerprint(split),
                "names": digest(*names[:limit]),
            }

    @cached_property
    def digest(self) -> str:
        """Of the content of all splits."""
        return digest(*(f"{split}={facts['fingerprint']}" for split, facts in self.facts.items()))

    @cached_property
    def first_size(self) -> tuple[int, int]:
        """(H, W) of the first training image, for what depends on an image's size."""
        return self.dataset.size(self.dataset.train_split, 0)

    @cached_property
    def has_camera(self) -> bool:
        """Whether its first image has one."""
        return self.dataset.read(self.dataset.train_split, 0).camera is not None


class _Sources:
    """Fingerprints of the code that makes numbers, apart from a method's, a task's and a dataset's."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = source_fingerprint(type(protocol), type(protocol.geometry))
        self.engine = files_digest(closure(Path(worker.__file__), Path(backbones.__file__)))


class _Crossing:
    """A backbone, a dataset and a protocol, to be crossed with methods and tasks."""

    def __init__(
        self,
        config: RunConfig,
        protocol: Protocol,
        place: str,
        name: str,
        facts: _BackboneFacts,
        data: _Data,
        sources: _Sources,
    ) -> None:
        self.config, self.protocol, self.place, self.name = config, protocol, place, name
        self.facts, self.data, self.sources = facts, data, sources
        self._skips: dict[MethodSpec, str] = {}
        try:
            frame = protocol.geometry.frames(data.first_size, facts.stride)[0]
        except UpbenchError as error:
            raise UpbenchError(f"the first image of dataset '{data.dataset.name}': {error}") from error
        height, width = facts.backbone.input_size(*frame.size)
        self.image_size = frame.size
        self.feature_size = (height // facts.stride, width // facts.stride)
        self.output_size = protocol.output.size(frame.size, self.feature_size)

    def cell(self, method: _Method, task: Task, named: bool) -> PlannedCell:
        config, data, sources = self.config, self.data, self.sources
        cell = Cell(
            method=method.spec,
            task=task.name,
            backbone=self.name,
            dataset=data.dataset.name,
            protocol=self.protocol.name,
            seeds=tuple(range(config.seeds)),
            limit=config.limit,
            device=self.place.partition(":")[0],
            dtype=config.dtype,
            probe=config.probe,
            data=data.digest,
        )
        recipe = self.protocol.recipe_for(task.settings().get("probe"), config.probe, data.dataset.name)
        inputs = {
            **method.inputs,
            "task_source": source_fingerprint(type(task)),
            "protocol": self.protocol.label,
            "protocol_source": sources.protocol,
            "dataset": {split: facts["fingerprint"] for split, facts in data.facts.items()},
            "dataset_source": source_fingerprint(type(data.dataset)),
            "backbone": self.facts.fingerprint,
            "engine_source": sources.engine,
            "probe": recipe.to_dict(),
            "sizes": self._sizes(),
        }
        planned = PlannedCell(
            cell,
            method.cls,
            method.weights,
            task,
            self.protocol,
            data.dataset,
            self._setting(method.spec),
            self.place,
            inputs,
            data.facts,
        )
        skip = self._skip(planned, named)
        return replace(planned, row=row_of(planned), skip=skip)

    def _sizes(self) -> dict[str, Any]:
        """What this module decides on: its own code is no part of the fingerprint."""
        return {
            "channels": self.facts.channels,
            "stride": self.facts.stride,
            "patch": self.facts.patch_size,
            "image": list(self.image_size),
            "features": list(self.feature_size),
            "output": list(self.output_size),
        }

    def _setting(self, spec: MethodSpec) -> Setting:
        return Setting(
            backbone=self.name,
            channels=self.facts.channels,
            stride=self.facts.stride,
            image_size=self.image_size,
            feature_size=self.feature_size,
            output_size=self.output_size,
            weights=spec.weights,
            device=self.place.partition(":")[0],
            patch_size=self.facts.patch_size,
        )

    def _skip(self, planned: PlannedCell, named: bool) -> str:
        spec = planned.cell.method
        if spec not in self._skips:
            self._skips[spec] = _skip_method(planned, named)
        if self._skips[spec]:
            return self._skips[spec]
        if reason := _reason(planned.task.skip_reason, planned.dataset, self.protocol):
            return reason
        if self.protocol.layers > 1 and planned.method.uses_backbone:
            return f"{spec.name} runs the backbone itself, and knows its last block only"
        if CameraChoice.parse(spec.camera).dataset and not self.data.has_camera:
            return f"dataset '{planned.dataset.name}' has no cameras"
        return ""


def _datasets(config: RunConfig, tasks: list[Task]) -> list[_Data]:
    """The datasets of a run, opened once each."""
    specs = config.datasets or tuple(dict.fromkeys(name for task in tasks for name in task.datasets))
    return [_Data(spec, open_dataset(spec), config.limit) for spec in specs]


def _with_preset_options(spec: MethodSpec, protocol: Protocol) -> MethodSpec:
    """The row with the options that its method has under a protocol, where the user set none of them."""
    options = find_method(spec.name).preset_options.get(protocol.name, {})
    return replace(spec, options={**options, **spec.options})


def _place(asked: str) -> str:
    """What "auto" stands for here, or the device that was asked for if there is one.

    Raises:
        UpbenchError: A GPU that torch does not see.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda" if count else "cpu"
    if asked.startswith("cuda") and not count:
        raise UpbenchError(f"device '{asked}' asked for, but torch sees no GPU; use 'cpu' or 'auto'")
    number = asked.partition(":")[2]
    if number and int(number) >= count:
        raise unknown("device", asked, ["cpu", *(f"cuda:{i}" for i in range(count))])
    return asked


def _method(spec: MethodSpec) -> _Method:
    """A row looked up, with fingerprints of its code and weights.

    Raises:
        UpbenchError: An option that the method has not, a camera that it does not use, or weights that are
            not there.
    """
    cls = find_method(spec.name)
    cls.check_options(spec.options)
    if spec.camera and not cls.uses_camera:
        raise UpbenchError(f"method '{spec.name}' uses no camera")
    weights = resolve(cls, spec.weights)
    told = {"name": weights.name, "sha256": weights.sha256, "images_seen": images_seen(weights)}
    inputs = {
        "method_source": source_fingerprint(cls),
        "weights": {name: value for name, value in told.items() if value is not None or name == "sha256"},
    }
    return _Method(spec, cls, weights, inputs)


def _reason(skip_reason: Callable[..., Any], *arguments: Any) -> str | None:
    """Why a plugin cannot run, as it says; None where it can, and where it fails to say or says no text: its
    cells then fail (`Worker`)."""
    reason = _asked(lambda: skip_reason(*arguments))
    return printable(reason) or None if isinstance(reason, str) else None


def _skip_method(planned: PlannedCell, named: bool) -> str:
    """Why a method cannot run on a backbone, or "" after its weights were loaded for a test.

    Args:
        planned: A cell of the method and the backbone.
        named: Whether the user named the method, where "all" or another pattern would stand for it. Weights
            that it does not have are then an error, and no reason to skip it.

    Raises:
        UpbenchError: A checkpoint that is corrupt or of another size.
    """
    cls, spec, setting = planned.method, planned.cell.method, planned.setting
    if not named and spec.weights == "default" and cls.trainable and cls.default_weights is None:
        known = next((f", such as {cls.name}:{name}" for name in cls.weights), "")
        return f"no weights come with {cls.name}; it can be run with others{known}"
    reason = _reason(cls.skip_reason, setting) or weights_reason(cls, setting)
    if reason is None:
        _asked(lambda: build_method(planned, device="cpu"))
    return str(reason or "")


def _asked(plugin: Callable[[], T]) -> T | None:
    """What a plugin answers; None where it raises. That is a fault of its own: its cells fail, each with the
    traceback.

    Raises:
        UpbenchError: What the plugin says is the user's to mend.
    """
    try:
        with settings_kept():
            return plugin()
    except (UpbenchError, KeyboardInterrupt):
        raise
    except BaseException:
        return None
