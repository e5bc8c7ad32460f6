"""Tables: from records to `Table`s to text. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from upbench.errors import system_errors, unknown
from upbench.results.records import Record
from upbench.results.report.build import build_tables
from upbench.results.report.model import Column, Row, Table, Value
from upbench.results.report.text import comma_separated, markdown
from upbench.system.outputs import emit, writable_file

__all__ = ["FORMATS", "Column", "Row", "Table", "Value", "build_tables", "render", "show", "write"]

FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {"md": markdown, "csv": comma_separated}
"""How tables are written down, by the name of the format."""


def render(records: Iterable[Record], format: str = "md", **options: Any) -> str:
    """The tables of some records as text.

    Args:
        records: As `upbench.load_records` gives them.
        format: A key of `FORMATS`.
        options: As for `build_tables`.

    Raises:
        UpbenchError: Unknown format, no records, or a row to compare with that none of them has.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    return FORMATS[format](build_tables(records, **options))


def show(records: Iterable[Record], format: str = "md", **options: Any) -> None:
    """Prints the tables to stdout; Markdown is drawn where that is a terminal. Arguments as `render`."""
    if format == "md" and sys.stdout.isatty():
        from upbench.results.report.terminal import draw

        draw(build_tables(records, **options))
    else:
        emit(render(records, format, **options), end="")


def write(records: Iterable[Record], format: str, path: str | Path, **options: Any) -> None:
    """Writes the tables to a file, whole or not at all. Arguments as `render`.

    Raises:
        UpbenchError: As `render`, or the file cannot be written.
    """
    from upbench.system.cache import replacing

    place = writable_file("table", path)
    text = render(records, format, **options)
    with system_errors("write the table to", path), replacing(place) as temporary:
        temporary.write_text(text, encoding="utf-8")
