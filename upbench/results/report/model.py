"""What a table is, apart from how it is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EMPTY = "–"
_HUGE, _TINY = 1e15, 1e-9  # beyond, numbers are written with an exponent


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        key: Name, as in "seg/miou".
        title: Header without unit and arrow.
        unit: As in "%"; "" for a plain number.
        higher_is_better: Direction, or None where there is none.
        digits: Decimals; None for three significant digits.
        ranked: Whether the best value is marked.
        signed: Whether its numbers are differences.
    """

    key: str
    title: str
    unit: str = ""
    higher_is_better: bool | None = None
    digits: int | None = None
    ranked: bool = False
    signed: bool = False

    @property
    def header(self) -> str:
        """As in "seg mIoU (%) ↑"."""
        unit = f" ({self.unit})" if self.unit else ""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.title}{unit}{arrow}"

    def format(self, number: float) -> str:
        """A number with this column's decimals."""
        if abs(number) >= _HUGE:
            return f"{number:.3g}"
        if self.digits is not None:
            return f"{number:.{self.digits}f}"
        if abs(number) < _TINY:
            return "0" if number == 0 else f"{number:.3g}"
        return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


@dataclass(frozen=True)
class Value:
    """An entry of a table.

    Attributes:
        number: The value, or None.
        std: Standard deviation over seeds, or None.
        interval: Ends of a confidence interval, or None; the number is then a difference and has a sign.
        spread: Quartiles, or None.
        text: What stands in place of a number, as in "failed".
        mark: What stands behind the number, as in "*".
        source: Where a number comes from that was not measured here; a footnote says the same.
        note: Number of the footnote that explains it, or None.
        best: Whether it is the best of its column.
    """

    number: float | None = None
    std: float | None = None
    interval: tuple[float, float] | None = None
    spread: tuple[float, float] | None = None
    text: str = ""
    mark: str = ""
    source: str = ""
    note: int | None = None
    best: bool = False

    def format(self, column: Column) -> str:
        """The entry as plain text, without a mark for the best."""
        if self.number is None or not math.isfinite(self.number):
            parts = [self.text or EMPTY]
        elif self.interval is not None and all(map(math.isfinite, self.interval)):
            low, high = (_signed(column, end) for end in self.interval)
            parts = [_signed(column, self.number), f"[{low}, {high}]"]
        else:
            number = _signed(column, self.number) if column.signed else column.format(self.number)
            parts = [number + self.mark]
            if self.std is not None and math.isfinite(self.std):
                parts += ["±", column.format(self.std)]
            if self.spread is not None and all(map(math.isfinite, self.spread)):
                parts += [f"({'–'.join(column.format(end) for end in self.spread)})"]
        return " ".join(parts) + (f" [{self.note}]" if self.note else "")


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        label: Its name.
        values: By key of the column; what is missing was not run.
        warnings: What a reader of its numbers must know.
    """

    label: str
    values: Mapping[str, Value]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Methods down, numbers across.

    Attributes:
        title: Backbone, dataset, split and protocol.
        facts: The same by name, for formats that have columns for them.
        columns: In order.
        rows: In order.
        footnotes: Texts; entries refer to them from 1.
        notes: What else a reader must know: protocol, machine, warnings.
    """

    title: str
    facts: Mapping[str, Any]
    columns: Sequence[Column]
    rows: Sequence[Row]
    footnotes: Sequence[str] = ()
    notes: Sequence[str] = ()

    def value(self, row: Row, column: Column) -> Value:
        """An entry; an empty one where nothing was measured."""
        return row.values.get(column.key, Value())


def _signed(column: Column, number: float) -> str:
    text = column.format(number)
    return text if text.startswith("-") else f"+{text}"
