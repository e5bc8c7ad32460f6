"""Prints the lowest versions that pyproject.toml allows, `name==version`; `make test-lowest` installs them.

    python tools/lowest.py [EXTRA ...]

They are those of the dependencies, of these extras and of what builds the package, as far as their markers
hold for this interpreter. Needs `packaging`, and `tomli` below Python 3.11: `pip install build` brings both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(pyproject: dict[str, Any], extras: Iterable[str] = ()) -> list[Requirement]:
    """What the project, the named extras (and the extras that these name) and its build declare."""
    project = pyproject["project"]
    found = [Requirement(line) for line in [*pyproject["build-system"]["requires"], *project["dependencies"]]]
    todo = list(extras)
    seen: set[str] = set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                todo.extend(requirement.extras)
            else:
                found.append(requirement)
    return found


def lower_bound(requirement: Requirement) -> Version | None:
    """The version that a requirement starts at; None where it names none."""
    bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "~=", "==")]
    return max(bounds, default=None)


def lowest(wanted: Iterable[Requirement]) -> dict[str, Version]:
    """The lowest version of each package that meets every bound that holds for this interpreter.

    Raises:
        ValueError: A requirement without a lower bound.
    """
    versions: dict[str, Version] = {}
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        bound = lower_bound(requirement)
        if bound is None:
            raise ValueError(f"pyproject.toml: '{requirement}' has no lower bound")
        name = canonicalize_name(requirement.name)
        versions[name] = max(bound, versions.get(name, bound))
    return versions


if __name__ == "__main__":
    declared = requirements(tomllib.loads(PYPROJECT.read_text()), sys.argv[1:])
    for name, version in sorted(lowest(declared).items()):
        print(f"{name}=={version}")
