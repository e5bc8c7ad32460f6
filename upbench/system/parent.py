"""Ends a process with the one that started it, however that ended. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_parent(wait: Callable[[], object] | None = None) -> None:
    """From now on this process ends when its parent does: `kill -9` leaves that no chance to end it.

    Linux sends a signal, which nothing can hold up. Elsewhere, and where the parent is gone already, a thread
    notices.

    Args:
        wait: Returns when the parent is gone; by default the thread looks once a second.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def watch() -> None:
        (wait or look)()
        os._exit(1)

    threading.Thread(target=watch, name="upbench-parent", daemon=True).start()
