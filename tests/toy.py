"""The toy world of `toy_plugin.py`: what the fixture `toy` gives to a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Task
from upbench.contracts.upsampler import Upsampler
from upbench.cost import measure as cost
from upbench.features import backbones
from upbench.registry import load_plugin_file, plugins
from upbench.run.config import RunConfig

PLUGIN = Path(__file__).with_name("toy_plugin.py")

DRIVER = """
import sys
from upbench.registry import load_plugin_file
load_plugin_file(sys.argv.pop(1))
from upbench.cli.dispatch import main
sys.exit(main())
"""


@contextmanager
def world() -> Iterator[None]:
    """Loads the plugin file, and takes away all that it brought."""
    for kind in ("method", "task", "dataset", "protocol"):
        plugins(kind)  # built-ins are there before, and stay
    tables = [root.registered for root in (Upsampler, Task, Dataset, Protocol)]
    before = [dict(table) for table in tables]
    modules = set(sys.modules)
    threads = torch.get_num_threads()
    load, measure = backbones.load_backbone, cost.measure
    try:
        torch.set_num_threads(1)  # tensors this small only wait for one another's threads
        load_plugin_file(PLUGIN)
        yield
    finally:
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:
            if name.startswith("upbench_plugin_"):
                del sys.modules[name]
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
        backbones.load_backbone, cost.measure = load, measure


def config(out: Path, methods: Any = "toy_smooth", **values: Any) -> RunConfig:
    """A run in the toy world that takes a second."""
    defaults = {"tasks": ["seg"], "backbones": ["tiny"], "datasets": ["toy"], "protocol": "tiny", "seeds": 2}
    return RunConfig(
        **{
            **defaults,
            "methods": methods,
            "out": str(out),
            "device": "cpu",
            "plugins": [str(PLUGIN)],
            **values,
        }
    )


def arguments(out: Path, methods: str = "toy_smooth", *more: str) -> list[str]:
    """The same as words of a command line."""
    words = f"run --methods {methods} --tasks seg --backbones tiny --datasets toy --protocol tiny --seeds 2"
    return [*words.split(), "--out", str(out), "--device", "cpu", "--plugin", str(PLUGIN), *more]


def process(words: list[str], **environ: str) -> subprocess.Popen[str]:
    """The command line in the toy world, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(PLUGIN), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def find(name: str, kind: str = "method") -> Any:
    """A plugin of the toy world (or any other)."""
    return plugins(kind)[name]
