"""Runs every case that is words for the command line."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import drill.cases
from drill.case import Case

CASES: list[Case] = [
    case
    for module in pkgutil.iter_modules(drill.cases.__path__)
    for case in importlib.import_module(f"drill.cases.{module.name}").CASES
]


def _marked(case: Case) -> object:
    marks = [pytest.mark.drill(case.group), *([pytest.mark.whole] if case.whole else [])]
    return pytest.param(case, id=f"{case.group}-{case.name}", marks=marks)


@pytest.mark.parametrize("case", [_marked(case) for case in CASES])
def test_what_is_promised(case: Case, tmp_path: Path) -> None:
    """The command does what the case promises."""
    folder = tmp_path / "here"
    folder.mkdir()
    case.run(folder)


def test_names_are_unique() -> None:
    """A name that two cases have would hide one of them in the report."""
    names = [(case.group, case.name) for case in CASES]
    assert len(names) == len(set(names))
