"""Files that a training run finds: none is replaced unasked, and none removed before all is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import change

from upbench.errors import UpbenchError
from upbench.train.loop import TrainConfig, train


@pytest.mark.parametrize("suffix", [".md", ".curve.jsonl"])
def test_files_of_somebody_else_are_not_replaced(config: TrainConfig, suffix: str):
    notes = config.paths().out.with_suffix(suffix)
    notes.parent.mkdir(parents=True)
    notes.write_text("my notes")
    with pytest.raises(UpbenchError, match=rf"{re.escape(suffix)} exists; --force replaces it"):
        train(config)
    assert notes.read_text() == "my notes"
    assert list(notes.parent.iterdir()) == [notes]


def test_the_curve_of_a_run_that_died_is_replaced(config: TrainConfig):
    curve = config.paths().curve
    curve.parent.mkdir(parents=True)
    curve.write_text('{"step": 2, "loss": 1.5, "lr": 0.01}\n')
    assert train(config).finished


def test_nothing_is_removed_before_all_is_known_to_be_right(config: TrainConfig, tmp_path: Path):
    paths = config.paths()
    paths.out.parent.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for path in (paths.resume, paths.out, paths.card, paths.out.with_suffix(".writable")):
        path.write_bytes(b"kept")
    for wrong in (
        {"images": (str(tmp_path / "none"),)},
        {"images": (str(tmp_path / "empty"),)},
        {"images": (str(tmp_path / "broken"),)},
        {"val_images": (str(tmp_path / "empty"),)},
        {"options": {"name": "x"}},
        {"options": {"broken": "x", "weights": 1}},
        {"init": "none.pth"},
        {"device": "nowhere"},
    ):
        with pytest.raises(UpbenchError):
            train(change(config, force=True, **wrong))
        assert all(path.read_bytes() == b"kept" for path in paths.out.parent.iterdir())
        assert len(list(paths.out.parent.iterdir())) == 4
