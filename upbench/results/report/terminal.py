"""Tables drawn on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Drawing
from rich.text import Text

from upbench.results.report.model import Table


def draw(tables: Sequence[Table], console: Console | None = None) -> None:
    """Draws tables on stdout, the best of each column in bold."""
    console = console or Console()
    for table in tables:
        drawing = Drawing(title=table.title, title_justify="left", title_style="bold")
        drawing.add_column("Method", no_wrap=True)
        for column in table.columns:
            drawing.add_column(Text(column.header), justify="right")
        for row in table.rows:
            values = [(table.value(row, column), column) for column in table.columns]
            texts = [Text(v.format(column), style="bold green" if v.best else "") for v, column in values]
            drawing.add_row(Text(row.label), *texts)
        console.print(drawing)
        for number, text in enumerate(table.footnotes, 1):
            console.print(f"[{number}] {text}", markup=False, highlight=False)
        for note in table.notes:
            console.print(f"· {note}", markup=False, highlight=False, style="dim")
        console.print()
