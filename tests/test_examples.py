"""The examples: each is shown on its page word for word, fits a screen, runs, and keeps its contract."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from registries import restored

from upbench.cli.dispatch import main
from upbench.cost import measure as cost
from upbench.features.packaged import PACKAGED
from upbench.registry import find, load_plugin_file, open_dataset
from upbench.results.records import load_records
from upbench.testing import check_dataset, check_method, check_protocol, check_task

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted((ROOT / "docs").glob("add-a-*.md"))
SCREEN = 45  # lines
CHECKS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "smooth": ("method", check_method),
    "minimal_task": ("task", check_task),
    "minimal_probe_task": ("task", check_task),
    "minimal_dataset": ("dataset", check_dataset),
    "minimal_protocol": ("protocol", check_protocol),
}
NAMES = {
    "smooth": "smooth",
    "minimal_task": "fidelity",
    "minimal_probe_task": "near",
    "minimal_dataset": "beside",
    "minimal_protocol": "whole",
}


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    with restored():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data for the example of a dataset: discs on noise, of several sizes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        place = tmp_path / "data" / split
        place.mkdir(parents=True)
        for i in range(count):
            height, width = 200 + 30 * i, 260
            rows, cols = np.mgrid[:height, :width]
            disc = (rows - height // 2) ** 2 + (cols - 90) ** 2 < 70**2
            image = generator.integers(0, 90, (height, width, 3)) + 150 * disc[..., None]
            Image.fromarray(image.astype(np.uint8)).save(place / f"{i}.jpg")
            Image.fromarray(disc.astype(np.uint8)).save(place / f"{i}.png")
    return tmp_path / "data"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def command(example: Path) -> list[str]:
    """What its docstring says to try."""
    docstring = ast.get_docstring(ast.parse(example.read_text())) or ""
    found = re.search(r"`(--plugin [^`]*)`", docstring)
    assert found is not None, f"{example.name} does not say how it is tried"
    return shlex.split(found[1])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_page_shows_it_word_for_word(example: Path) -> None:
    showing = [page.name for page in PAGES if example.read_text() in blocks(page)]
    assert len(showing) == 1
    assert f"(../examples/{example.name})" in (ROOT / "docs" / showing[0]).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_show_nothing_else(page: Path) -> None:
    texts = [example.read_text() for example in EXAMPLES]
    assert blocks(page)
    assert [block for block in blocks(page) if block not in texts] == []
    assert page.name in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_fits_a_screen(example: Path) -> None:
    lines = example.read_text().splitlines()
    assert len(lines) <= SCREEN
    if example.stem == "smooth":
        assert len([line for line in lines if line.strip()]) <= 11, "ten lines, and how to try it"


@pytest.mark.skipif(not PACKAGED["dinov2_vits14_focus"].installed, reason="the extra 'demo' is not installed")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_as_it_says(example: Path, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cost, "measure", functools.partial(cost.measure, seconds=0.01, memory=False))
    words = [word.replace("FOLDER", str(folder)) for word in command(example)]
    if "--methods" not in words:
        words += ["--methods", "nearest"]
    out, short = tmp_path / "run", ["--probe", "epochs=2", "--limit", "2", "--seeds", "1"]
    code = main(["run", *words, *short, "--device", "cpu", "--out", str(out), "--quiet"])
    assert (code, capsys.readouterr().err) == (0, "")
    (record,) = load_records(out)
    assert record.status == "ok"
    name = NAMES[example.stem]
    assert name in (record.cell.method.name, record.cell.task, record.cell.dataset, record.cell.protocol)
    for split, metrics in record.metrics.items():
        assert all(np.isfinite(values).all() for values in metrics.values()), split
        assert len(record.per_image[split]["names"]) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_keeps_its_contract(example: Path, folder: Path) -> None:
    load_plugin_file(example)
    kind, check = CHECKS[example.stem]
    name = NAMES[example.stem]
    outcome = check(open_dataset(f"{name}:{folder}") if kind == "dataset" else find(kind, name))
    assert list(outcome.values()).count("ok") >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_check_on_a_page_passes(page: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r'python -c "(.*?)"', page.read_text(), re.DOTALL)
    exec(code.replace("\\\n", "").replace("FOLDER", str(folder)), {})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_can_be_described(example: Path, capsys) -> None:
    kind = CHECKS[example.stem][0]
    assert main(["describe", kind, NAMES[example.stem], "--plugin", str(example)]) == 0
    assert str(example) in capsys.readouterr().out


def test_methods_are_told_apart_by_the_example_of_a_task(tmp_path: Path, monkeypatch) -> None:
    """What its docstring asks has an answer: nearest keeps the backbone's features, bilinear nearly."""
    if not PACKAGED["dinov2_vits14_focus"].installed:
        pytest.skip("the extra 'demo' is not installed")
    monkeypatch.setattr(cost, "measure", functools.partial(cost.measure, seconds=0.01, memory=False))
    words = ["run", "--plugin", str(ROOT / "examples" / "minimal_task.py"), "--tasks", "fidelity"]
    more = [
        "--methods",
        "nearest,bilinear",
        "--limit",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    assert main([*words, *more]) == 0
    found = {record.cell.method.name: record.metrics["val"]["cosine"] for record in load_records(tmp_path)}
    (nearest,), (bilinear,) = found["nearest"], found["bilinear"]
    assert bilinear < nearest == pytest.approx(1, rel=1e-5)
