"""How far a long loop has got: bars with the time left on a terminal, a plain line now and then elsewhere.

    for image in track(images, "features"):
        ...

    with bar("training", total=1000) as progress:
        progress.advance()

Loops may nest. All goes to stderr, so that stdout holds results only. Imports no torch; rich only on a
terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from upbench.errors import harmless, printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

FIRST_LINE_AFTER = 2.0
"""Seconds before a loop says anything where there is no terminal."""
SECONDS_BETWEEN_LINES = 15.0

_quiet = False
_display: Progress | None = None
_open_bars = 0


class Bar:
    """A loop's progress.

    Attributes:
        description: What it does, in a few words.
        total: Steps in all, or None where that is not known.
        done: Steps so far.
    """

    def __init__(self, description: str, total: int | None, done: int = 0) -> None:
        self.description = description
        self.total = total
        self.done = self._before = done
        self.text = ""

    def advance(self, steps: int = 1) -> None:
        """Counts steps that are done."""
        self.done += steps

    def note(self, text: str) -> None:
        """A few words beside the bar, such as a loss."""
        self.text = text

    def close(self) -> None:
        """The loop is over."""


class _RichBar(Bar):
    def __init__(self, description: str, total: int | None, done: int, display: Progress) -> None:
        super().__init__(description, total, done)
        self._display = display
        self._id: TaskID = display.add_task(description, total=total, completed=done, note="")

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        self._display.update(self._id, completed=self.done)

    def note(self, text: str) -> None:
        super().note(text)
        self._display.update(self._id, note=printable(text))

    def close(self) -> None:
        self._display.remove_task(self._id)


class _LineBar(Bar):
    def __init__(self, description: str, total: int | None, done: int) -> None:
        super().__init__(description, total, done)
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_AFTER

    def advance(self, steps: int = 1) -> None:
        super().advance(steps)
        now = time.monotonic()
        if now >= self._next and self.done != self.total:
            self._next = now + SECONDS_BETWEEN_LINES
            say(self.line(now - self._start))

    def line(self, elapsed: float) -> str:
        """The progress after `elapsed` seconds, as in "features: 12/96, 40 s left, loss 0.1"."""
        parts = [f"{self.description}: {self.done}" + (f"/{self.total}" if self.total else "")]
        steps = self.done - self._before
        if self.total and steps:
            parts.append(f"{duration(elapsed / steps * (self.total - self.done))} left")
        return ", ".join([*parts, self.text] if self.text else parts)


@contextmanager
def bar(description: str, total: int | None = None, done: int = 0) -> Iterator[Bar]:
    """A bar for the length of a block.

    Args:
        description: What the block does, in a few words.
        total: Steps in all, or None where that is not known.
        done: Steps that an earlier run has done; they say nothing of the time that is left.
    """
    opened = _open(description, total, done)
    try:
        yield opened
    finally:
        _close(opened)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, counted as they are used.

    Args:
        items: What to go through.
        description: What is done with them, in a few words.
        total: How many there are; their length where that is known.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(description, total) as opened:
        for item in items:
            yield item
            opened.advance()


def say(text: str) -> None:
    """A line on stderr that leaves open bars whole."""
    if _quiet:
        return
    text = harmless(text)
    with suppress(OSError, ValueError):  # a full disk or a closed terminal under stderr ends no run
        if _display is not None:
            _display.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def be_quiet(quiet: bool = True) -> None:
    """Whether this process shows nothing at all (workers do not)."""
    global _quiet
    _quiet = quiet


def duration(seconds: float) -> str:
    """A time as people say it: "40 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _open(description: str, total: int | None, done: int) -> Bar:
    global _display, _open_bars
    description = printable(description)
    if _quiet:
        return Bar(description, total, done)
    if not sys.stderr.isatty():
        return _LineBar(description, total, done)
    if _display is None:
        _display = _new_display()
        _display.start()
    _open_bars += 1
    return _RichBar(description, total, done, _display)


def _close(opened: Bar) -> None:
    global _display, _open_bars
    opened.close()
    if isinstance(opened, _RichBar):
        _open_bars -= 1
        if _open_bars == 0 and _display is not None:
            _display.stop()
            _display = None


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("·"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
