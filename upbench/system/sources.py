"""Which source files a plugin's numbers depend on: its own, and the shared layers and operations it uses."""

from __future__ import annotations

import ast
import hashlib
import inspect
from functools import cache
from pathlib import Path

from upbench._old_paths import PATHS

_CORE = Path(__file__).parents[1]
_SHARED = ("upbench.layers", "upbench.ops", "upbench.contracts.operator")


def source_files(cls: type) -> tuple[Path, ...]:
    """The file that a class was written in, then the modules of `upbench.layers` and `upbench.ops` that it
    imports, directly or through one another; empty where the class has no file."""
    try:
        own = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return ()
    if not own.is_file():
        return ()
    shared: dict[Path, None] = {}
    waiting = [own]
    while waiting:
        for file in _imported(waiting.pop()):
            if file not in shared:
                shared[file] = None
                waiting.append(file)
    return (own, *sorted(shared))


def source_fingerprint(cls: type) -> str | None:
    """SHA-256 over `source_files`; None where there is none."""
    files = source_files(cls)
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _imported(file: Path) -> tuple[Path, ...]:
    """Files of the shared modules that a file imports, functions included."""
    found: dict[Path, None] = {}
    for node in ast.walk(ast.parse(file.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            for place in PATHS.get(name, (name,)):
                if place.startswith(_SHARED):
                    file = _CORE.joinpath(*place.split(".")[1:])
                    for candidate in (file.with_suffix(".py"), file / "__init__.py"):
                        if candidate.is_file():
                            found[candidate] = None
    return tuple(found)
