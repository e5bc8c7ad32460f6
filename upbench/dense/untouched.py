"""Tells which of the tensors that a plugin was given it has changed in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from upbench.errors import UpbenchError


class Untouched:
    """Tensors that are handed to a plugin and have to be the same when it is through.

    A tensor counts the operations that change it or one of its views in place (`Tensor._version`), so that
    looking costs nothing. What goes past torch (`.data`, NumPy) is not counted: tensors that other cells see,
    too, are therefore handed out as copies where that is cheap.
    """

    def __init__(self, who: str, **given: object) -> None:
        """Args: who: is given them, as in "method 'x'"; given: Name for messages -> a tensor, or what holds
        some: a module, a mapping, a sequence, a dataclass."""
        self._who = who
        self._noted: list[tuple[str, Tensor, int]] = []
        for name, value in given.items():
            self.note(name, value)

    def note(self, name: str, value: object) -> None:
        """From now on this has to stay the same, too."""
        known = (tensor for tensor in _tensors(value) if not tensor.is_inference())  # those count nothing
        self._noted += [(name, tensor, tensor._version) for tensor in known]

    def check(self) -> None:
        """Looks whether they are the same.

        Raises:
            UpbenchError: One of them was changed.
        """
        for name, tensor, version in self._noted:
            if tensor._version != version:
                raise UpbenchError(
                    f"{self._who} changes its {name.replace('_', ' ')} in place; it must work on a copy, "
                    "as clone() makes"
                )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
