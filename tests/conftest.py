"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tests away from the user's cache and from progress bars."""
    os.environ["UPBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("UPBENCH_WEIGHTS", None)
    os.environ.pop("UPBENCH_DATA", None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with golden outputs, official weights and photos."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared (golden outputs, official weights, photos) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared: Path) -> Path:
    """Outputs of the official implementations."""
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip("no golden outputs in ../shared")
    return folder
