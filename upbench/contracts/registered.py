"""Registration by subclassing: what methods, tasks and datasets have in common. Imports no torch."""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

from upbench.errors import UpbenchError
from upbench.values import word


def origin(cls: type) -> str:
    """Where a class was written, as a user would look for it: a file, else a module."""
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):
        return cls.__module__


def undefined(cls: type) -> list[str]:
    """Names of the abstract methods and properties that a class leaves undefined, sorted.

    `__abstractmethods__` has them only after the class is made, and only of classes whose metaclass is
    `ABCMeta`, which `nn.Module` is not.
    """
    values = ((name, inspect.getattr_static(cls, name, None)) for name in dir(cls))
    return [name for name, value in values if getattr(value, "__isabstractmethod__", False)]


class Registered:
    """A family of plugins. A subclass that sets `name` in its body is registered under that name.

    The family's root sets `kind` and an empty `registered` of its own. A subclass without a `name` of its own
    is an abstract step and stays out of the table; one with a name has to define every abstract method.
    """

    kind: ClassVar[str]
    registered: ClassVar[dict[str, type]]
    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("name")
        if name is None:
            return
        try:
            word(f"{cls.kind} name", name)
        except UpbenchError as error:
            raise UpbenchError(f"{error} ({cls.__qualname__} in {origin(cls)})") from None
        if missing := undefined(cls):
            raise UpbenchError(f"{cls.kind} '{name}' ({origin(cls)}) must define {', '.join(missing)}")
        other = cls.registered.get(name)
        if other is not None and not _same_source(cls, other):
            raise UpbenchError(
                f"two {cls.kind}s claim the name '{name}': {other.__qualname__} ({origin(other)}) and "
                f"{cls.__qualname__} ({origin(cls)})"
            )
        cls.registered[name] = cls


def _same_source(a: type, b: type) -> bool:
    """Whether `a` is `b` executed again (a reloaded module, a notebook cell), not a second plugin."""
    if a.__qualname__ != b.__qualname__:
        return False
    if a.__module__ == b.__module__ and a.__module__ in sys.modules:
        return True
    return origin(a) == origin(b) and origin(a).endswith(".py")
