"""upbench: feature upsamplers crossed with tasks, under one protocol.

The names below are imported when they are first used: `import upbench` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Camera": "upbench.base",
    "Evaluator": "upbench.base",
    "Metric": "upbench.base",
    "Setting": "upbench.base",
    "Task": "upbench.base",
    "Upsampler": "upbench.base",
    "Backbone": "upbench.backbones",
    "load_backbone": "upbench.backbones",
    "Dataset": "upbench.datasets.base",
    "Sample": "upbench.datasets.base",
    "UpbenchError": "upbench.errors",
    "RunConfig": "upbench.config",
    "Record": "upbench.records",
    "read_records": "upbench.records",
    "open_dataset": "upbench.registry",
    "plugins": "upbench.registry",
    "run": "upbench.runner",
    "upsample_tiles": "upbench.streaming",
    "upsample_to": "upbench.streaming",
    "Weights": "upbench.weights",
    "load_method": "upbench.weights",
}

__all__ = [
    "Backbone",
    "Camera",
    "Dataset",
    "Evaluator",
    "Metric",
    "Record",
    "RunConfig",
    "Sample",
    "Setting",
    "Task",
    "UpbenchError",
    "Upsampler",
    "Weights",
    "__version__",
    "load_backbone",
    "load_method",
    "open_dataset",
    "plugins",
    "read_records",
    "run",
    "upsample_tiles",
    "upsample_to",
]

if TYPE_CHECKING:
    from upbench.backbones import Backbone, load_backbone
    from upbench.base import Camera, Evaluator, Metric, Setting, Task, Upsampler
    from upbench.config import RunConfig
    from upbench.datasets.base import Dataset, Sample
    from upbench.errors import UpbenchError
    from upbench.records import Record, read_records
    from upbench.registry import open_dataset, plugins
    from upbench.runner import run
    from upbench.streaming import upsample_tiles, upsample_to
    from upbench.weights import Weights, load_method


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'upbench' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
