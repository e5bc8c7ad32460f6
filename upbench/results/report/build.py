"""From records (a DataFrame, one row a cell) to tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upbench.errors import unknown
from upbench.results.report.bootstrap import RESAMPLES, paired_difference
from upbench.results.report.costs import cost_columns, cost_notes, cost_values
from upbench.results.report.model import Column, Row, Table, Value

if TYPE_CHECKING:
    import pandas as pd

Cell = Mapping[str, Any]
"""A row of the DataFrame."""

# what the cells of one table have in common; a split of the dataset makes a table of its own
_COMMON = ("backbone", "dataset", "protocol", "preset", "probe", "seeds", "limit", "dtype", "device")
_ROW = ("method", "weights", "options", "camera")
_RATIO = Column("method/native_ratio", "Native ratio", "x", digits=0)
_DIGITS = {"%": 2, "deg": 2, "m": 3, "": 3}


def build_tables(frame: pd.DataFrame, metrics: str = "main", against: str | None = None) -> list[Table]:
    """A table for each combination of backbone, dataset, split and protocol.

    Args:
        frame: As `upbench.read_records` gives it.
        metrics: "main" for those that each task names as such, "all" for all.
        against: Row or method that the others are compared with, image by image; None for no comparison.

    Raises:
        UpbenchError: `against` names a method that no record has.
    """
    cells = sorted((_plain(cell) for cell in frame.to_dict("records")), key=lambda cell: str(cell["started"]))
    if against is not None:
        names = {name for cell in cells for name in (cell["label"], cell["method"])}
        if against not in names:
            raise unknown("method in these records", against, names)
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in _COMMON), []).append(cell)
    tables = []
    for _, group in sorted(groups.items(), key=lambda item: str(item[0])):
        splits = list(dict.fromkeys(split for cell in group for split in cell["splits"])) or [""]
        for index, split in enumerate(splits):
            builder = _Builder(group, split, main=index == 0, metrics=metrics, against=against)
            tables.append(builder.table())
    return tables


class _Builder:
    """Puts one table together."""

    def __init__(
        self, cells: Sequence[Cell], split: str, main: bool, metrics: str, against: str | None
    ) -> None:
        self.split, self.main, self.metrics, self.against = split, main, metrics, against
        self.footnotes: list[str] = []
        self.rows: dict[tuple[Any, ...], dict[str, Cell]] = {}
        self.replaced = 0
        for cell in cells:  # in order of time: of two records of one cell the later one counts
            row = self.rows.setdefault(tuple(cell[name] for name in _ROW), {})
            self.replaced += cell["task"] in row
            row[cell["task"]] = cell
        self.cells = [cell for row in self.rows.values() for cell in row.values()]
        self.tasks = {cell["task"]: cell["columns"] for cell in self.cells}

    def table(self) -> Table:
        order = sorted(self.rows.items(), key=lambda item: _age(next(iter(item[1].values()))))
        columns = [column for task in self.tasks for column in self._task_columns(task)]
        if self.main:
            columns += [_RATIO] if self._ratios() else []
            columns += cost_columns(self.cells)
        rows = [self._row(by_task) for _, by_task in order]
        head = self.cells[0]
        place = f"{head['dataset']}/{self.split}" if self.split else head["dataset"]
        return Table(
            title=f"{head['backbone']} · {place} · {head['protocol']}",
            facts={name: _shown(head[name]) for name in _COMMON} | {"split": self.split},
            columns=columns,
            rows=_mark_best(rows, columns),
            footnotes=self.footnotes,
            notes=[*self._notes(rows)],
        )

    def _task_columns(self, task: str) -> Iterable[Column]:
        for metric in self.tasks[task]:
            if self.metrics != "all" and not metric["main"]:
                continue
            yield Column(
                key=f"{task}/{metric['name']}",
                title=f"{task} {metric['title']}",
                unit=metric["unit"],
                higher_is_better=metric["higher_is_better"],
                digits=_DIGITS.get(metric["unit"], 3),
                ranked=True,
            )
        if self.against is not None:
            primary = self.tasks[task][0]
            yield Column(
                key=f"{task}/{primary['name']}_vs_{self.against}",
                title=f"Δ {task} {primary['title']}/image vs {self.against}",
                unit=primary["unit"],
                digits=_DIGITS.get(primary["unit"], 3),
            )

    def _row(self, by_task: Mapping[str, Cell]) -> Row:
        values: dict[str, Value] = {}
        for task, cell in by_task.items():
            values |= self._task_values(task, cell)
        cells = list(by_task.values())
        if self.main:
            values |= cost_values(cells)
            values[_RATIO.key] = Value(_number(cells[0].get("native_ratio")))
        label = _label(cells[0])
        return Row(label, values, tuple(dict.fromkeys(text for cell in cells for text in cell["warnings"])))

    def _task_values(self, task: str, cell: Cell) -> dict[str, Value]:
        primary = f"{task}/{self.tasks[task][0]['name']}"
        if cell["status"] != "ok":
            return {primary: Value(text=cell["status"], note=self._footnote(cell))}
        prefix = "" if cell["splits"][:1] == [self.split] else f"{self.split}/"
        values = {}
        for metric in self.tasks[task]:
            name = prefix + metric["name"]
            values[f"{task}/{metric['name']}"] = Value(
                _number(cell.get(name)), _number(cell.get(f"{name}_std"))
            )
        difference = self._difference(task, cell)
        if difference is not None:
            values[f"{primary}_vs_{self.against}"] = difference
        return values

    def _difference(self, task: str, cell: Cell) -> Value | None:
        if self.against is None:
            return None
        bases = [row[task] for row in self.rows.values() if task in row]
        base = next((b for b in bases if self.against in (b["label"], b["method"])), None)
        if (
            base is None
            or base is cell
            or not {self.split} <= set(base["per_image"]) & set(cell["per_image"])
        ):
            return None
        found = paired_difference(cell["per_image"][self.split], base["per_image"][self.split])
        return None if found is None else Value(found.mean, interval=(found.low, found.high))

    def _footnote(self, cell: Cell) -> int:
        text = f"{_label(cell)}, {cell['task']}: {cell['reason'] or 'no reason given'}"
        if text not in self.footnotes:
            self.footnotes.append(text)
        return self.footnotes.index(text) + 1

    def _notes(self, rows: Sequence[Row]) -> Iterable[str]:
        head = self.cells[0]
        yield from _about_the_numbers(head, self._images())
        if self.against is not None:
            yield (
                f"Δ: mean over images of an image's own value minus {self.against}'s, seeds averaged; in "
                f"brackets the 95 % interval of a paired bootstrap over images ({RESAMPLES} resamples). For "
                "segmentation a mean over images is not the mIoU of the split"
            )
        for text in dict.fromkeys(text for row in rows for text in row.warnings):
            labels = [row.label for row in rows if text in row.warnings]
            who = "" if len(labels) == len(rows) and len(rows) > 1 else f"{', '.join(labels)}: "
            yield f"**Warning**: {who}{text}"
        if self.main and self._ratios():
            yield (
                "Native ratio: what the steps of a method upsample by; its output is resized bilinearly from "
                "the next size that they make. Methods without one make every size themselves"
            )
        if self.main:
            yield from cost_notes(self.cells)
        yield from _weights(self.cells)
        yield from _machines(self.cells)
        if self.replaced:
            yield f"{self.replaced} older records of the same cells are left out"

    def _ratios(self) -> bool:
        """Whether some method has a ratio of its own."""
        return any(cell.get("native_ratio") is not None for cell in self.cells)

    def _images(self) -> int | None:
        counts = {
            len(cell["per_image"][self.split]["names"])
            for cell in self.cells
            if self.split in cell["per_image"]
        }
        return max(counts, default=None)


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


def _about_the_numbers(head: Cell, images: int | None) -> Iterable[str]:
    parts = []
    if head["image_size"]:
        parts.append(f"{head['protocol']}: image {head['image_size']} px, output {head['output_size']} px")
    if images:
        parts.append(f"{images} images")
    seeds = int(head["seeds"])
    parts.append(f"mean ± standard deviation over {seeds} seeds of the probe" if seeds > 1 else "one seed")
    if head["dtype"] != "float32":
        parts.append(f"methods in {head['dtype']}")
    yield "; ".join(parts)


def _weights(cells: Iterable[Cell]) -> Iterable[str]:
    found, budgets = {}, {}
    for cell in cells:
        weights = cell["inputs"].get("weights") or {}
        if weights.get("sha256"):
            label, images = _label(cell), weights.get("images_seen")
            trained = "" if images is None else f", trained on {images} images"
            found[label] = f"{label} {weights['name']} (sha256 {weights['sha256'][:12]}{trained})"
            budgets[label] = images
    if found:
        yield f"Weights: {', '.join(sorted(found.values()))}"
    if len(set(budgets.values())) > 1:
        yield f"Training budgets differ: {'; '.join(_by_budget(budgets))}"


def _by_budget(budgets: Mapping[str, int | None]) -> Iterable[str]:
    """Rows of one budget together, the largest first, those that do not tell theirs last."""
    for images in sorted(set(budgets.values()), key=lambda n: -1 if n is None else n, reverse=True):
        rows = ", ".join(sorted(label for label, own in budgets.items() if own == images))
        yield f"{rows} not told" if images is None else f"{rows} {images} images"


def _machines(cells: Iterable[Cell]) -> Iterable[str]:
    found = []
    for cell in cells:
        e = cell["environment"]
        if e:
            gpu = f"{e['gpu']}, " if e.get("gpu") else ""
            torch = e.get("packages", {}).get("torch", "?")
            found.append(f"{gpu}{e['cpu']}, {e['cores']} cores; torch {torch}, upbench {e['upbench']}")
    for text in dict.fromkeys(found):
        yield f"Machine: {text}"


def _label(cell: Cell) -> str:
    """The row's own label, else the method's title with what differs from the defaults."""
    own, method = str(cell["label"]), str(cell["method"])
    return cell["title"] + own[len(method) :] if own.startswith(method) else own


def _age(cell: Cell) -> int:
    """Methods stand in the order of their years, those without one first."""
    return int(cell["year"] or 0)


def _plain(cell: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of the DataFrame with None for what pandas fills in, and whole numbers for counts."""
    plain = {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in cell.items()}
    for name in ("seeds", "limit", "image_size", "output_size", "year"):
        number = plain.get(name)
        plain[name] = None if number is None else int(number)
    return plain


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _shown(value: Any) -> Any:
    return "" if value is None or value == "{}" else value
