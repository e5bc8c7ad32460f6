"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

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
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]

    def write(line: Sequence[str]) -> str:
        first, *rest = line
        cells = [first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    lines = [f"### {marks.markdown(table.title)}", "", write(head), rule, *map(write, body)]
    if table.footnotes:
        lines += ["", *(f"[{n}] {marks.markdown(text)}  " for n, text in enumerate(table.footnotes, 1))]
    if table.notes:
        lines += ["", *(f"- {marks.markdown_note(note)}" for note in table.notes)]
    return "\n".join(lines)


def comma_separated(tables: Sequence[Table]) -> str:
    """One line a method and table; numbers as they were measured, with their standard deviations beside them.

    A skipped or failed cell has no numbers and says so in the column `remarks`. Text that a spreadsheet would
    take for a formula begins with a `'`.
    """
    facts = list(dict.fromkeys(name for table in tables for name in table.facts))
    keys = list(dict.fromkeys(column.key for table in tables for column in table.columns))
    spreads = {
        key for table in tables for row in table.rows for key, v in row.values.items() if v.std is not None
    }
    ranges = {key for table in tables for row in table.rows for key, v in row.values.items() if v.interval}
    head = [*facts, "method"]
    for key in keys:
        head += [key]
        head += [f"{key}_std"] if key in spreads else []
        head += [f"{key}_low", f"{key}_high"] if key in ranges else []
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
            line["remarks"] = marks.cell("; ".join(dict.fromkeys([*remarks, *row.warnings])))
            writer.writerow([line.get(name, "") for name in head])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(value)
