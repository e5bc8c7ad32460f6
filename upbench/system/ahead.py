"""Loads things in threads before they are asked for: images decode while a backbone or a probe computes.

Threads and not processes: Pillow, numpy and torch let go of the interpreter's lock where the work is, a
    thread
hands over tensors without a copy, and a worker of a run, which may have no children, can have threads.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], workers: int, window: int
) -> Generator[Loaded, None, None]:
    """What `load` gives for each item, in order, loaded by threads before it is asked for.

    An error of `load` is raised as it is when its turn comes. The threads never hold up the process's end.

    Args:
        load: Safe to call from several threads.
        items: What to load.
        workers: Number of threads; 0 to load in the caller's.
        window: At most so many are loaded and not yet taken.
    """
    if workers < 1:
        yield from map(load, items)
        return
    work: SimpleQueue[Any] = SimpleQueue()
    waiting: deque[Future[Loaded]] = deque()
    for _ in range(workers):
        threading.Thread(target=_serve, args=(load, work), name="upbench-images", daemon=True).start()
    try:
        rest = iter(items)
        more = window
        while True:
            for item in islice(rest, more):
                waiting.append(Future())
                work.put((waiting[-1], item))
            if not waiting:
                return
            yield waiting.popleft().result()
            more = 1
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(workers):
            work.put(None)


def _serve(load: Callable[[Any], Any], work: SimpleQueue[Any]) -> None:
    """What a thread of `ahead` does, until it gets None."""
    while (item := work.get()) is not None:
        future, index = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(load(index))
            except BaseException as error:
                future.set_exception(error)
        del future, item  # what was loaded is the caller's alone
