"""From records to tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from upbench.errors import UpbenchError, unknown
from upbench.results.papers import Published
from upbench.results.records import Record, Spread
from upbench.results.report import beside, notes
from upbench.results.report.bootstrap import paired_difference
from upbench.results.report.costs import cost_columns, cost_notes, cost_values
from upbench.results.report.model import Column, Row, Table, Value

_RATIO = Column("method/native_ratio", "Native ratio", "x", digits=0)
_DIGITS = {"%": 2, "deg": 2, "m": 3, "": 3}
_NO_METRICS = {"name": "result", "title": "", "unit": "", "higher_is_better": None, "main": True}


def build_tables(
    records: Iterable[Record],
    metrics: str = "main",
    against: str | None = None,
    published: Sequence[Published] | None = None,
    unmeasured: bool = False,
) -> list[Table]:
    """A table for each combination of backbone, dataset, content of the dataset, split and protocol.

    Settings of the probe, the number of seeds, a limit on images, device and dtype make tables of their own,
    too: what stands in one table can be compared.

    Args:
        records: As `upbench.load_records` gives them.
        metrics: "main" for those that each task names as such, "all" for all.
        against: Row that the others are compared with, image by image, else the method, if it is one row;
            None for no comparison.
        published: Numbers of papers, as `upbench.results.papers.load_published` gives them. Those that were
            measured as a table's were (`upbench.results.report.beside`) stand beside them. None for none.
        unmeasured: Whether published methods that have no row get one, below the others.

    Raises:
        UpbenchError: These are no records, `against` names no row of them, or several rows.
    """
    given = _records(records)
    if against is not None:
        names = {name for record in given for name in _names(record)}
        if against not in names:
            raise unknown("method in these records", against, names)
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in sorted(given, key=lambda record: record.started):
        groups.setdefault(tuple(_facts(record).values()), []).append(record)
    contents: dict[tuple[str, ...], set[str]] = {}
    for record in given:
        contents.setdefault(_place(record), set()).add(record.content)
    tables = []
    for _, group in sorted(groups.items(), key=lambda item: str(item[0])):
        several = len(contents[_place(group[0])]) > 1
        splits = list(dict.fromkeys(split for record in group for split in record.metrics)) or [""]
        for index, split in enumerate(splits):
            builder = _Builder(group, split, main=index == 0, metrics=metrics, against=against)
            table = builder.table(several)
            if published is not None:
                table = beside.add(table, builder.ordered(), split, published, unmeasured)
            tables.append(table)
    return tables


def _records(records: Iterable[Record]) -> list[Record]:
    """The records, where they are some."""
    other = hasattr(records, "columns")  # a DataFrame, or a record alone
    given = [] if other else list(records)
    if other or not all(isinstance(record, Record) for record in given):
        kind = type(records).__name__
        raise UpbenchError(f"tables are made of records, not of a {kind}: use upbench.load_records(folder)")
    return given


def _names(record: Record) -> tuple[str, str, str]:
    """What a user may call a row: as tables do, as the command line does, and by its method alone."""
    return record.row, record.cell.method.title, record.cell.method.name


def _place(record: Record) -> tuple[str, ...]:
    """What a heading says of every table."""
    return record.cell.backbone, record.cell.dataset, record.protocol_label


def _facts(record: Record) -> dict[str, Any]:
    """What the records of one table have in common."""
    cell = record.cell
    return {
        "backbone": cell.backbone,
        "dataset": cell.dataset,
        "protocol": record.protocol_label,
        "preset": cell.protocol,
        "probe": json.dumps(dict(cell.probe), sort_keys=True),
        "seeds": len(cell.seeds),
        "limit": cell.limit,
        "dtype": cell.dtype,
        "device": cell.device,
        "data": record.content,
    }


def _identity(record: Record) -> tuple[str, ...]:
    """What makes a row; its label does not."""
    method = record.cell.method
    return method.name, method.weights, json.dumps(dict(method.options), sort_keys=True), method.camera


class _Builder:
    """Puts one table together."""

    def __init__(
        self, records: Sequence[Record], split: str, main: bool, metrics: str, against: str | None
    ) -> None:
        self.split, self.main, self.metrics, self.against = split, main, metrics, against
        self.footnotes: list[str] = []
        self.rows: dict[tuple[str, ...], dict[str, Record]] = {}
        self.labels: dict[tuple[str, ...], str] = {}
        self.replaced = 0
        for record in records:  # in order of time: of two records of one cell the later one counts
            row, task = _identity(record), record.cell.task
            self.replaced += task in self.rows.setdefault(row, {})
            self.rows[row][task] = record
            self.labels[row] = record.row
        self.records = [record for row in self.rows.values() for record in row.values()]
        self.tasks: dict[str, dict[str, Mapping[str, Any]]] = {}  # task -> metric -> its column
        for record in self.records:
            known = self.tasks.setdefault(record.cell.task, {})
            known |= {metric["name"]: metric for metric in record.columns}
        self.base = self._base()

    def _base(self) -> tuple[str, ...] | None:
        """The row that the others are compared with, if this table has it."""
        for place in range(3) if self.against is not None else ():
            found = [
                row
                for row, by_task in self.rows.items()
                if any(_names(record)[place] == self.against for record in by_task.values())
            ]
            if len(found) > 1:
                labels = ", ".join(f"'{self.labels[row]}'" for row in found)
                raise UpbenchError(f"'{self.against}' is {len(found)} rows: name one of {labels}")
            if found:
                return found[0]
        return None

    def table(self, several: bool) -> Table:
        """The table.

        Args:
            several: Whether its heading must tell the content of the dataset from others of that name.
        """
        columns = [column for task in self.tasks for column in self._task_columns(task)]
        if self.main:
            columns += [_RATIO] if self._ratios() else []
            columns += cost_columns(self.records)
        rows = [self._row(row) for row in self._order()]
        head = self.records[0]
        place = f"{head.cell.dataset}/{self.split}" if self.split else head.cell.dataset
        parts = [head.cell.backbone, place, head.protocol_label]
        parts += [f"data {head.content[:8]}"] if several and head.content else []
        facts = {name: _shown(value) for name, value in _facts(head).items()}
        data = facts.pop("data")
        return Table(
            title=" · ".join(parts),
            facts={**facts, "split": self.split, "data": data},
            columns=columns,
            rows=_mark_best(rows, columns),
            footnotes=self.footnotes,
            notes=[*self._notes(rows)],
        )

    def ordered(self) -> list[list[Record]]:
        """The records of each row of the table."""
        return [list(self.rows[row].values()) for row in self._order()]

    def _order(self) -> list[tuple[str, ...]]:
        return sorted(self.rows, key=lambda row: _age(next(iter(self.rows[row].values()))))

    def _primary(self, task: str) -> Mapping[str, Any]:
        return next(iter(self.tasks[task].values()), _NO_METRICS)

    def _task_columns(self, task: str) -> Iterable[Column]:
        primary = self._primary(task)
        for metric in self.tasks[task].values() or [primary]:
            if self.metrics != "all" and not metric["main"] and metric is not primary:
                continue
            yield Column(
                key=f"{task}/{metric['name']}",
                title=f"{task} {metric['title']}".rstrip(),
                unit=metric["unit"],
                higher_is_better=metric["higher_is_better"],
                digits=_DIGITS.get(metric["unit"], 3),
                ranked=metric["higher_is_better"] is not None,
            )
        if self.against is not None:
            yield Column(
                key=f"{task}/{primary['name']}_vs_{self.against}",
                title=f"Δ {task} {primary['title']}/image vs {self.against}",
                unit=primary["unit"],
                digits=_DIGITS.get(primary["unit"], 3),
            )

    def _row(self, row: tuple[str, ...]) -> Row:
        values: dict[str, Value] = {}
        records = list(self.rows[row].values())
        for record in records:
            values |= self._task_values(record, self.labels[row])
        if self.main:
            values |= cost_values(records)
            ratio = records[0].about.get("native_ratio")
            values[_RATIO.key] = Value(None if ratio is None else float(ratio))
        told = [text for record in records for text in record.warnings]
        told += [f"{notes.PARTIAL}: {text}" for text in notes.partial(records, self.split)]
        return Row(self.labels[row], values, tuple(dict.fromkeys(told)))

    def _task_values(self, record: Record, label: str) -> dict[str, Value]:
        task = record.cell.task
        primary = f"{task}/{self._primary(task)['name']}"
        if record.status != "ok":
            return {primary: Value(text=record.status, note=self._footnote(record, label))}
        values = {}
        for name, numbers in record.metrics.get(self.split, {}).items():
            spread = Spread.of(numbers)
            values[f"{task}/{name}"] = Value(spread.mean, spread.std)
        difference = self._difference(record)
        if difference is not None:
            values[f"{primary}_vs_{self.against}"] = difference
        return values

    def _difference(self, record: Record) -> Value | None:
        base = self.rows[self.base].get(record.cell.task) if self.base is not None else None
        if base is None or base is record or base.columns[:1] != record.columns[:1]:
            return None
        ours, theirs = record.per_image.get(self.split), base.per_image.get(self.split)
        found = paired_difference(ours, theirs) if ours and theirs else None
        return None if found is None else Value(found.mean, interval=(found.low, found.high))

    def _footnote(self, record: Record, label: str) -> int:
        text = f"{label}, {record.cell.task}: {record.reason or 'no reason given'}"
        if text not in self.footnotes:
            self.footnotes.append(text)
        return self.footnotes.index(text) + 1

    def _notes(self, rows: Sequence[Row]) -> Iterable[str]:
        yield from notes.numbers(self.records, self.split)
        yield from notes.protocol(self.records)
        partial = notes.partial(self.records, self.split)
        yield from (f"**{notes.PARTIAL}**: {text}" for text in partial)
        if self.against is not None:
            yield notes.differences(self.against)
        yield from notes.warnings(rows, told=[f"{notes.PARTIAL}: {text}" for text in partial])
        if self.main:
            yield from [notes.RATIO] if self._ratios() else []
            yield from cost_notes(self.records)
        labels = [(self.labels[row], record) for row in self.rows for record in self.rows[row].values()]
        yield from notes.weights(labels)
        yield from notes.machines(self.records)
        if self.replaced:
            yield f"{self.replaced} older records of the same cells are left out"

    def _ratios(self) -> bool:
        """Whether some method has a ratio of its own."""
        return any(record.about.get("native_ratio") is not None for record in self.records)


def _mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    """The rows with the best of each ranked column marked; values that look equal share the mark."""
    marked = [dict(row.values) for row in rows]
    for column in columns:
        held = {
            i: float(column.format(value.number))
            for i, row in enumerate(rows)
            if (value := row.values.get(column.key))
            and value.number is not None
            and math.isfinite(value.number)
        }
        if not column.ranked or len(held) < 2 or len(set(held.values())) == 1:
            continue
        best = max(held.values()) if column.higher_is_better else min(held.values())
        for i, number in held.items():
            if number == best:
                marked[i][column.key] = replace(marked[i][column.key], best=True)
    return [replace(row, values=values) for row, values in zip(rows, marked, strict=True)]


def _shown(value: Any) -> Any:
    return "" if value is None or value == "{}" else value


def _age(record: Record) -> int:
    """Methods stand in the order of their years, those without one first."""
    return record.about.get("year") or 0
