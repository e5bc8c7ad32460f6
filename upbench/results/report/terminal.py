"""Tables drawn on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Drawing
from rich.text import Text

from upbench.errors import printable
from upbench.results.report.model import Table
from upbench.system.outputs import stdout_errors


def draw(tables: Sequence[Table], console: Console | None = None) -> None:
    """Draws tables on stdout, the best of each column in bold."""
    console = console or Console()
    for table in tables:
        drawing = Drawing(title=_text(table.title), title_justify="left", title_style="bold")
        drawing.add_column("Method", no_wrap=True)
        for column in table.columns:
            drawing.add_column(_text(column.header), justify="right")
        for row in table.rows:
            values = [(table.value(row, column), column) for column in table.columns]
            texts = [Text(v.format(column), style="bold green" if v.best else "") for v, column in values]
            drawing.add_row(_text(row.label), *texts)
        with stdout_errors():
            console.print(drawing)
            for number, text in enumerate(table.footnotes, 1):
                console.print(_text(f"[{number}] {text}"))
            for note in table.notes:
                console.print(_text(f"· {note}"), style="dim")
            console.print()


def _text(words: str) -> Text:
    """Words as they are: brackets are no markup, and escapes do nothing to the terminal."""
    return Text(printable(words))
