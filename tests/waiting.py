"""Finds what waits for a GPU, on a GPU that is pretended (`pretend_gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pretend_gpu import PretendTensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::equal",
    "aten::_unique2",
    "aten::repeat_interleave",
}


class Waited(AssertionError):
    """Something would have waited for the device."""


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _WAITING and any(isinstance(arg, PretendTensor) for arg in args):
            raise Waited(name)
        if name.startswith(("aten::index", "aten::_index")) and isinstance(args[1], (list, tuple)):
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    raise Waited(f"{name} by a mask")
        copies = name in ("aten::_to_copy", "aten::copy_")
        device = (kwargs or {}).get("device")
        if copies and device is not None and torch.device(device).type != args[0].device.type:
            raise Waited(f"{name} from {args[0].device.type} to {device}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it (and within `pretend_gpu`) what waits for the device raises `Waited`."""

    def tolist(self: PretendTensor) -> Any:
        raise Waited("tolist")

    with monkeypatch.context() as patch, _NoWaiting():
        patch.setattr(PretendTensor, "tolist", tolist)
        yield
