"""Disks that fill up at every point of a run: one line, nothing half-written, and the run goes on later."""

from __future__ import annotations

import json

import pytest

from drill.disks import enlarge, fill, small_disk
from upbench.cli.dispatch import main
from upbench.features import store
from upbench.results.records import load_records

pytestmark = pytest.mark.drill("full disk")


def numbers(out) -> dict[str, object]:
    return {r.cell.key: (r.status, r.metrics) for r in load_records(out)}


@pytest.mark.parametrize("size", ["4k", "16k", "32k", "48k"])
def test_the_disk_of_the_records(toy, capsys, tmp_path, size):
    words = ("toy_smooth,toy_posed", "--tasks", "toy_noted,seg")
    assert main(toy.arguments(tmp_path / "whole", *words)) == 0
    capsys.readouterr()
    with small_disk(tmp_path / "disk", size) as disk:
        code, err = main(toy.arguments(disk / "run", *words)), capsys.readouterr().err
        assert code == 2, err
        assert "upbench: error: disk full: cannot write" in err.splitlines()[-1]
        assert "Traceback" not in err
        for path in disk.rglob("*"):
            if path.is_file() and path.suffix == ".json":
                json.loads(path.read_text())
        assert not list(disk.rglob("*.tmp"))
        enlarge(disk)
        assert main(toy.arguments(disk / "run", *words)) == 0
        assert numbers(disk / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("reserve", [store.RESERVE, -store.RESERVE])
def test_the_disk_of_the_features(toy, capsys, tmp_path, monkeypatch, reserve):
    """Whether it is known before that there is no room, or not."""
    assert main(toy.arguments(tmp_path / "whole")) == 0
    monkeypatch.setattr(store, "RESERVE", reserve)
    capsys.readouterr()
    with small_disk(tmp_path / "disk", "64k") as disk:
        monkeypatch.setenv("UPBENCH_CACHE", str(disk))
        filler = fill(disk)
        assert main(toy.arguments(tmp_path / "run")) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "has 0 bytes free" in last or "disk full" in last or "No space left" in last
        assert not list(disk.rglob("*.tmp"))
        filler.unlink()
        enlarge(disk)
        monkeypatch.setattr(store, "RESERVE", 0)
        assert main(toy.arguments(tmp_path / "run")) == 0
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")
