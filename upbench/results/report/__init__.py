"""Tables from records: a DataFrame, to `Table`s, to text. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import unknown
from upbench.results.report.build import build_tables
from upbench.results.report.model import Column, Row, Table, Value
from upbench.results.report.text import comma_separated, markdown

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMATS", "Column", "Row", "Table", "Value", "build_tables", "render", "show", "write"]

FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {"md": markdown, "csv": comma_separated}
"""How tables are written down, by the name of the format."""


def render(frame: pd.DataFrame, format: str = "md", **options: Any) -> str:
    """The tables of some records as text.

    Args:
        frame: As `upbench.read_records` gives it.
        format: A key of `FORMATS`.
        options: As for `build_tables`.

    Raises:
        UpbenchError: Unknown format, or a method to compare with that no record has.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    return FORMATS[format](build_tables(frame, **options))


def show(frame: pd.DataFrame, format: str = "md", **options: Any) -> None:
    """Prints the tables to stdout; Markdown is drawn where that is a terminal. Arguments as `render`."""
    if format == "md" and sys.stdout.isatty():
        from upbench.results.report.terminal import draw

        draw(build_tables(frame, **options))
    else:
        print(render(frame, format, **options), end="")


def write(frame: pd.DataFrame, format: str, path: str | Path, **options: Any) -> None:
    """Writes the tables to a file, whole or not at all. Arguments as `render`.

    Raises:
        UpbenchError: As `render`, or the file cannot be written.
    """
    from upbench.system.cache import replacing

    text = render(frame, format, **options)
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
