"""What a cell names, made: its method, its task, the recipe of its probe."""

from __future__ import annotations

from collections.abc import Callable

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.task import Task
from upbench.contracts.upsampler import Upsampler
from upbench.evaluate.protocol import ProbeConfig, find_preset
from upbench.registry import find_method, find_task
from upbench.results.cell import Cell, MethodSpec
from upbench.weights.load import load_method


def splits(dataset: Dataset) -> list[str]:
    """The splits that a cell touches: that of the probe's training, then those of evaluation."""
    return list(dict.fromkeys((dataset.train_split, *dataset.eval_splits)))


def make_task(name: str) -> Task:
    """A task by name."""
    return find_task(name)()


def probe_config(cell: Cell, task: Task) -> ProbeConfig:
    """How a cell's probe is trained: the preset's settings, then the task's, then the user's."""
    return find_preset(cell.preset).probe_for({**task.probe, **cell.probe})


def build_method(
    spec: MethodSpec, channels: int, device: str = "cpu", backbone: Callable[[], Backbone] | None = None
) -> Upsampler:
    """The method of a table's row, with its weights, for features of C channels.

    Args:
        spec: The row.
        channels: C.
        device: Where to put it.
        backbone: Gives the backbone on that device; called only for a method that runs it.
    """
    lent = backbone() if backbone is not None and find_method(spec.name).uses_backbone else None
    return load_method(
        spec.name, weights=spec.weights, channels=channels, device=device, backbone=lent, **spec.options
    )
