"""What the allocator of the C library keeps of freed memory."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def trim() -> None:
    """Gives freed memory back to the system; does nothing where that cannot be asked for (not glibc).

    Blocks of many sizes, one after the other, leave a heap with holes that the next ones do not fit: in tiles
    of AnyUp's output it grew to twice of what was in use. Some milliseconds.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
