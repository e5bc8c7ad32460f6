"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Container, Sequence

from upbench.results.report import marks
from upbench.results.report.model import Table


def markdown(tables: Sequence[Table]) -> str:
    """Tables as GitHub renders them: the best in bold, footnotes below."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def _markdown(table: Table) -> str:
    head = ["Method", *(marks.markdown(column.header) for column in table.columns)]
    body = []
    for row in table.rows:
        line = [marks.markdown(row.label)]
        for column in table.columns:
            value = table.value(row, column)
            text = value.format(column)
            line.append(f"**{text}**" if value.best else text)
        body.append(line)
    lines = [f"### {marks.markdown(table.title)}", "", *table_lines(head, body, set(range(1, len(head))))]
    if table.footnotes:
        lines += ["", *(f"[{n}] {marks.markdown(text)}  " for n, text in enumerate(table.footnotes, 1))]
    if table.notes:
        lines += ["", *(f"- {marks.markdown_note(note)}" for note in table.notes)]
    return "\n".join(lines)


def table_lines(head: Sequence[str], body: Sequence[Sequence[str]], right: Container[int]) -> list[str]:
    """A Markdown table, line by line, its columns aligned.

    Args:
        head: Titles of the columns, as Markdown (`marks.markdown`).
        body: Entries, a sequence a row, likewise.
        right: Indices of the columns that are flush right.
    """
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]

    def write(line: Sequence[str]) -> str:
        cells = [
            t.rjust(w) if i in right else t.ljust(w)
            for i, (t, w) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 1) + ":" if i in right else "-" * (w + 2) for i, w in enumerate(widths))
    return [write(head), f"|{rule}|", *map(write, body)]


def comma_separated(tables: Sequence[Table]) -> str:
    """One line a method and table; numbers as they were measured, with their standard deviations beside them.

    A skipped or failed cell has no numbers and says so in the column `remarks`; a published number has its
    source in a column beside it. Text that a spreadsheet would take for a formula begins with a `'`.
    """
    facts = list(dict.fromkeys(name for table in tables for name in table.facts))
    keys = list(dict.fromkeys(column.key for table in tables for column in table.columns))
    spreads = {
        key for table in tables for row in table.rows for key, v in row.values.items() if v.std is not None
    }
    sources = {key for table in tables for row in table.rows for key, v in row.values.items() if v.source}
    ranges = {key for table in tables for row in table.rows for key, v in row.values.items() if v.interval}
    head = [*facts, "method"]
    for key in keys:
        head += [key]
        head += [f"{key}_std"] if key in spreads else []
        head += [f"{key}_low", f"{key}_high"] if key in ranges else []
        head += [f"{key}_source"] if key in sources else []
    out = io.StringIO()
    head += ["remarks"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(marks.cell, head))
    for table in tables:
        for row in table.rows:
            line = {name: marks.cell(value) for name, value in {**table.facts, "method": row.label}.items()}
            remarks = []
            for key, value in row.values.items():
                if value.text:
                    why = f": {table.footnotes[value.note - 1]}" if value.note else ""
                    remarks.append(f"{key.partition('/')[0]} {value.text}{why}")
                line[key] = _number(value.number)
                if key in spreads:
                    line[f"{key}_std"] = _number(value.std)
                if key in ranges and value.interval:
                    line[f"{key}_low"], line[f"{key}_high"] = map(_number, value.interval)
                if key in sources:
                    line[f"{key}_source"] = marks.cell(value.source)
            line["remarks"] = marks.cell("; ".join(dict.fromkeys([*remarks, *row.warnings])))
            writer.writerow([line.get(name, "") for name in head])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(value)
