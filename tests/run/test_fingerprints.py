"""Whatever can move a number is in a cell's fingerprint: a stale number never stays.

A copy of the package, laid out as it is installed, is planned once for each of its files, with one statement
more in that file. Which cells would run again is compared with what is written down here. It is written by
hand: the code under test reads it from imports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pictures import folder_dataset

ROOT = Path(__file__).resolve().parents[2]
METHODS, TASKS, DATASETS = ("bilinear", "jbu", "raysup"), ("depth", "normals", "seg"), ("folder", "interiors")
ALL = ("", "", "")

# What a file decides on: (method, task, dataset), each "" for all of them; None for no cell of this plan.
# The first pattern that fits counts.
RULES: list[tuple[str, list[tuple[str, str, str]] | None]] = [
    *[(rf"methods/{name}\.py", [(name, "", "")]) for name in METHODS],
    *[(rf"tasks/{name}\.py", [("", name, "")]) for name in TASKS],
    (r"metrics/segmentation\.py", [("", "seg", "")]),
    *[(rf"metrics/{name}\.py", [("", name, "")]) for name in ("depth", "normals")],
    (r"metrics/_common\.py", [ALL]),
    (r"datasets/(folder|_content)\.py", [("", "", "folder")]),
    (r"datasets/_files\.py", [("", "", "")]),  # which scenes are read through, too
    (r"datasets/interiors/.*", [("", "", "interiors")]),
    (r"datasets/(adapters|papers|nyu)/.*", None),  # other datasets
    (r"protocols/(own|geometry)\.py", [ALL]),
    (r"(methods|tasks|datasets|protocols)/\w+\.py", None),  # other plugins are their own cells' business
    (r"dense/tiles\.py", None),
    (r"evaluate/objectives\.py", [("", "depth", ""), ("", "normals", "")]),
    (r"(dense|evaluate|features|contracts)/\w+\.py", [ALL]),
    (r"ops/operator\.py", [ALL]),  # probes are applied through it
    (r"ops/(resample|separable)\.py", [ALL]),  # heads on the backbone's own features
    (r"ops/window/(attention|backends|constants|tables)\.py", [("jbu", "", ""), ("raysup", "", "")]),
    (r"ops/window/(natten_window|triton_kernels|triton_window)\.py", [("jbu", "", ""), ("raysup", "", "")]),
    (r"ops/window/tiled\.py", [("raysup", "", "")]),
    (r"ops/pooling\.py", [("raysup", "", "")]),
    (r"layers/(attention|convolutions|guidance|rotary|strips)\.py", [("raysup", "", "")]),
    (r"layers/(rays|raysup_options|rotated)\.py", [("raysup", "", "")]),
    (r"(ops|layers)/.*", None),  # of other methods
    (r"run/(worker|context|jobs)\.py", [ALL]),
    (r"weights/(load|resolve)\.py", [ALL]),
    (r"system/(ahead|checkpoint/\w+)\.py", [ALL]),
    (r"system/allocator\.py", [("", "", "")]),
    (r"(run|system|cli|cost|results|train|testing)/.*", None),
    (r"\w+\.py", None),
]

ROOMS = ("metrics", "evaluate", "dense", "features", "protocols", "datasets", "contracts", "ops", "layers")
ROOMS = (*ROOMS, "methods", "tasks", "weights")
NOBODY = {
    "datasets/_archives.py": "for `upbench download`: what was unpacked is read as any file is",
    "datasets/_arrays.py": "for datasets of others: those here hold no arrays of NumPy",
    "dense/tiles.py": "for programs: no cell's output is in tiles",
}
"""Files of these rooms that no number of any cell depends on, with the reason."""

PROGRAM = """
import json, sys
from pathlib import Path

import upbench
from upbench.contracts.backbone import Backbone
from upbench.features import backbones
from upbench.features.images import SplitImages
from upbench.features.store import FeatureStore
from upbench.registry import plugins
from upbench.run.config import RunConfig
from upbench.run.plan import make_plan
from upbench.run import worker
from upbench.system import sources

package, data, methods, tasks = Path(upbench.__file__).parent, *sys.argv[1:4]
vit = Backbone.__new__(Backbone)
vit.__dict__.update(
    name="vit", channels=384, stride=14, model=None, fingerprint="vit-1", mean=(0.5,) * 3, std=(0.5,) * 3
)
config = RunConfig(
    methods=methods, tasks=tasks, backbones="vit", datasets=("interiors", "folder:" + data), device="cpu"
)


def look():
    plan = make_plan(config, lambda name, place: vit)
    cells, stores = {}, {}
    for planned in plan:
        dataset = planned.cell.dataset
        cells[f"{planned.cell.method.name} {planned.cell.task} {dataset}"] = dict(planned.inputs)
        if dataset not in stores:
            images = SplitImages(planned.dataset, "val", planned.protocol, stride=14)
            stores[dataset] = FeatureStore(vit, images).folder.name
    return cells, stores


def depends():
    files = set(sources.closure(Path(worker.__file__), Path(backbones.__file__)))
    for kind in ("method", "task", "dataset", "protocol"):
        for cls in plugins(kind).values():
            files.update(sources.source_files(cls))
    return sorted(file.relative_to(package).as_posix() for file in files)


cells, stores = look()
again = look()
assert again == (cells, stores), "a plan depends on nothing but its inputs"
found = {}
for file in sorted(package.rglob("*.py")):
    before = file.read_bytes()
    file.write_bytes(before + b"\\n_changed = 1\\n")
    try:
        new, other = look()
    finally:
        file.write_bytes(before)
    found[file.relative_to(package).as_posix()] = {
        "cells": [name for name, inputs in cells.items() if new[name] != inputs],
        "stores": [name for name, folder in stores.items() if other[name] != folder],
    }
print(json.dumps({"found": found, "depends": depends(), "cells": list(cells)}))
"""


def files() -> list[str]:
    """Every source file, by its path in an installed package."""
    found = [path.relative_to(ROOT / "upbench") for path in (ROOT / "upbench").rglob("*.py")]
    for plugins in ("methods", "tasks"):
        found += [path.relative_to(ROOT) for path in (ROOT / plugins).rglob("*.py")]
    return sorted(path.as_posix() for path in found)


def hands_on_names(file: str) -> bool:
    """Whether a file is a package's that has no code of its own: imports of its names count at their owner's,
    as `tests/system/test_sources.py` shows."""
    return file.endswith("__init__.py") and file != "datasets/interiors/__init__.py"


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What changes with each file of a copy."""
    place = tmp_path_factory.mktemp("copy")
    package = place / "upbench"
    heavy = shutil.ignore_patterns("__pycache__", "checkpoints", "data")
    shutil.copytree(ROOT / "upbench", package, ignore=heavy)
    for name in ("methods", "tasks"):
        shutil.copytree(ROOT / name, package / name, ignore=heavy)
    for data in ("checkpoints", "datasets/interiors/data"):
        (package / data).symlink_to(ROOT / "upbench" / data)
    environment = {
        **os.environ,
        "PYTHONPATH": str(place),
        "PYTHONDONTWRITEBYTECODE": "1",
        "UPBENCH_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(folder_dataset(place / "pictures")), ",".join(METHODS), ",".join(TASKS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout)
    return found


def expected(file: str) -> set[str]:
    """The cells that a file decides on, as the table above says."""
    if hands_on_names(file):
        return set()
    for pattern, chosen in RULES:
        if re.fullmatch(pattern, file):
            return {
                f"{method} {task} {dataset}"
                for m, t, d in chosen or ()
                for method in ([m] if m else METHODS)
                for task in ([t] if t else TASKS)
                for dataset in ([d] if d else DATASETS)
            }
    raise AssertionError(f"{file}: say in {Path(__file__).name} which cells depend on it")


def test_the_plan_is_the_whole_product(looked: dict):
    crossings = {f"{m} {t} {d}" for m in METHODS for t in TASKS for d in DATASETS}
    assert set(looked["cells"]) == crossings
    assert set(looked["found"]) == set(files()), "the copy is whole"


@pytest.mark.parametrize("file", files())
def test_a_changed_file_runs_exactly_its_cells_again(looked: dict, file: str):
    assert set(looked["found"][file]["cells"]) == expected(file)


def somebodys() -> Iterator[str]:
    for file in files():
        if file.partition("/")[0] in ROOMS and not hands_on_names(file):
            yield file


@pytest.mark.parametrize("file", list(somebodys()))
def test_somebody_depends_on_every_file(looked: dict, file: str):
    """A new file that no fingerprint sees fails here."""
    assert (file in looked["depends"]) == (file not in NOBODY), NOBODY.get(file, "no cell depends on it")


@pytest.mark.parametrize("file", files())
def test_features_are_computed_again_with_the_code_that_makes_them(looked: dict, file: str):
    """Else the cells would run again on features of before."""
    both, names = set(DATASETS), set(looked["found"][file]["stores"])
    makers = (
        r"features/(images|arena|extraction|shards|moments|backbones|packaged)\.py|protocols/geometry\.py"
    )
    makers += r"|contracts/(backbone|image|weights|geometry|sample)\.py"
    if re.fullmatch(makers, file):
        assert names == both
    elif (
        file.startswith("datasets/")
        and file not in NOBODY
        and not hands_on_names(file)
        and not re.fullmatch(
            r"datasets/((adapters|papers|nyu)/.*|(camvid|_layout|_paired|_matlab)\.py)", file
        )
    ):
        assert names == {"interiors" if "interiors" in file else "folder"}
    else:
        assert not names, "features are dear"
