"""What is handed to whoever does the work: cells whose every name was looked up, jobs of several of them, and
how a cell's method is made."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Task
from upbench.contracts.upsampler import Setting, Upsampler
from upbench.registry import load_plugin_files
from upbench.results.cell import Cell
from upbench.weights.load import load_resolved
from upbench.weights.resolve import ResolvedWeights


@dataclass(frozen=True)
class PlannedCell:
    """A cell that was looked at: what its names stand for.

    Attributes:
        cell: The cell, by names.
        method: The method's class.
        weights: Its weights, found and hashed.
        task: What is evaluated.
        protocol: Under which rules.
        dataset: On what.
        setting: Sizes and channels that the method meets.
        place: Where to compute, as in "cuda:1".
        inputs: Fingerprints of what goes into it: while they are the same, its record holds.
        data: What is seen of each split; see `Record.data`.
        row: What tables call the row.
        skip: Why it cannot be had, in words; "" where it can.
    """

    cell: Cell
    method: type[Upsampler]
    weights: ResolvedWeights
    task: Task
    protocol: Protocol
    dataset: Dataset
    setting: Setting
    place: str = "cpu"
    inputs: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    row: str = ""
    skip: str = ""

    @property
    def splits(self) -> list[str]:
        """The splits that it touches: that of the training, then those of the evaluation."""
        return self.dataset.splits

    @property
    def shares(self) -> tuple[object, ...]:
        """Cells of equal value share images and low-resolution features."""
        cell = self.cell
        return cell.backbone, cell.dataset, cell.data, cell.protocol, cell.limit, self.place


@dataclass(frozen=True)
class Job:
    """Cells that share a backbone, a dataset, a protocol and a method, and differ in their task.

    Attributes:
        cells: The cells.
        plugins: Files to load before anything is unpickled: cells hold classes from them.
        debug: Whether to open a debugger where a cell fails.
    """

    cells: Sequence[PlannedCell]
    plugins: Sequence[str] = ()
    debug: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {"plugins": tuple(self.plugins), "debug": self.debug, "cells": pickle.dumps(tuple(self.cells))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        load_plugin_files(state["plugins"])
        put = object.__setattr__
        put(self, "plugins", state["plugins"])
        put(self, "debug", state["debug"])
        put(self, "cells", pickle.loads(state["cells"]))


def build_method(
    planned: PlannedCell, backbone: Backbone | None = None, device: str | None = None
) -> Upsampler:
    """The method of a cell, with its weights.

    Args:
        planned: The cell.
        backbone: For methods that run it.
        device: Where to put it; the cell's own place by default.
    """
    return load_resolved(
        planned.method,
        planned.weights,
        planned.setting.channels,
        device=device or planned.place,
        options=planned.cell.method.options,
    )


@contextmanager
def settings_kept() -> Iterator[None]:
    """A block that leaves torch's settings as they were, whatever a plugin does to them."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
