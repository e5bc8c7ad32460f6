"""Several runs at once in one folder, and the same run by every executor: the same records, bit for bit."""

from __future__ import annotations

from collections import Counter

import pytest

from drill.nursery import nursery, words
from upbench.results.records import load_records

METHODS = "toy_smooth,toy_posed,toy_trained:none,toy_fails"


pytestmark = pytest.mark.whole


@pytest.mark.drill("runs at once")
@pytest.mark.parametrize("count", [2, 4])
def test_runs_in_one_folder_compute_each_cell_once(tmp_path, count):
    notes = tmp_path / "notes"
    with nursery() as runs:
        environ = {"UPBENCH_CACHE": str(tmp_path / "cache"), "TOY_NOTES": str(notes), "TOY_HEALED": "1"}
        arguments = words(tmp_path / "run", METHODS, "--tasks", "toy_noted")
        all_runs = [runs.start(arguments, tmp_path / f"log{i}", **environ) for i in range(count)]
        for run in all_runs:
            assert run.wait() == 0, run.log.read_text()
            assert "[4/4]" in run.log.read_text(), "each run sees all records"
    cells = Counter(line.split()[1] for line in notes.read_text().splitlines())
    assert cells == dict.fromkeys(("toy_smooth", "toy_posed", "toy_trained", "toy_fails"), 1)
    assert len(load_records(tmp_path / "run")) == 4
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"records", "cost", "data"}


@pytest.mark.drill("executors")
def test_executors_give_the_same_records(tmp_path):
    """On one thread each: sums over several of them round in another order."""
    found = {}
    executors = {
        "inline": (),
        "one worker": ("--executor", "process", "--workers", "1"),
        "two workers": ("--executor", "process", "--workers", "2"),
    }
    with nursery() as runs:
        for name, more in executors.items():
            folder = tmp_path / name
            environ = {"UPBENCH_CACHE": str(folder / "cache"), "TOY_HEALED": "1"}
            run = runs.start(words(folder / "run", METHODS, *more), folder / "log", **environ)
            assert run.wait() == 0, run.log.read_text()
            records = load_records(folder / "run")
            found[name] = {r.cell.key: (r.status, r.metrics, r.per_image, r.inputs) for r in records}
    assert len(found["inline"]) == 8
    assert found["one worker"] == found["inline"]
    assert found["two workers"] == found["inline"]
