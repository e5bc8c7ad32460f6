"""Writes the versions of this interpreter's packages into constraints.txt; `make constraints` runs it.

    path/to/venv/bin/python tools/constraints.py [EXTRA ...]

Pinned is what upbench needs with these extras, at any depth, and what installs it. Left out is what follows
from torch and from the machine: CUDA's libraries, Triton, the local part of a version ("+cpu"). A supported
Python that cannot have a version keeps the line it had, and lines get markers: run this on the lowest, too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "constraints.txt"
INSTALLERS = ("pip", "setuptools", "wheel", "build")
FOLLOWS_TORCH = re.compile(r"nvidia-|cuda-|triton$")
HEADER = """\
# The versions that upbench was tested with, for `make demo`, `make test` and CI, which no new release of a
# package can break. They bind nobody else: what `pip install upbench` may take stands in pyproject.toml.
# Written by `make constraints`, which tests the newest releases first (CONTRIBUTING.md, "Versions").
"""

Pins = dict[str, dict[str, Version]]
"""Package -> Python ("3.11") -> version."""


def supported_pythons() -> list[str]:
    """The Pythons that pyproject.toml lists, lowest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"]
    )
    return sorted((match[1] for match in found if match), key=Version)


def read(text: str, pythons: Iterable[str]) -> Pins:
    """The pins of a constraints file."""
    pins: Pins = {}
    for line in text.splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        for python in pythons:
            here = {"python_version": python, "python_full_version": f"{python}.0"}
            if requirement.marker is None or requirement.marker.evaluate(here):
                pins.setdefault(canonicalize_name(requirement.name), {})[python] = Version(pin.version)
    return pins


def write(pins: Pins, pythons: list[str]) -> str:
    """The constraints file of these pins; neighbouring Pythons with the same version share a line."""
    lines = []
    for name, versions in sorted(pins.items()):
        first = 0
        for after in range(1, len(pythons) + 1):
            version = versions.get(pythons[first])
            if after < len(pythons) and versions.get(pythons[after]) == version:
                continue
            bounds = [f'python_version >= "{pythons[first]}"'] if first else []
            bounds += [f'python_version < "{pythons[after]}"'] if after < len(pythons) else []
            if version is not None:
                lines.append(f"{name}=={version}" + (f"; {' and '.join(bounds)}" if bounds else ""))
            first = after
    return HEADER + "\n".join(lines) + "\n"


def installed(roots: Iterable[str]) -> dict[str, metadata.Distribution]:
    """What the roots ("name" or "name[extra]") need, at any depth, as it is installed here."""
    found: dict[str, metadata.Distribution] = {}
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if FOLLOWS_TORCH.match(name):
            continue
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            found[name] = metadata.distribution(name)
            needed = map(Requirement, found[name].requires or ())
            todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def merge(old: Pins, new: dict[str, tuple[Version, SpecifierSet]], running: str, pythons: list[str]) -> Pins:
    """The pins after a look at one Python's packages.

    Args:
        old: What was pinned.
        new: Version and Requires-Python of what is installed.
        running: The Python that it is installed in.
        pythons: All that are supported, lowest first.

    Returns:
        The running Python has the new versions. One that shared its line has them too, if it can; else it
        keeps the line. A package that is no longer needed goes, and stays for lower Pythons.
    """
    merged: Pins = {}
    for name in old.keys() | new.keys():
        had = old.get(name, {})
        for python in pythons:
            version = had.get(python)
            if python == running or (version == had.get(running) and (version is not None or not had)):
                if name not in new:
                    version = version if pythons.index(python) < pythons.index(running) else None
                elif python == running or new[name][1].contains(f"{python}.99"):
                    version = new[name][0]
            if version is not None:
                merged.setdefault(name, {})[python] = version
    return merged


def main(extras: list[str]) -> None:
    pythons = supported_pythons()
    running = "{}.{}".format(*sys.version_info)
    if running not in pythons:
        raise SystemExit(f"pyproject.toml does not list Python {running}")
    found = installed([f"upbench[{','.join(extras)}]", *INSTALLERS])
    del found["upbench"]
    new = {
        name: (
            Version(Version(distribution.version).public),
            SpecifierSet(str(distribution.metadata.json.get("requires_python", ""))),
        )
        for name, distribution in found.items()
    }
    old = read(FILE.read_text(), pythons) if FILE.exists() else {}
    FILE.write_text(write(merge(old, new, running, pythons), pythons))
    print(f"{FILE.name}: {len(new)} packages of Python {running}")


if __name__ == "__main__":
    main(sys.argv[1:])
