"""The arrows of the house run one way (imports are read from the source, those inside functions too)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own floor and from the floors below it.
FLOORS = [
    {"errors", "plugin", "allocator", "__init__"},
    {"base", "records", "config", "protocol", "metrics", "ops", "layers", "cache", "progress", "environment",
     "checkpoint", "download", "sources", "cameras"},
    {"registry", "backbones", "packaged", "weights", "datasets", "features", "upsampled", "store", "probes",
     "cost", "macs", "peakmemory", "streaming", "export", "train", "traindata", "trainconfig", "modelcard",
     "report", "testing"},
    {"methods", "tasks"},
    {"runner", "executors", "plan", "work", "listing", "profiling"},
    {"cli", "__main__"},
]  # fmt: skip


def floor(room: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"module upbench.{room} stands on no floor: give it one in {Path(__file__).name}")


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every module; a room is a module or package right below `upbench`."""
    found = []
    for file in (ROOT / "upbench").rglob("*.py"):
        first = file.relative_to(ROOT / "upbench").parts[0]
        found.append((first.removesuffix(".py"), file))
    for room in ("methods", "tasks"):
        found += [(room, file) for file in (ROOT / room).rglob("*.py")]
    return sorted(found)


def type_checking_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines |= {n.lineno for n in ast.walk(node) if isinstance(n, ast.stmt)}
    return lines


def imports(file: Path) -> list[tuple[str, int]]:
    """Rooms of upbench that a file imports at run time, with the line."""
    tree = ast.parse(file.read_text())
    hidden = type_checking_lines(tree)
    rooms = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules = [node.module]
            if node.module == "upbench":
                modules = [f"upbench.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] != "upbench" or len(parts) == 1 or parts[1].startswith("__"):
                continue  # `from upbench import __version__` names no room
            if node.lineno not in hidden:
                rooms.append((parts[1], node.lineno))
    return rooms


@pytest.mark.parametrize(("room", "file"), sources(), ids=lambda v: str(v) if isinstance(v, str) else v.stem)
def test_arrows(room: str, file: Path):
    for target, line in imports(file):
        if room in ("methods", "tasks") and target[0].isupper():
            continue  # a public name such as `from upbench import Upsampler`
        assert floor(target) <= floor(room), f"{file.name}:{line}: {room} must not import {target}"
        if room in ("methods", "tasks"):
            assert target not in ({"methods", "tasks"} - {room}), (
                f"{file.name}:{line}: {room} import {target}"
            )


def test_the_core_never_names_the_plugin_packages_in_an_import():
    for room, file in sources():
        if room not in ("methods", "tasks"):
            targets = {target for target, _ in imports(file)}
            assert not targets & {"methods", "tasks"}, f"{file}: plugins are found by the registry"


def test_report_imports_no_torch():
    for file in (ROOT / "upbench" / "report").rglob("*.py"):
        assert "import torch" not in file.read_text(), file


def test_files_stay_readable():
    for folder in ("upbench", "methods", "tasks", "tests", "benchmarks", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 500, (
                f"{file} is over 500 lines: one file, one purpose"
            )
