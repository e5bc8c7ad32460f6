"""Tensors that depend on sizes alone, computed outside of a trace.

Tables of windows are computed with NumPy. `torch.compile` would look into that, and under `torch.export`
every tensor is a fake one without values. What `constant` marks is computed by plain Python, and the trace
holds its result.

To Dynamo all results of one such function are one tensor, for it knows them by the function's name: a table
of the columns that is longer than that of the rows before it looks like an axis whose length changes. The
graph then has symbolic lengths, or there is none (torch 2.14 cannot guard the shape of a constant). Results
are therefore marked as being of fixed sizes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

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
        # Inside a trace some versions of torch say that they compile, and others (2.9) do not.
        if torch.compiler.is_compiling():
            result = _elsewhere(lambda: function(*args, **kwargs))
        else:
            result = function(*args, **kwargs)
        for tensor in _tensors(result):  # as torch._dynamo.mark_static, which refuses while compiling
            tensor._dynamo_static_indices = set(range(tensor.ndim))  # type: ignore[attr-defined]
        return result

    # As torch.compiler.assume_constant_result, which imports the compiler first: as long again as torch.
    outside._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return outside


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors that a value holds: itself, in a tuple, or as fields of a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


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
