"""The documentation against the code: the table of methods, and links between pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from upbench.contracts.upsampler import Upsampler
from upbench.registry import plugins

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
COLUMNS = [
    *("method", "title", "paper", "year", "sees", "parameters", "C = 384", "C = 768"),
    *("ratio", "weights", "license", "deviations"),
]
METHODS = sorted(name for name, cls in plugins("method").items() if cls.__module__.startswith("upbench."))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows() -> dict[str, dict[str, str]]:
    """Method -> cells of its row, by column."""
    found: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.match(r"\[`(\w+)`\]\(#", cells[0])
        if name is not None:
            assert len(cells) == len(COLUMNS), line
            assert name[1] not in found, f"{name[1]} stands in {PAGE.name} twice"
            found[name[1]] = dict(zip(COLUMNS, cells, strict=True))
    return found


def anchors(page: Path) -> set[str]:
    """What links can lead to in a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def count(formula: str, channels: int) -> float:
    """A formula such as "7 C² + 347.5 C + 21,648" at some C."""
    terms = re.fullmatch(r"(?:(?:[\d,.]+ )?C²?|[\d,.]+)(?: \+ (?:(?:[\d,.]+ )?C²?|[\d,.]+))*", formula)
    assert terms is not None, formula
    total = 0.0
    for term in formula.replace(",", "").split(" + "):
        factor, _, power = term.partition("C")
        unit = 1 if "C" not in term else channels ** (2 if power else 1)
        total += float(factor.strip() or 1) * unit
    return total


def parameters(cls: type[Upsampler], channels: int) -> int:
    return sum(p.numel() for p in cls.build(channels=channels).parameters())


def test_the_table_has_the_methods_that_there_are():
    assert "| " + " | ".join(COLUMNS) + " |" in PAGE.read_text()
    assert sorted(rows()) == METHODS


def test_the_readme_counts_them_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert f" {len(METHODS)} methods " in text
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("name", METHODS)
def test_facts_of_a_method(name):
    cls, row = plugins("method")[name], rows()[name]
    assert row["title"] == cls.title
    assert row["year"] == (str(cls.year) if cls.year else "–")
    assert row["license"] == (cls.license or "–")
    assert row["ratio"] == (str(cls.native_ratio) if cls.native_ratio else "any")
    number = r"\b\d{4}\.\d{5}\b"
    assert set(re.findall(number, row["paper"])) == set(re.findall(number, cls.paper))
    author = cls.paper.removeprefix("Baseline in ").removeprefix("After ").split()[0].rstrip(",")
    assert author in row["paper"] or author == "Textbook"

    sees = set(row["sees"].split(", ")) - {"–"}
    assert sees <= {"image", "features", "camera", "backbone"}
    assert ("image" in sees, "camera" in sees, "backbone" in sees) == (
        cls.guided,
        cls.uses_camera,
        cls.uses_backbone,
    )
    assert not (cls.linear and "features" in sees)
    assert sees or cls.linear  # without an image either the features decide, or nothing


@pytest.mark.parametrize("name", METHODS)
def test_parameters_of_a_method(name):
    cls, row = plugins("method")[name], rows()[name]
    for channels in (96, 384, 768):
        assert count(row["parameters"], channels) == parameters(cls, channels)
    for channels in (384, 768):
        assert row[f"C = {channels}"] == f"{parameters(cls, channels):,}"


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_a_method(name):
    """How many there are stands in the table, which in the method's section."""
    cls, text = plugins("method")[name], PAGE.read_text()
    shipped = sum(not entry.remote for entry in cls.weights.values())
    counts = ((shipped, "shipped"), (len(cls.weights) - shipped, "official"))
    assert rows()[name]["weights"] == ", ".join(f"{n} {kind}" for n, kind in counts if n)
    sections = [part for part in text.split("\n## ")[1:] if name in part.splitlines()[0].split(", ")]
    if cls.weights:
        assert len(sections) == 1
        assert [w for w in cls.weights if f"`{w}`" not in sections[0]] == []


def test_formulas_are_understood():
    assert count("7 C² + 347.5 C + 21,648", 4) == 7 * 16 + 347.5 * 4 + 21648
    assert count("C² + C + 1", 3) == 13
    assert count("102,592", 5) == 102592


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a file of the repository and, within a page, to a heading of it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_papers_protocols_are_on_their_page():
    """Each by its name, with what `exact` says of it."""
    text = (ROOT / "docs" / "protocols.md").read_text()
    stated: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| `"):
            continue
        verdict = cells[-1].partition(":")[0].partition(",")[0]
        stated |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), verdict)
    papers = {
        name: cls
        for name, cls in plugins("protocol").items()
        if cls.__module__.startswith("upbench.protocols.") and cls.__module__ != "upbench.protocols.own"
    }
    told = {name: cls.exact.partition(":")[0] for name, cls in papers.items()}
    others = {other: told[name] for name, cls in papers.items() for other in cls.other_names}
    assert stated == {**told, **others}
