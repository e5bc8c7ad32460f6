"""Which source files a number depends on: those that a class is written in, and what they import.

The code that something is fingerprinted by is read from the imports, so that no list of files has to be kept:
a new module counts from the moment that it is imported. Modules in which no number is made do not count
(`APART`).

Of a plugin from elsewhere its own package counts, or the files beside it. What it computes names by (a module
imported under a name that is only known when it runs) is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from upbench._old_paths import PATHS

_CORE = Path(__file__).resolve().parents[1]

APART = (
    *("_lazy", "_old_paths", "_version", "errors", "values", "registry", "cli", "cost", "results"),
    *("testing", "train"),
    *("run.claims", "run.config", "run.costs", "run.describe", "run.executors", "run.loop", "run.plan"),
    *("run.preview", "export"),
    *("system.progress", "system.environment", "system.download", "system.cache", "system.sources"),
    *("system.outputs", "system.reading", "system.yaml_text"),
)
"""Modules and packages of upbench that decide how and when something is computed, and never what. What
`run.plan` decides on stands in a cell's inputs by its value."""

Sourced = Callable[..., Any]
"""A class or a function."""


def source_files(*classes: Sourced) -> tuple[Path, ...]:
    """The files that classes were written in, then the modules that they import, directly or through one
    another. Empty where no class has a file. Imports for type checkers do not count."""
    own = [file for cls in classes if (file := _file(cls)) is not None]
    return closure(*own)


def closure(*files: Path) -> tuple[Path, ...]:
    """Files, then all modules that they import, directly or through one another."""
    found: dict[Path, None] = {}
    waiting = list(files)
    while waiting:
        latest = waiting.pop()
        for file in _imported(latest, latest.read_bytes()):
            if file not in found and file not in files:
                found[file] = None
                waiting.append(file)
    return (*dict.fromkeys(files), *sorted(found))


def source_fingerprint(*classes: Sourced) -> str | None:
    """SHA-256 over `source_files`; None where there is none."""
    files = source_files(*classes)
    return files_digest(files) if files else None


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def code_digest(*classes: Sourced) -> str:
    """A digest over what classes' files, and modules of the same folder that they import, *do*: comments,
    docstrings and layout play no part.

    For caches that are dear to fill: a reworded docstring must not compute features again.
    """
    digest = hashlib.sha256()
    for cls in classes:
        file = _file(cls)
        files = [] if file is None else [f for f in closure(file) if f.parent == file.parent]
        for each in files:
            digest.update(_statements(each.read_bytes()))
        digest.update(b"?" if file is None else b";")
    return digest.hexdigest()[:16]


def _file(cls: Sourced) -> Path | None:
    """The file that a class was written in, or None."""
    try:
        file = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return None
    return file if file.is_file() else None


@lru_cache(maxsize=1024)
def _statements(source: bytes) -> bytes:
    """A module without its comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


@lru_cache(maxsize=1024)
def _imported(file: Path, source: bytes) -> tuple[Path, ...]:
    """Modules that a file with this content imports when it runs, functions included."""
    nodes = list(_that_run(ast.parse(source)))
    modules: dict[str, str] = {}  # what a module is called here -> its path
    found: dict[Path, None] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.update(dict.fromkeys(_module_files(alias.name, file)))
                first = alias.name.partition(".")[0]
                modules[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            for alias in node.names:
                found.update(dict.fromkeys(_name_files(module, alias.name, file)))
                modules[alias.asname or alias.name] = f"{module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and (path := _dotted(node, modules)):
            found.update(dict.fromkeys(_path_files(path, file)))
    return tuple(found)


def _that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for type checkers."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _dotted(node: ast.Attribute, modules: dict[str, str]) -> str:
    """The path of `module.name`, of a module that was imported; "" for any other attribute."""
    names: list[str] = []
    inner: ast.AST = node
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name) or inner.id not in modules:
        return ""
    return ".".join([modules[inner.id], *reversed(names)])


def _path_files(path: str, file: Path) -> tuple[Path, ...]:
    """Files behind `upbench.a.b.NAME.attribute`, as far as it leads through modules."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        if module == "upbench" or _module_files(module, file):
            return _name_files(module, parts[cut], file)
    return ()


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """The module of `from MODULE import ...`, also where that is relative."""
    if not node.level:
        return node.module or ""
    package, _ = _package(file)
    above = package[: len(package) - node.level + 1]
    return ".".join([*above, node.module] if node.module else above)


def _package(file: Path) -> tuple[list[str], Path]:
    """Names of the package that a file is in, from the outermost, and the folder that this one is in."""
    for name in ("upbench.methods", "upbench.tasks"):  # packages of their own beside upbench
        if file.is_relative_to(root := _folder(name)):
            return [*name.split("."), *file.relative_to(root).parts[:-1]], _CORE.parent
    if file.is_relative_to(_CORE):
        return ["upbench", *file.relative_to(_CORE).parts[:-1]], _CORE.parent
    names: list[str] = []
    folder = file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return names, folder


def _name_files(module: str, name: str, file: Path) -> tuple[Path, ...]:
    """Files behind `from MODULE import NAME`, which stands in `file`."""
    if files := _module_files(f"{module}.{name}", file):
        return files
    if module in PATHS:
        return _handed_on(module, name)
    own = _module_files(module, file)
    if module == "upbench" or (_counts(module) and own and own[0].name == "__init__.py"):
        return (*own, *_handed_on(module, name))
    return own


def _handed_on(module: str, name: str) -> tuple[Path, ...]:
    """Files that a package of upbench, or a path of the first edition, has a name from; all that it has any
    from where that cannot be told."""
    places: Iterable[str]
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        value = None
    if inspect.ismodule(value):
        places = [value.__name__]
    elif inspect.isclass(value) or inspect.isfunction(value):
        places = [value.__module__]
    elif module in PATHS:
        places = PATHS[module]
    else:
        tree = ast.parse((_folder(module) / "__init__.py").read_bytes())
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        places = [text for text in texts if isinstance(text, str)]
    return tuple(file for place in places if place != module for file in _module_files(place, None))


def _module_files(module: str, file: Path | None) -> tuple[Path, ...]:
    """The file of a module that counts (files, of a path of the first edition); nothing for any other.

    Args:
        module: By its path.
        file: Where it is imported, for modules that are not upbench's.
    """
    if module in PATHS:
        return tuple(found for place in PATHS[module] for found in _module_files(place, None))
    if module.partition(".")[0] == "upbench":
        place = _folder(module) if _counts(module) else None
    else:
        place = _elsewhere(module, file) if file is not None else None
    if place is None:
        return ()
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return tuple(candidate for candidate in candidates if candidate.is_file())[:1]


def _elsewhere(module: str, file: Path) -> Path | None:
    """Where a module of a plugin is, without the suffix: one of the same package, or a file beside it. None
    for any other, such as what is installed."""
    names, above = _package(file)
    parts = module.split(".")
    place = above.joinpath(*parts)
    if not all(parts):
        return None
    if names:
        return place if parts[0] == names[0] else None
    return place if len(parts) == 1 and not place.is_dir() else None


def _folder(module: str) -> Path:
    """Where a module of upbench is, without the suffix."""
    parts = module.split(".")[1:]
    if parts[:1] in (["methods"], ["tasks"]):
        package = importlib.import_module(f"upbench.{parts[0]}")
        return Path(next(iter(package.__path__))).joinpath(*parts[1:])
    return _CORE.joinpath(*parts)


def _counts(module: str) -> bool:
    if not module.startswith("upbench."):
        return False
    rest = module.removeprefix("upbench.")
    return not any(rest == room or rest.startswith(f"{room}.") for room in APART)
