"""`upbench run --dry-run`: what would be done, and nothing that is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upbench.cli.dispatch import main
from upbench.features import store
from upbench.results.records import load_records

METHODS = "toy_smooth,toy_skips,toy_trained:none"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, in which there is nothing."""
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def lines(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    assert main([*words, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def row(found: list[str], *words: str) -> str:
    (line,) = (line for line in found if all(word in line.split() for word in words))
    return line


def test_nothing_is_written_and_nothing_computed(toy, tmp_path, cache, capsys, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("a dry run computes no features")

    monkeypatch.setattr(store.FeatureStore, "_fill", never)
    out = tmp_path / "run"
    assert lines(capsys, toy.arguments(out, METHODS))
    assert not out.exists()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_what_is_said_before_a_run_and_after(toy, tmp_path, cache, capsys):
    words = toy.arguments(tmp_path / "run", METHODS)
    found = lines(capsys, words)
    head = row(found, "status")
    assert head.split() == ["status", "row", "task", "backbone", "dataset", "protocol", "images", "reason"]
    assert row(found, "Smooth").split()[:6] == ["run", "Smooth", "seg", "tiny", "toy", "tiny-v3"]
    assert "train 6, val 4, other 3" in row(found, "Smooth")
    assert row(found, "toy_skips").startswith("skip")
    assert row(found, "toy_skips").endswith("only 16x, not 8x")
    assert found[-3:] == [
        f"features of toy/{split} by tiny: 0 of {count} images there"
        for split, count in (("train", 6), ("val", 4), ("other", 3))
    ]

    main(toy.arguments(tmp_path / "run", "toy_smooth"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    found = lines(capsys, words)
    assert row(found, "Smooth").startswith("finished")
    assert row(found, "toy_trained:none").startswith("run")
    assert found[-3:] == [f"features of toy/{split} by tiny: there" for split in ("train", "val", "other")]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_weights_limits_and_parts(toy, tmp_path, cache, capsys):
    file = tmp_path / "toy.safetensors"
    save_file({"gain": torch.ones(6, 1, 1)}, file)
    words = toy.arguments(tmp_path / "run", f"toy_trained:{file},raysup", "--limit", "2")
    found = lines(capsys, words)
    trained, raysup = row(found, f"toy_trained:{file}"), row(found, "RaysUp")
    assert trained.startswith("run")
    assert "train 2, val 2, other 2" in trained
    assert "toy.safetensors" in trained.split()[-1]
    assert raysup.startswith("skip"), "its weights are for features of other channels"
    for part in ("1/2", "2/2"):
        some = lines(capsys, [*words, "--shard", part])
        assert len([line for line in some if line.startswith(("run", "skip"))]) == 1


def test_a_record_that_holds_no_more_and_one_under_another_label(toy, tmp_path, cache, capsys, monkeypatch):
    out = tmp_path / "run"
    main(toy.arguments(out))
    file = tmp_path / "labelled.yaml"
    file.write_text("methods: [{name: toy_smooth, label: Baseline}]\n")
    words = [word for word in toy.arguments(out) if word not in ("--methods", "toy_smooth")]
    found = lines(capsys, [*words, "--config", str(file)])
    assert row(found, "Baseline").startswith("finished")
    assert [record.row for record in load_records(out)] == ["Smooth"], "a dry run renames nothing"

    tiny = sys.modules[toy.find("toy_smooth").__module__].Tiny
    init = tiny.__init__

    def other(self) -> None:
        init(self)
        self.fingerprint = "tiny-2"

    monkeypatch.setattr(tiny, "__init__", other)
    found = lines(capsys, toy.arguments(out))
    assert row(found, "Smooth").startswith("run")
    assert any("run again, since its backbone changed" in line for line in found)


def test_bad_input_is_one_line_as_for_a_run(toy, tmp_path, cache, capsys):
    assert main([*toy.arguments(tmp_path / "run", "toy_smoth"), "--dry-run"]) == 2
    assert "did you mean 'toy_smooth'?" in capsys.readouterr().err
