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

PATHS: dict[str, tuple[str, ...]] = {
    old: tuple(f"upbench.{place}" for place in places.split())
    for old, places in {
        "upbench.base": "contracts.upsampler contracts.task contracts.sample contracts.image",
        "upbench.plugin": "contracts.registered",
        "upbench.datasets.base": "contracts.dataset contracts.sample datasets._geometry system.cache",
        "upbench.backbones": "features.backbones contracts.backbone",
        "upbench.packaged": "features.packaged",
        "upbench.upsampled": "dense.view",
        "upbench.store": "dense.spill",
        "upbench.streaming": "dense.tiles",
        "upbench.cameras": "dense.camera",
        "upbench.probes": "evaluate.probe",
        "upbench.protocol": "evaluate.protocol",
        "upbench.macs": "cost.macs contracts.upsampler",
        "upbench.peakmemory": "cost.peakmemory contracts.upsampler",
        "upbench.profiling": "cost.profile",
        "upbench.records": "results.records",
        "upbench.report": "results.report",
        "upbench.config": "run.config results.cell registry contracts.weights",
        "upbench.plan": "run.plan run.build",
        "upbench.work": "run.worker run.costs run.samples run.describe dense.precision",
        "upbench.runner": "run.loop",
        "upbench.executors": "run.executors",
        "upbench.listing": "cli.listing",
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


class _OldModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        places = PATHS[self.__name__]
        if name == "__all__":
            return [each for each in dir(self) if not each.startswith("_")]
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
