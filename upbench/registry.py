"""Finds plugins: built-ins, entry points, files. Knows none by name and imports no torch by itself."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import UpbenchError, named, system_errors, unknown
from upbench.values import existing_file, existing_folder

if TYPE_CHECKING:
    from upbench.contracts.dataset import Dataset
    from upbench.contracts.protocol import Protocol
    from upbench.contracts.task import Task
    from upbench.contracts.upsampler import Upsampler

# kind -> (module and attribute of the root class, package of the built-ins, entry-point group)
_KINDS = {
    "method": ("upbench.contracts.upsampler", "Upsampler", "upbench.methods", "upbench.methods"),
    "task": ("upbench.contracts.task", "Task", "upbench.tasks", "upbench.tasks"),
    "dataset": ("upbench.contracts.dataset", "Dataset", "upbench.datasets", "upbench.datasets"),
    "protocol": ("upbench.contracts.protocol", "Protocol", "upbench.protocols", "upbench.protocols"),
}


def load_plugin_file(path: str | Path) -> None:
    """Executes a Python file whose classes register themselves; a second call for the same file does nothing.

    Raises:
        UpbenchError: The file is missing, is not Python, raises on import, or registers nothing.
    """
    file = existing_file("plugin file", path)
    if file.suffix != ".py":
        raise UpbenchError(f"plugin file must end in .py: {path}")
    with system_errors("read plugin file", path):
        file = file.resolve()
        file.read_bytes()
    name = f"upbench_plugin_{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {kind: plugins(kind) for kind in _KINDS}  # built-ins first: a clash is then the file's fault
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        if all(_table(kind) == before[kind] for kind in _KINDS):
            raise UpbenchError(
                f"plugin file {path} registers nothing: it needs a subclass of upbench.Upsampler, "
                "Task, Dataset or Protocol with a 'name'"
            )
    except BaseException as error:
        del sys.modules[name]
        for kind, table in before.items():  # a file that failed halfway leaves no plugin behind
            live = _table(kind)
            live.clear()
            live.update(table)
        if isinstance(error, (UpbenchError, KeyboardInterrupt)):
            raise
        text = " ".join(str(error).split())
        raise UpbenchError(f"plugin file {path} raises {type(error).__name__} on import: {text}") from error


def load_plugin_files(paths: Iterable[str | Path]) -> None:
    """`load_plugin_file` for each of them."""
    for path in paths:
        load_plugin_file(path)


def _root(kind: str) -> Any:
    module, attribute, _, _ = _KINDS[kind]
    return getattr(importlib.import_module(module), attribute)


def _table(kind: str) -> dict[str, Any]:
    table: dict[str, Any] = _root(kind).registered
    return table


@cache
def _discover(kind: str) -> None:
    """Imports the built-ins and the entry points of a kind, once a process."""
    _, _, package, group = _KINDS[kind]
    try:
        parent = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UpbenchError(
            f"package '{package}' is missing: install the project (pip install -e .)"
        ) from error
    _import_modules(package, parent.__path__)
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        try:
            point.load()
        except UpbenchError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            raise UpbenchError(
                f"entry point '{point.name}' of group {group} ({point.value}) raises "
                f"{type(error).__name__}: {text}"
            ) from error


def _import_modules(package: str, path: Iterable[str]) -> None:
    """Imports the modules of a package, and of those in it, but for private ones; in alphabetical order."""
    for module in sorted(pkgutil.iter_modules(path), key=lambda m: m.name):
        if not module.name.startswith("_"):
            found = importlib.import_module(f"{package}.{module.name}")
            if module.ispkg:
                _import_modules(found.__name__, found.__path__)


def plugins(kind: str) -> dict[str, Any]:
    """Every plugin of a kind ("method", "task", "dataset", "protocol") by name, in alphabetical order."""
    _discover(kind)
    return dict(sorted(_table(kind).items()))


def find(kind: str, name: str) -> Any:
    """The plugin of that name, or of which it is an alias.

    Raises:
        UpbenchError: There is none; the nearest name is suggested.
    """
    table = plugins(kind)
    if name in table:
        return table[name]
    aliases = {alias: cls for cls in table.values() for alias in getattr(cls, "other_names", ())}
    if name not in aliases:
        raise unknown(kind, name, [*table, *aliases], f"see 'upbench list {kind}s'")
    return aliases[name]


def find_method(name: str) -> type[Upsampler]:
    """The method (a subclass of `Upsampler`) of that name; errors as `find`."""
    return find("method", name)  # type: ignore[no-any-return]


def find_task(name: str) -> type[Task]:
    """The task of that name; errors as `find`."""
    return find("task", name)  # type: ignore[no-any-return]


def find_dataset(name: str) -> type[Dataset]:
    """The dataset of that name; errors as `find`."""
    return find("dataset", name)  # type: ignore[no-any-return]


def find_protocol(name: str) -> type[Protocol]:
    """The protocol of that name; errors as `find`."""
    return find("protocol", name)  # type: ignore[no-any-return]


def open_dataset(spec: str) -> Dataset:
    """The dataset that `NAME` or `NAME:FOLDER` stands for (`NAME:FILE`, for some).

    Raises:
        UpbenchError: Unknown name, or a folder that is needed, missing, or not such a dataset.
    """
    name, _, folder = spec.partition(":")
    cls = find_dataset(name)
    root = Path(folder) if folder else None
    data = os.environ.get("UPBENCH_DATA")
    if root is None and cls.needs_root and data and cls.place == "folder":
        own = Path(data) / name
        root = own if own.is_dir() or not cls.folder else Path(data) / cls.folder
    if root is None and cls.needs_root:
        where = "/path, or set UPBENCH_DATA" if cls.place == "folder" else cls.place.upper()
        raise UpbenchError(f"dataset '{name}' needs its {cls.place}: write {name}:{where}")
    if root is not None and cls.place == "folder":
        root = existing_folder("dataset folder", root)
    elif root is not None and cls.place == "file":
        root = existing_file("dataset file", root)
    return cls(root)


def match_names(kind: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a name, a wildcard pattern or "all" stands for, in the order of `names`.

    Raises:
        UpbenchError: None matches; the nearest name is suggested.
    """
    names = list(names)
    if pattern in names:
        return [pattern]
    if pattern == "all":
        return names
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        if any(c in pattern for c in "*?["):
            raise UpbenchError(
                f"no {kind} matches {named(pattern)}; known: {', '.join(sorted(names)) or 'none'}"
            )
        raise unknown(kind, pattern, names, f"see 'upbench list {kind}s'")
    return found
