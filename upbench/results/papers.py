"""Published numbers: read from `results/published`, checked, and found by name. Imports no torch.

One CSV file a paper, one line a number; `results/published/README.md` says what the columns mean.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from upbench.errors import UpbenchError, unknown

READ_IN = ("paper", "figure", "repository", "notes", "reproduction")
"""Where a number was read: the paper's text, a figure or a file of its authors, somebody's notes on it, or
somebody else's run of the paper's code."""
SECOND_HAND = ("notes", "reproduction")
UNITS = ("", "%", "points", "m", "deg", "s", "ms", "fps", "MB", "GB", "M", "GFLOPs", "x")
OUT_OF_MEMORY = "OOM"
FILTERS = ("paper", "method", "task", "dataset", "split", "backbone", "protocol", "metric")
"""What numbers are looked for by."""


@dataclass(frozen=True)
class Paper:
    """Where numbers come from.

    Attributes:
        name: That of its file.
        title: What it is called in a line, which is what its method is called.
        arxiv: Number there; "" where it has none.
        year: Of publication.
        code: Address of the official code; "" where there is none.
    """

    name: str
    title: str
    arxiv: str
    year: int
    code: str

    def __str__(self) -> str:
        return f"{self.title} (arXiv {self.arxiv})" if self.arxiv else f"{self.title} ({self.year})"


@dataclass(frozen=True)
class Published:
    """A number that a paper reports. What the paper leaves open is "" or None.

    Attributes:
        paper: Whose number it is.
        table: As in "Table 2".
        task: Name of upbench's task, where it is one.
        dataset: Name of upbench's dataset, where it is one.
        split: That the number was measured on.
        backbone: Name as in `upbench list backbones`, of timm, or as the paper puts it.
        image: Side in pixels of what the backbone sees.
        output: Side of the upsampled features.
        protocol: Name of the protocol that it was measured under; "" where upbench has none that fits.
        method: Name of upbench's method, where it is one.
        variant: Options of the method, as in "scale=8", or in words what upbench's method cannot do.
        weights: Where the method's weights come from, if that is not the method's own release.
        metric: Name of the task's metric, where it is one.
        value: In `unit`; nan for what ran out of memory.
        printed: The value with the digits that the paper gives, or "OOM".
        unit: One of `UNITS`.
        read_in: One of `READ_IN`.
        note: What else must be known.
    """

    paper: Paper
    table: str
    task: str
    dataset: str
    split: str
    backbone: str
    image: int | None
    output: int | None
    protocol: str
    method: str
    variant: str
    weights: str
    metric: str
    value: float
    printed: str
    unit: str
    read_in: str
    note: str

    @property
    def second_hand(self) -> bool:
        """Whether nobody here has seen it in the paper or in its authors' files."""
        return self.read_in in SECOND_HAND

    @property
    def row(self) -> str:
        """The method with what sets it apart, as in "large_image (scale=8)"."""
        return f"{self.method} ({self.variant})" if self.variant else self.method

    @property
    def source(self) -> str:
        """Paper, table, weights, and how the number was come by, in one line."""
        parts = [f"{self.paper}, {self.table}" if self.table else str(self.paper)]
        parts += [f"weights {self.weights}"] if self.weights else []
        if self.second_hand:
            notes, run = "read in notes on the paper", "from a third party's run of its code"
            parts += [f"second-hand: {notes if self.read_in == 'notes' else run}"]
        return "; ".join([*parts, *([self.note] if self.note else [])])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the paper by its name; None for a value that is none."""
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        value = self.value if math.isfinite(self.value) else None
        return {**rest, "paper": self.paper.name, "value": value, "second_hand": self.second_hand}


COLUMNS = tuple(f.name for f in fields(Published) if f.name not in ("paper", "printed"))
"""Of the CSV files."""


def load_published(folder: str | Path | None = None) -> list[Published]:
    """Every published number, in the order of papers and lines.

    Args:
        folder: With `papers.yaml` and a CSV file for each of its papers; None for what comes with upbench.

    Raises:
        UpbenchError: A file is missing or cannot be read, or a line is not what it should be; names it.
    """
    place = Path(folder) if folder is not None else _own_folder()
    papers = _papers(place / "papers.yaml")
    found = [row for paper in papers for row in _rows(place / f"{paper.name}.csv", paper)]
    strays = {file.stem for file in place.glob("*.csv")} - {paper.name for paper in papers}
    if strays:
        raise UpbenchError(f"{place / 'papers.yaml'} does not know the paper of {min(strays)}.csv")
    return found


def select(rows: Iterable[Published], **wanted: str | None) -> list[Published]:
    """The numbers that have the given names.

    Args:
        rows: As `load_published` gives them.
        wanted: Names by the fields of `FILTERS`; None for any.

    Raises:
        UpbenchError: A name that no number has; the nearest one is suggested.
    """
    rows = list(rows)
    found = rows
    for field, name in wanted.items():
        if name is not None:
            known = {_name(row, field) for row in rows} - {""}
            if name not in known:
                raise unknown(f"published {field}", name, known, "see 'upbench published'")
            found = [row for row in found if _name(row, field) == name]
    return found


def _name(row: Published, field: str) -> str:
    return row.paper.name if field == "paper" else str(getattr(row, field))


def _own_folder() -> Path:
    """In a wheel the numbers lie beside this file, in a checkout in `results/published`."""
    here = Path(__file__).resolve()
    places = here.parent / "published", here.parents[2] / "results" / "published"
    for place in places:
        if (place / "papers.yaml").is_file():
            return place
    raise UpbenchError(f"published numbers are missing: there is no {places[0]}; install upbench again")


def _papers(file: Path) -> list[Paper]:
    import yaml

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
        return [Paper(name, **facts) for name, facts in data.items()]
    except OSError as error:
        raise UpbenchError(f"cannot read {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise UpbenchError(f"{file} is no list of papers: {' '.join(str(error).split())}") from None


def _rows(file: Path, paper: Paper) -> list[Published]:
    try:
        with file.open(encoding="utf-8", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UpbenchError(f"{file}: expected the columns {', '.join(COLUMNS)}")
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise UpbenchError(f"cannot read {file}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UpbenchError(f"{file} is no CSV file: {error}") from None
    found: dict[tuple[Any, ...], int] = {}
    rows = []
    for number, line in lines:
        try:
            row = _row(paper, line)
        except ValueError as error:
            raise UpbenchError(f"{file}, line {number}: {error}") from None
        identity = tuple(getattr(row, name) for name in COLUMNS if name != "value")
        if identity in found:
            raise UpbenchError(f"{file}, line {number}: the same number as in line {found[identity]}")
        found[identity] = number
        rows.append(row)
    return rows


def _row(paper: Paper, line: Mapping[str | None, str | None]) -> Published:
    """A line as a number; raises ValueError with what is wrong."""
    if None in line or None in line.values():
        raise ValueError(f"expected {len(COLUMNS)} fields")
    text = {str(name): str(value) for name, value in line.items()}
    for name, field in text.items():
        if field != " ".join(field.split()):
            raise ValueError(f"{name} has spaces to spare: {field!r}")
    for name in ("task", "method", "metric", "value", "read_in"):
        if not text[name]:
            raise ValueError(f"{name} is empty")
    for name, choices in (("unit", UNITS), ("read_in", READ_IN)):
        if text[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(filter(None, choices))}, got {text[name]!r}")
    if text["protocol"] and not all(text[name] for name in ("dataset", "split", "backbone")):
        raise ValueError("a number of a protocol needs a dataset, a split and a backbone")
    value = _value(text["value"], text["unit"])
    sizes = {name: _side(name, text[name]) for name in ("image", "output")}
    rest: dict[str, Any] = {**text, **sizes, "value": value, "printed": text["value"]}
    return Published(paper=paper, **rest)


def _value(text: str, unit: str) -> float:
    if text == OUT_OF_MEMORY:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"value must be a number or {OUT_OF_MEMORY}, got {text!r}") from None
    if not math.isfinite(value) or value < 0 or (unit == "%" and value > 100):
        raise ValueError(f"value is out of range: {text} {unit}".rstrip())
    return value


def _side(name: str, text: str) -> int | None:
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{name} must be a side in pixels, got {text!r}")
    return int(text) if text else None


def protocols_of(rows: Sequence[Published]) -> list[str]:
    """Names of the protocols that there are numbers for."""
    return sorted({row.protocol for row in rows} - {""})
