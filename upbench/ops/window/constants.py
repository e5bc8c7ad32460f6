"""Tensors that depend on sizes alone, computed outside of a trace.

Tables of windows are computed with NumPy. `torch.compile` would look into that, and under `torch.export`
every tensor is a fake one without values. What `constant` marks is computed by plain Python, and the trace
holds its result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a function whose result a trace shall hold as it is.

    Args:
        function: Returns the same for the same arguments: plain values, or what another such function
            returned.
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return _elsewhere(lambda: function(*args, **kwargs))

    # As torch.compiler.assume_constant_result, which imports the compiler first: as long again as torch.
    outside._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return outside


def _elsewhere(function: Callable[[], T]) -> T:
    """The result of a function in a thread of its own: a tracer's modes hold for its own thread only."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
