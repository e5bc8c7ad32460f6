"""Things are loaded before they are asked for, in order, by threads that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from upbench.system.ahead import ahead

WORKERS = [0, 1, 4]


def until(true: Callable[[], bool]) -> None:
    """Waits for other threads, and gives up after a minute."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("workers", WORKERS)
def test_everything_comes_in_order(workers: int) -> None:
    assert list(ahead(lambda x: x * x, range(50), workers, 6)) == [x * x for x in range(50)]
    assert list(ahead(str, [], workers, 6)) == []


def test_no_more_is_loaded_than_the_window_allows() -> None:
    loaded: list[int] = []

    def load(item: int) -> int:
        loaded.append(item)
        return item

    things = ahead(load, range(100), 2, 5)
    assert next(things) == 0
    until(lambda: len(loaded) == 5)
    assert next(things) == 1
    until(lambda: len(loaded) == 6)
    things.close()
    assert max(loaded) <= 7


def test_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    things = ahead(lambda x: x, items(), 2, 3)
    for expected in range(10):
        assert next(things) == expected
    assert len(taken) <= 3 + 10
    things.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_when_its_turn_does(workers: int) -> None:
    def load(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    things = ahead(load, range(10), workers, 8)
    assert [next(things) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(things)


def test_several_are_loaded_at_once() -> None:
    """None of them would end without the others."""
    barrier = threading.Barrier(3)

    def load(item: int) -> int:
        barrier.wait(timeout=60)
        return item

    assert list(ahead(load, range(9), 3, 9)) == list(range(9))


def test_threads_end_with_whoever_asked() -> None:
    def ours() -> int:
        return sum(thread.name == "upbench-images" for thread in threading.enumerate())

    before = ours()
    things = ahead(lambda x: x, range(100), 3, 4)
    next(things)
    assert ours() == before + 3
    things.close()
    until(lambda: ours() == before)
    list(ahead(lambda x: x, range(10), 3, 4))
    until(lambda: ours() == before)


def test_threads_do_not_hold_what_they_loaded() -> None:
    import gc
    import weakref

    class Large:
        pass

    things = ahead(lambda _: Large(), range(3), 1, 3)
    held = weakref.ref(next(things))
    gc.collect()
    assert held() is None
    things.close()
