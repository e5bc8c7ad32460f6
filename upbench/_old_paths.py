"""Module paths of the first edition, for plugins that were written for it.

`PATHS` says where the contents of a module went. Importing one of these paths gives a module whose attributes
are looked up there when they are asked for, so that the classes are the same objects under both paths.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from upbench.errors import UpbenchError

PATHS: dict[str, tuple[str, ...]] = {
    old: tuple(f"upbench.{place}" for place in places.split())
    for old, places in {
        "upbench.base": "contracts.upsampler contracts.task contracts.sample contracts.image",
        "upbench.plugin": "contracts.registered",
        "upbench.datasets.base": "contracts.dataset contracts.sample system.cache",
        "upbench.backbones": "features.backbones contracts.backbone",
        "upbench.packaged": "features.packaged",
        "upbench.upsampled": "dense.view",
        "upbench.store": "dense.spill",
        "upbench.streaming": "dense.tiles",
        "upbench.cameras": "dense.camera",
        "upbench.probes": "evaluate.probe",
        "upbench.protocol": "contracts.protocol",
        "upbench.macs": "cost.macs contracts.upsampler",
        "upbench.peakmemory": "cost.peakmemory contracts.upsampler",
        "upbench.profiling": "cost.profile",
        "upbench.records": "results.records",
        "upbench.report": "results.report",
        "upbench.config": "run.config results.cell registry contracts.weights",
        "upbench.plan": "run.plan run.jobs",
        "upbench.work": "run.worker run.costs run.describe",
        "upbench.runner": "run.loop",
        "upbench.executors": "run.executors",
        "upbench.listing": "cli.inventory.listing",
        "upbench.sources": "system.sources",
        "upbench.checkpoint": "system.checkpoint",
        "upbench.download": "system.download",
        "upbench.cache": "system.cache",
        "upbench.progress": "system.progress",
        "upbench.environment": "system.environment",
        "upbench.allocator": "system.allocator",
        "upbench.traindata": "train.views",
        "upbench.trainconfig": "train.config",
        "upbench.modelcard": "train.card",
        "upbench.ops.windows": "ops.window.tables",
        "upbench.ops.backends": "ops.window.backends",
        "upbench.ops.natten_window": "ops.window.natten_window",
        "upbench.ops.triton_window": "ops.window.triton_window",
        "upbench.ops.triton_kernels": "ops.window.triton_kernels",
        "upbench.ops.tiled": "ops.window.tiled",
        "upbench.ops.doubling": "ops.window.doubling",
        "upbench.ops.constants": "ops.window.constants",
    }.items()
}

RENAMED = {"upbench.protocol": {"ProbeConfig": "Recipe"}}
"""Path -> name of then -> name of now, of what is still the same thing."""

_PROTOCOLS = "a preset is a protocol now: see upbench.Protocol and upbench.registry.find_protocol"
_METHOD = "a method is called by upbench.dense.method.MethodCall now"
GONE = {
    "upbench.protocol": dict.fromkeys(("Preset", "PRESETS", "find_preset"), _PROTOCOLS),
    "upbench.upsampled": {"Upsampled": "upsampled features are upbench.dense.view.UpsampledSplit now"},
    "upbench.work": {"Samples": "images are upbench.features.images.SplitImages now", "in_dtype": _METHOD},
    "upbench.plan": {"splits": "splits are told by upbench.Dataset.splits now"},
    "upbench.probes": {
        "train_probe": "probes are trained by upbench.evaluate.probe.train_probes now",
        "evaluate": "probes are evaluated by upbench.evaluate.score.evaluate_probes now",
    },
    "upbench.datasets.base": {
        "Fit": "images are cut by upbench.Geometry now, datasets give them as they are"
    },
}
"""Path -> name -> what is there instead of something that no longer is. To ask for it raises `UpbenchError`:
of an AttributeError, `from ... import` would lose the words."""


class _OldModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        places = PATHS[self.__name__]
        if name == "__all__":
            return [each for each in dir(self) if not each.startswith("_")]
        if told := GONE.get(self.__name__, {}).get(name):
            raise UpbenchError(f"there is no {self.__name__}.{name} any more: {told}")
        name = RENAMED.get(self.__name__, {}).get(name, name)
        if not name.startswith("__"):
            for place in places:
                module = importlib.import_module(place)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module '{self.__name__}', now {' and '.join(places)}, has no '{name}'")

    def __dir__(self) -> list[str]:
        modules = map(importlib.import_module, PATHS[self.__name__])
        return sorted({name for module in modules for name in dir(module)})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in PATHS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"Now {' and '.join(PATHS[module.__name__])}."


def install() -> None:
    """Makes the old paths importable, after all that are really there."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
