"""upbench: feature upsamplers crossed with tasks, under one protocol.

The names below are imported when they are first used: `import upbench` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from upbench._old_paths import PATHS, install
from upbench._version import __version__

install()

_LAZY = {
    "Camera": "upbench.contracts.sample",
    "Context": "upbench.contracts.task",
    "Evaluator": "upbench.contracts.task",
    "Archive": "upbench.contracts.dataset",
    "Frame": "upbench.contracts.geometry",
    "Framed": "upbench.contracts.sample",
    "Geometry": "upbench.contracts.geometry",
    "Metric": "upbench.contracts.task",
    "NativeAspect": "upbench.protocols.geometry",
    "Output": "upbench.contracts.protocol",
    "PaddedSquare": "upbench.protocols.geometry",
    "Pair": "upbench.contracts.dataset",
    "PairDataset": "upbench.contracts.dataset",
    "ProbeTask": "upbench.evaluate.task",
    "Protocol": "upbench.contracts.protocol",
    "Recipe": "upbench.contracts.protocol",
    "Scores": "upbench.contracts.task",
    "Scoring": "upbench.contracts.protocol",
    "SquareCrop": "upbench.protocols.geometry",
    "Squash": "upbench.protocols.geometry",
    "Truth": "upbench.contracts.task",
    "VideoDataset": "upbench.contracts.dataset",
    "Windows": "upbench.protocols.geometry",
    "load_records": "upbench.results.records",
    "Setting": "upbench.contracts.upsampler",
    "Task": "upbench.contracts.task",
    "Upsampler": "upbench.contracts.upsampler",
    "Backbone": "upbench.contracts.backbone",
    "load_backbone": "upbench.features.backbones",
    "Dataset": "upbench.contracts.dataset",
    "Sample": "upbench.contracts.sample",
    "UpbenchError": "upbench.errors",
    "RunConfig": "upbench.run.config",
    "Record": "upbench.results.records",
    "read_records": "upbench.results.records",
    "open_dataset": "upbench.registry",
    "plugins": "upbench.registry",
    "run": "upbench.run",
    "upsample_tiles": "upbench.dense.tiles",
    "upsample_to": "upbench.dense.tiles",
    "Weights": "upbench.contracts.weights",
    "load_method": "upbench.weights.load",
}

__all__ = [
    "Archive",
    "Backbone",
    "Camera",
    "Context",
    "Dataset",
    "Evaluator",
    "Frame",
    "Framed",
    "Geometry",
    "Metric",
    "NativeAspect",
    "Output",
    "PaddedSquare",
    "Pair",
    "PairDataset",
    "ProbeTask",
    "Protocol",
    "Recipe",
    "Record",
    "RunConfig",
    "Sample",
    "Scores",
    "Scoring",
    "Setting",
    "SquareCrop",
    "Squash",
    "Task",
    "Truth",
    "UpbenchError",
    "Upsampler",
    "VideoDataset",
    "Weights",
    "Windows",
    "__version__",
    "load_backbone",
    "load_method",
    "load_records",
    "open_dataset",
    "plugins",
    "read_records",
    "run",
    "upsample_tiles",
    "upsample_to",
]

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone
    from upbench.contracts.dataset import Archive, Dataset, Pair, PairDataset, VideoDataset
    from upbench.contracts.geometry import Frame, Geometry
    from upbench.contracts.protocol import Output, Protocol, Recipe, Scoring
    from upbench.contracts.sample import Camera, Framed, Sample
    from upbench.contracts.task import Context, Evaluator, Metric, Scores, Task, Truth
    from upbench.contracts.upsampler import Setting, Upsampler
    from upbench.contracts.weights import Weights
    from upbench.dense.tiles import upsample_tiles, upsample_to
    from upbench.errors import UpbenchError
    from upbench.evaluate.task import ProbeTask
    from upbench.features.backbones import load_backbone
    from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Squash, Windows
    from upbench.registry import open_dataset, plugins
    from upbench.results.records import Record, load_records, read_records
    from upbench.run.config import RunConfig
    from upbench.run.loop import run
    from upbench.weights.load import load_method


def __getattr__(name: str) -> Any:
    if name == "run" or f"upbench.{name}" in PATHS:  # `upbench.run` is a package that can be called
        return importlib.import_module(f"upbench.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'upbench' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
