"""A GPU that is not there: tensors that say "cuda", hold their values on the CPU, refuse what a GPU refuses.

Placement is what breaks first where a program meets its first GPU: a table left on the CPU, a `zeros`
without a device, a `.numpy()`. All of it shows here, with real values, on any machine. Kernels, rounding and
speed of a GPU do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

Module = TypeVar("Module", bound=nn.Module)

_COPIES = {"aten::_to_copy", "aten::copy_"}
_CPU_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class PretendTensor(Tensor):
    """On "cuda" by its own account. Attributes: held: the values, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda",
            requires_grad=False,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def tolist(self) -> Any:
        """As on a GPU; PyTorch refuses it for subclasses."""
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held!r})"


class _Mode(TorchDispatchMode):
    """Catches tensors that are made on "cuda" from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU where all its tensors are in one place."""
    name = func._schema.name
    device = kwargs.get("device")
    device = torch.device(device) if device is not None else None
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = [leaf for leaf in tensors if isinstance(leaf, PretendTensor)]
    _refuse_mixtures(name, args, tensors, there)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*_held(args), **_held(kwargs))
    moves = device.type == "cuda" if device is not None else bool(there)
    if name == "aten::copy_":
        moves = isinstance(args[0], PretendTensor)
    if not moves or name == "aten::_local_scalar_dense":
        return result
    known = {id(leaf.held): leaf for leaf in there}  # what an operation in place returns is what it was given

    def pretend(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        return known[id(out)] if id(out) in known else PretendTensor(out)

    return tree_map(pretend, result)


def _refuse_mixtures(name: str, args: Any, tensors: list[Tensor], there: list[PretendTensor]) -> None:
    if not there or name in _COPIES:
        return
    here = [leaf for leaf in tensors if not isinstance(leaf, PretendTensor) and leaf.ndim]
    if here and not (name in _CPU_INDICES and isinstance(args[0], PretendTensor)):
        shapes = [[list(tensor.shape) for tensor in place] for place in (there, here)]
        raise RuntimeError(f"{name} of tensors on cuda {shapes[0]} and cpu {shapes[1]}")


def _held(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.held if isinstance(leaf, PretendTensor) else leaf, tree)


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it "cuda" is a device whose tensors pretend. For machines without a GPU.

    Attention takes the `torch` backend, since Triton looks for a driver, and batch normalisation the kernel
    that is not cuDNN's. There are no gradients, as PyTorch's engine looks for a driver, too.
    """
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # one that does nothing, without a driver
    with monkeypatch.context() as patch, _Mode(), torch.backends.cudnn.flags(enabled=False):
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setenv("UPBENCH_ATTENTION", "torch")
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # torch.tensor: made here, then moved
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]


def to_gpu(module: Module) -> Module:
    """A copy with every parameter and buffer on the GPU, as `module.to("cuda")` leaves it.

    What else a module holds stays where it is, as it does there.
    """
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to("cuda"), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to("cuda")
    return module
