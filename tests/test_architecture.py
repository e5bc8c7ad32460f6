"""The arrows of the house run one way.

Imports are read from the source: those inside functions and those for type checkers count like any others.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A room is a package (or a file) right below `upbench`. It may import from itself and from the floors below,
# and nothing from its own floor.
FLOORS = [
    {"_version", "errors", "_lazy"},
    {"values"},
    {"contracts", "_old_paths"},
    {"system", "registry"},
    {"ops"},
    {"layers"},
    {"metrics", "protocols", "datasets", "features", "dense"},
    {"weights", "evaluate", "results"},
    {"cost", "train", "testing"},
    {"methods", "tasks"},
    {"run", "export", "mmseg"},
    {"cli"},
    {"__main__", "__init__"},
]  # fmt: skip
MOST_LINES = 500
MOST_FILES = 12


def floor(room: str) -> int:
    for level, rooms in enumerate(FLOORS):
        if room in rooms:
            return level
    raise AssertionError(f"upbench.{room} stands on no floor: give it one in {Path(__file__).name}")


@cache
def modules() -> dict[str, Path]:
    """Name -> file of every module, plugins included."""
    found = {}
    for package in ("upbench", "upbench.methods", "upbench.tasks"):
        folder = package.rpartition(".")[2]
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def imports(module: str) -> dict[str, int]:
    """Modules of upbench that a module imports, with the line."""
    file, found = modules()[module], {}
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names = [name if (name := f"{base}.{alias.name}") in modules() else base for alias in node.names]
        for name in names:
            if name.split(".")[0] == "upbench":
                assert name in modules(), f"{file}:{node.lineno}: there is no module {name}"
                found.setdefault(name, node.lineno)
    found.pop(module, None)
    return found


@pytest.mark.parametrize("module", modules())
def test_arrows(module: str):
    here = room(module)
    for target, line in imports(module).items():
        there = room(target)
        where = f"{modules()[module]}:{line}: {module} must not import {target}"
        if here == there and here not in ("methods", "tasks"):
            continue
        if here in ("methods", "tasks") and target == "upbench":
            continue  # a public name, as a plugin writes it
        assert floor(there) < floor(here), where
        assert there not in ("methods", "tasks"), f"{where}: plugins are found by the registry"


def test_no_circle_of_modules():
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for target in imports(module):
                follow(target, (*path, module))
            done.add(module)

    for module in modules():
        follow(module, ())


def test_contracts_import_errors_values_and_one_another_only():
    for module in modules():
        if room(module) == "contracts":
            assert {room(target) for target in imports(module)} <= {"contracts", "errors", "values"}, module


def test_hidden_imports_are_seen():
    """Imports for type checkers and imports inside functions are among them."""
    assert "upbench.contracts.backbone" in imports("upbench.contracts.upsampler"), "for type checkers"
    assert "upbench.features.backbones" in imports("upbench.weights.load"), "inside a function"


@pytest.mark.parametrize("package", ["upbench.results", "upbench.results.report"])
def test_results_import_no_torch(package: str):
    for module in (name for name in modules() if name.startswith(package)):
        waiting, seen = [module], set()
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                waiting += top_level_imports(each)
                assert "torch" not in outside(each), f"{module} imports torch by way of {each}"


def at_import(module: str) -> list[ast.stmt]:
    """The import statements that run when a module is imported."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = [ast.parse(modules()[module].read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        hidden = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not hidden and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return found


def top_level_imports(module: str) -> list[str]:
    lines = {node.lineno for node in at_import(module)}
    return [target for target, line in imports(module).items() if line in lines]


def outside(module: str) -> set[str]:
    names = set()
    for node in at_import(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_files_stay_readable():
    for folder in ("upbench", "methods", "tasks", "tests", "benchmarks", "examples", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = len(file.read_text().splitlines())
            assert lines <= MOST_LINES, f"{file} has {lines} lines: one file, one purpose"


def test_packages_stay_small():
    for folder in {file.parent for file in (ROOT / "upbench").rglob("*.py")}:
        files = sorted(file.name for file in folder.glob("*.py"))
        assert len(files) <= MOST_FILES, f"{folder} has {len(files)} files: {', '.join(files)}"
