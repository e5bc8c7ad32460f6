"""A wheel built from the tree works from another directory, plugins and data included."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source") / "upbench"
    skip = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests", "results"
    )
    shutil.copytree(ROOT, source, ignore=skip)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:  # what an installer does with a pure wheel
        archive.extractall(target)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )


def test_every_package_is_listed():
    """Packages are listed by hand because two of them live elsewhere: none may be forgotten."""
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "upbench").rglob("__init__.py")}
    assert set(project()["tool"]["setuptools"]["packages"]) == found | {"upbench.methods", "upbench.tasks"}


def test_wheel_holds_code_data_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "upbench/methods/bilinear.py",
        "upbench/tasks/seg.py",
        "upbench/py.typed",
        "upbench/datasets/interiors/scenes.py",
    ):
        assert needed in names
    assert any(re.match(r"upbench/datasets/interiors/data/.*\.zip", n) for n in names)
    assert any(re.match(r"upbench/checkpoints/raysup.*\.safetensors", n) for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert not [n for n in names if n.startswith(("methods/", "tasks/", "tests/", "results/", "tools/"))]


def test_wheel_runs_from_another_directory(installed, tmp_path):
    code = (
        "import upbench, upbench.methods, upbench.tasks, torch\n"
        "print(upbench.__file__, upbench.methods.__file__, upbench.tasks.__file__, sep='\\n')\n"
        "d = upbench.open_dataset('interiors'); s = d.load('val', 0, 64)\n"
        "m = upbench.load_method('raysup', channels=8)\n"
        "y = m(torch.zeros(1, 3, 28, 28), torch.zeros(1, 8, 6, 6), (12, 12))\n"
        "print(tuple(s.image.shape), tuple(y.shape))"
    )
    done = run(installed, tmp_path, "-c", "import sys\n" + code)
    assert done.returncode == 0, done.stderr
    *places, shapes = done.stdout.strip().splitlines()
    assert all(place.startswith(str(installed)) for place in places), places
    assert shapes == "(3, 64, 64) (1, 8, 12, 12)"


def test_command_line_of_the_wheel(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "upbench", "list", "methods")
    assert done.returncode == 0, done.stderr
    assert "raysup" in done.stdout
    assert "bilinear" in done.stdout


def test_extras_are_all_in_all():
    extras = project()["project"]["optional-dependencies"]
    named = re.fullmatch(r"upbench\[(.*)\]", extras["all"][0])
    assert named is not None
    assert set(named[1].split(",")) == set(extras) - {"all"}


def test_example_in_contributing_is_the_file_that_runs():
    """'Add a method in ten lines' is shown, and exists, in the same words."""
    example = (ROOT / "examples" / "smooth.py").read_text()
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert block is not None
    assert block[1] == example
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 10


def test_example_method_passes_the_contract(tmp_path):
    code = (
        "from upbench.registry import load_plugin_file, find_method\n"
        "from upbench.testing import check_method\n"
        f"load_plugin_file({str(ROOT / 'examples' / 'smooth.py')!r})\n"
        "check_method(find_method('smooth')); print('passed')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("passed")
