"""What is registered in a test is gone after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Task
from upbench.contracts.upsampler import Upsampler
from upbench.registry import plugins


@contextmanager
def restored() -> Iterator[None]:
    """Takes away the plugins of every kind, and the plugin files, that were loaded within it."""
    for kind in ("method", "task", "dataset", "protocol"):
        plugins(kind)  # built-ins are there before, and stay
    tables = [root.registered for root in (Upsampler, Task, Dataset, Protocol)]
    before, modules = [dict(table) for table in tables], set(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - modules:
            if name.startswith("upbench_plugin_"):
                del sys.modules[name]
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)
