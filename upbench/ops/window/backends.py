"""Which implementation of window attention runs: by argument, by context, by environment, or by itself."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from upbench.errors import unknown

NAMES = ("torch", "triton", "natten", "reference")
VARIABLE = "UPBENCH_ATTENTION"
AUTO = "auto"

_chosen: list[str] = []


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend of `window_attention` by name while the context lasts, for any method.

    It is for benchmarks and for tests of one backend against another. Contexts nest; the innermost counts.
    An argument `backend` other than "auto" overrules it, and it overrules the environment variable
    UPBENCH_ATTENTION. It holds for the whole process, threads included. Kept attention weights
    (`window_operator`) are always made by PyTorch.

    Args:
        name: One of `NAMES`, or "auto" for the choice that would be made without any of these.

    Raises:
        UpbenchError: No backend has this name.
    """
    _chosen.append(checked(name))
    try:
        yield
    finally:
        _chosen.pop()


def preferred(argument: str = AUTO) -> str:
    """The backend that is asked for: `argument`, else `use_backend`, else UPBENCH_ATTENTION, else "auto".

    Raises:
        UpbenchError: No backend has this name.
    """
    if argument != AUTO:
        return checked(argument)
    if _chosen:
        return _chosen[-1]
    return checked(os.environ.get(VARIABLE) or AUTO, f" (from {VARIABLE})")


def checked(name: str, where: str = "", names: Collection[str] = NAMES) -> str:
    """The name, if it is "auto" or that of a backend.

    Raises:
        UpbenchError: It is neither.
    """
    if name != AUTO and name not in names:
        raise unknown(f"attention backend{where}", name, (AUTO, *names))
    return name
