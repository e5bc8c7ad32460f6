"""docs/datasets.md against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from upbench.registry import plugins

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text()
DATASETS = {name: cls for name, cls in plugins("dataset").items() if cls.__module__.startswith("upbench.")}
LINES = [line for line in PAGE.splitlines() if line.startswith("| `")]
ROWS = {cells[0].strip("`"): cells for cells in (line.strip("| ").split(" | ") for line in LINES)}


def test_every_dataset_is_on_the_page() -> None:
    assert sorted(ROWS) == sorted(DATASETS)


@pytest.mark.parametrize("name", [name for name, cls in DATASETS.items() if cls.counts])
def test_facts_of_a_dataset(name: str) -> None:
    cls, (_, images, classes, data, license) = DATASETS[name], ROWS[name]
    splits = dict.fromkeys((cls.train_split, *cls.eval_splits))
    assert images == ", ".join(f"{split} {cls.counts[split]}" for split in splits)
    if cls.classes:
        assert classes == str(len(cls.classes))
    assert license.strip() == cls.license
    assert (f"`upbench download {name}`" in data) == bool(cls.archives)
    assert ("by hand" in data) >= bool(cls.by_hand and not cls.archives)


@pytest.mark.parametrize("name", [name for name, cls in DATASETS.items() if cls.archives or cls.by_hand])
def test_every_layout_is_described(name: str) -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert name == "camvid" or any(name in heading.split(", ") for heading in headings)
