"""Fixtures that all tests share."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; it looks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test is timed: a machine may be busy. Every run draws the same examples, so that a failure is one of the
# change; `pytest --hypothesis-profile=explore` draws others.
settings.register_profile("upbench", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("upbench")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--whole`: the slow part of the drill, too (tests/drill)."""
    parser.addoption("--whole", action="store_true", help="run the whole drill, with the cases that are slow")


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tests away from the user's cache and from progress bars; Ctrl-C works, also where a suite that
    a shell has put into the background has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["UPBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("UPBENCH_WEIGHTS", None)
    os.environ.pop("UPBENCH_DATA", None)
    os.environ.pop("UPBENCH_ATTENTION", None)


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
        pytest.skip(
            "the folder ../shared (golden outputs, official weights, photos) is not beside this checkout"
        )
    return folder


@pytest.fixture(scope="session")
def golden_dir(shared: Path) -> Path:
    """Outputs of the official implementations."""
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip("no golden outputs in ../shared")
    return folder


@pytest.fixture
def toy() -> Iterator[ModuleType]:
    """`tests/toy.py`, while its world (small images, methods that misbehave) is registered."""
    spec = importlib.util.spec_from_file_location("upbench_tests_toy", ROOT / "tests" / "toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.world():
        yield module
