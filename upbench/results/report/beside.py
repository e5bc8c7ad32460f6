"""Published numbers beside measured ones: only where both were measured in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from upbench.results.papers import Published
from upbench.results.records import Record, size
from upbench.results.report.model import Column, Row, Table, Value
from upbench.results.report.notes import partial

MARK = "*"
NOTE = (
    "Published: numbers of papers for the same protocol, dataset, split, backbone, sizes of image and "
    "output, method and options; Δ is measured minus published. Weights may be others than the paper's"
)
NOTE_SECOND_HAND = (
    f"Published numbers with {MARK} are second-hand: not read in the paper or its authors' files"
)
NONE = "No published number has the protocol, dataset, split, backbone and sizes of this table"


def setting(record: Record, split: str) -> tuple[Any, ...]:
    """What a published number must agree with, apart from method and metric; see `setting_of`."""
    cell, protocol = record.cell, record.protocol
    return (
        protocol.get("name") or cell.protocol,
        cell.task,
        cell.dataset,
        split,
        cell.backbone,
        *(size(protocol.get(f"{name}_size")) for name in ("image", "output")),
    )


def setting_of(row: Published) -> tuple[Any, ...]:
    """The same of a published number; that of one without a protocol is that of no record."""
    return row.protocol, row.task, row.dataset, row.split, row.backbone, row.image, row.output


def obstacle(record: Record, split: str) -> str:
    """Why no published number stands beside a record's, whatever its protocol; "" where one may."""
    cell = record.cell
    if cell.limit is not None:
        return f"only {cell.limit} images of a split were taken"
    if cell.probe:
        return "the probe's settings are not the protocol's"
    missing = partial([record], split)
    return f"partial copy, {missing[0]}" if missing else ""


def matching(record: Record, split: str, published: Sequence[Published]) -> list[Published]:
    """The published numbers of a record's method, of all metrics, that were measured as the record was.

    Those of the protocol's own paper come first.
    """
    if obstacle(record, split) or record.status != "ok":
        return []
    method, here = record.cell.method, setting(record, split)
    if method.camera not in ("", "identity"):  # no paper's method knows a true camera
        return []
    variant = ", ".join(f"{name}={value}" for name, value in sorted(method.options.items()))
    found = [
        row
        for row in published
        if row.protocol and row.method == method.name and row.variant == variant and setting_of(row) == here
    ]
    return sorted(found, key=lambda row: not row.protocol.startswith(f"{row.paper.name}-"))


def add(
    table: Table,
    records: Sequence[Sequence[Record]],
    split: str,
    published: Sequence[Published],
    unmeasured: bool,
) -> Table:
    """A table with published numbers beside the measured ones.

    Args:
        table: Of measured numbers.
        records: Those of each of its rows, one a task.
        split: That the table is about.
        published: All numbers that may stand there.
        unmeasured: Whether published methods that were not measured become rows below.
    """
    footnotes = list(table.footnotes)
    found: list[dict[str, list[Published]]] = []  # for each row: key of a metric's column -> numbers
    for of_row in records:
        by_key: dict[str, list[Published]] = {}
        for record in of_row:
            by_key |= _by_column(table, record.cell.task, matching(record, split, published))
        found.append(by_key)
    rows = [
        Row(row.label, {**row.values, **_values(table, row, by_key, footnotes)}, row.warnings)
        for row, by_key in zip(table.rows, found, strict=True)
    ]
    every = [record for of_row in records for record in of_row]
    if unmeasured:
        for label, by_task in _others(every, split, published).items():
            by_key = {}
            for task, numbers in by_task.items():
                by_key |= _by_column(table, task, numbers)
            found.append(by_key)
            if by_key:
                empty = Row(f"{label}, published", {})
                rows.append(Row(empty.label, _values(table, empty, by_key, footnotes)))
    used = {key for by_key in found for key in by_key}
    columns = [
        part
        for column in table.columns
        for part in (column, *(_columns(column) if column.key in used else ()))
    ]
    shown = [numbers[0] for by_key in found for numbers in by_key.values()]
    notes = [*table.notes, *_notes(every, split, shown)]
    return replace(table, columns=columns, rows=rows, footnotes=footnotes, notes=notes)


def _by_column(table: Table, task: str, numbers: Sequence[Published]) -> dict[str, list[Published]]:
    """Numbers by the key of the column that they belong beside, in that column's unit. The papers' order is
    kept; what ran out of memory has no number."""
    found = {}
    for column in table.columns:
        of_task, _, metric = column.key.partition("/")
        fit = [
            row
            for row in numbers
            if of_task == task
            and row.metric == metric
            and row.unit in (column.unit, "")
            and math.isfinite(row.value)
        ]
        if fit:
            found[column.key] = fit
    return found


def _values(
    table: Table, row: Row, by_key: Mapping[str, Sequence[Published]], footnotes: list[str]
) -> dict[str, Value]:
    """The entries of a row in the columns beside those of metrics; new footnotes are appended."""
    found = {}
    for column in table.columns:
        if column.key in by_key:
            first, *others = by_key[column.key]
            also = "; ".join(f"{other.printed} in {other.source}" for other in others)
            source = first.source + (f" (also {also})" if also else "")
            if source not in footnotes:
                footnotes.append(source)
            shown, gap = (part.key for part in _columns(column))
            mark, note = MARK if first.second_hand else "", footnotes.index(source) + 1
            found[shown] = Value(first.value, mark=mark, source=source, note=note)
            measured = table.value(row, column).number
            if measured is not None and math.isfinite(measured):
                found[gap] = Value(measured - first.value)
    return found


def _columns(column: Column) -> tuple[Column, Column]:
    """The two columns beside one of a metric: what is published, and measured minus published."""
    name, unit, digits = column.title, column.unit, column.digits
    return (
        Column(f"{column.key}_published", f"published {name}", unit, column.higher_is_better, digits),
        Column(f"{column.key}_minus_published", f"Δ {name} − published", unit, digits=digits, signed=True),
    )


def _others(
    records: Sequence[Record], split: str, published: Sequence[Published]
) -> dict[str, dict[str, list[Published]]]:
    """Published rows that no record of a table measured: label -> task -> numbers."""
    free = [record for record in records if not obstacle(record, split)]
    settings = {setting(record, split) for record in free}
    taken = {id(row) for record in free for row in matching(record, split, published)}
    found: dict[str, dict[str, list[Published]]] = {}
    for row in published:
        if row.protocol and setting_of(row) in settings and id(row) not in taken:
            found.setdefault(row.row, {}).setdefault(row.task, []).append(row)
    return found


def _notes(records: Sequence[Record], split: str, shown: Sequence[Published]) -> Iterable[str]:
    if shown:
        yield NOTE
        if any(row.second_hand for row in shown):
            yield NOTE_SECOND_HAND
        return
    reasons = dict.fromkeys(reason for record in records if (reason := obstacle(record, split)))
    yield f"No published number stands here: {'; '.join(reasons)}" if reasons else NONE
