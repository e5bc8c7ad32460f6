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
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools import constraints, lowest

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
    anywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")

    def skip(folder: str, names: list[str]) -> set[str]:
        here = {"tests"} if Path(folder) == ROOT else set()
        if Path(folder) == ROOT / "results":  # there is an upbench/results, too
            here = set(names) - {"published"}
        return anywhere(folder, names) | here

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
    """Packages are listed by hand because some of them live elsewhere: none may be forgotten."""
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "upbench").rglob("__init__.py")}
    elsewhere = {"upbench.methods", "upbench.tasks", "upbench.results.published"}
    assert set(project()["tool"]["setuptools"]["packages"]) == found | elsewhere


def test_wheel_holds_code_data_and_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "upbench/methods/bilinear.py",
        "upbench/tasks/seg.py",
        "upbench/py.typed",
        "upbench/datasets/interiors/scenes.py",
        "upbench/protocols/own.py",
        "upbench/results/published/papers.yaml",
        "upbench/results/published/raysup.csv",
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
        "d = upbench.open_dataset('interiors'); s = d.read('val', 0)\n"
        "m = upbench.load_method('raysup', channels=8)\n"
        "y = m(torch.zeros(1, 3, 28, 28), torch.zeros(1, 8, 6, 6), (12, 12))\n"
        "p = upbench.registry.find_protocol('quick')()\n"
        "f = p.geometry.frames(s.size)[0].of(s)\n"
        "print(tuple(s.image.shape), tuple(f.image.shape), tuple(y.shape))"
    )
    done = run(installed, tmp_path, "-c", "import sys\n" + code)
    assert done.returncode == 0, done.stderr
    *places, shapes = done.stdout.strip().splitlines()
    assert all(place.startswith(str(installed)) for place in places), places
    assert shapes == "(3, 448, 448) (3, 224, 224) (1, 8, 12, 12)"


def test_command_line_of_the_wheel(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "upbench", "list", "methods")
    assert done.returncode == 0, done.stderr
    assert "raysup" in done.stdout
    assert "bilinear" in done.stdout
    words = ("published", "--method", "raysup", "--dataset", "voc2012")
    done = run(installed, tmp_path, "-m", "upbench", *words)
    assert done.returncode == 0, done.stderr
    assert "84.64" in done.stdout


def test_extras_are_all_in_all():
    extras = project()["project"]["optional-dependencies"]
    named = re.fullmatch(r"upbench\[(.*)\]", extras["all"][0])
    assert named is not None
    assert set(named[1].split(",")) == set(extras) - {"all"}


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


def test_every_dependency_has_a_lower_bound():
    extras = project()["project"]["optional-dependencies"]
    assert not [str(r) for r in lowest.requirements(project(), extras) if lowest.lower_bound(r) is None]


def test_constraints_are_versions_that_the_project_takes():
    """Every direct dependency is pinned, on every supported Python, within its range."""
    pythons = constraints.supported_pythons()
    pins = constraints.read(constraints.FILE.read_text(), pythons)
    wrong = []
    for requirement in lowest.requirements(project(), project()["project"]["optional-dependencies"]):
        for python in pythons:
            if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
                continue
            version = pins.get(canonicalize_name(requirement.name), {}).get(python)
            if version is None or version not in requirement.specifier:
                wrong.append(f"Python {python}: {requirement}, pinned is {version}")
    assert pythons[0] == "3.10"
    assert not wrong


def test_constraints_hold_on_any_machine():
    lines = [line for line in constraints.FILE.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[^+;]+(; python_version .*)?", line)]
    assert not [line for line in lines if constraints.FOLLOWS_TORCH.match(line.partition("==")[0])]


def test_constraints_are_written_as_they_are_read():
    text, pythons = constraints.FILE.read_text(), constraints.supported_pythons()
    assert constraints.write(constraints.read(text, pythons), pythons) == text


def merged(old: str, running: str, **new: tuple[str, str]) -> list[str]:
    pythons = ["3.10", "3.11", "3.12"]
    found = {name: (Version(v), SpecifierSet(requires)) for name, (v, requires) in new.items()}
    pins = constraints.merge(constraints.read(old, pythons), found, running, pythons)
    return constraints.write(pins, pythons).removeprefix(constraints.HEADER).splitlines()


def test_refreshed_constraints():
    """A Python that cannot have the new version keeps its own; it takes part again once it can."""
    below, above = 'a==1; python_version < "3.11"', 'a==2; python_version >= "3.11"'
    assert merged("a==1", "3.11", a=("2", ">=3.10")) == ["a==2"]
    assert merged("a==1", "3.11", a=("2", ">=3.11")) == [below, above]
    assert merged(f"{below}\n{above}", "3.11", a=("3", ">=3.10")) == [below, above.replace("2", "3", 1)]
    assert merged(f"{below}\n{above}", "3.10", a=("2", "")) == ["a==2"]
    assert merged("a==1", "3.12", a=("2", ">=3.12"))[0] == 'a==1; python_version < "3.12"'
    assert merged("", "3.10", a=("1", ">=3.10")) == ["a==1"]
    assert merged("a==1\nb==1", "3.11", b=("1", "")) == [below, "b==1"]
    assert merged(f"{below}\nb==1", "3.10", b=("1", "")) == ["b==1"]


def test_lowest_versions():
    some = {
        "build-system": {"requires": ["setuptools>=77"]},
        "project": {
            "name": "it",
            "dependencies": ["A_b>=1.2,<3", "c~=2.1", "old>=1; python_version < '3'"],
            "optional-dependencies": {"x": ["c>=2.5"], "y": ["d==4", "e"], "all": ["it[x]"]},
        },
    }
    versions = {"a-b": "1.2", "c": "2.5", "setuptools": "77"}
    assert {k: str(v) for k, v in lowest.lowest(lowest.requirements(some, ["all"])).items()} == versions
    with pytest.raises(ValueError, match="'e' has no lower bound"):
        lowest.lowest(lowest.requirements(some, ["y"]))


def test_lowest_versions_are_printed_for_pip():
    command = [sys.executable, str(ROOT / "tools" / "lowest.py"), "mmseg"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert {"torch==2.9", "onedl-mmcv==2.3"} < set(lines)


def test_what_is_run_with_the_lowest_versions_exists():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (paths,) = re.findall(r"^TESTS_LOWEST := (.*)$", text, re.M)
    assert paths.split()
    assert not [path for path in paths.split() if not (ROOT / path).exists()]
