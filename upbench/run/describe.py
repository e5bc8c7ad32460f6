"""What a record says beside its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upbench.contracts.task import Task
from upbench.errors import UpbenchError
from upbench.evaluate.protocol import Preset, find_preset
from upbench.registry import find_method
from upbench.results.cell import Cell
from upbench.run.build import probe_config
from upbench.weights.load import options_unlike_training


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
