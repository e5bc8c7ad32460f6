"""A GPU that is not there: tensors that say "cuda", hold their values on the CPU, refuse what a GPU refuses.

Placement is what breaks first where a program meets its first GPU: a table left on the CPU, a `zeros`
without a device, a `.numpy()`. All of it shows here, with real values, on any machine. Kernels, rounding and
speed of a GPU do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
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
    kwargs.pop("pin_memory", None)  # there is no driver to pin it
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


def can_pretend() -> bool:
    """Whether this PyTorch has what it takes; 2.9 has not."""
    return hasattr(torch._C, "_ensureCUDADeviceGuardSet")


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it "cuda" is a device whose tensors pretend. For machines without a GPU.

    Attention takes the `torch` backend, since Triton looks for a driver, and batch normalisation the kernel
    that is not cuDNN's. Gradients come by `backward` below, as PyTorch's engine looks for a driver, too; so
    does pinned memory, which is then as any other.
    """
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # one that does nothing, without a driver
    with monkeypatch.context() as patch, _Mode(), torch.backends.cudnn.flags(enabled=False):
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.autograd, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad)
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
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


# ------------------------------------------------------------------------------------------ gradients


def backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
    """`torch.autograd.backward`, node by node: every derivative is computed where its tensors are."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    grads = [grad_tensors] if isinstance(grad_tensors, Tensor) else grad_tensors or [None] * len(tensors)
    for node, gradient in _reached(tensors, list(grads)).items():
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, the same way; of leaves alone."""
    outputs, inputs = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    grads = [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs or [None] * len(outputs)
    found = _reached(outputs, grads)
    return tuple(found[get_gradient_edge(leaf).node] for leaf in inputs)


@torch.no_grad()
def _reached(outputs: Sequence[Any], grads: Sequence[Tensor | None]) -> dict[Any, Tensor]:
    """Gradients of the leaves of a graph, by the nodes that would accumulate them.

    Args: outputs: Tensors, or edges of the graph; grads: Theirs, None for one.
    """
    incoming: dict[Any, list[Tensor | None]] = {}

    def add(node: Any, number: int, gradient: Tensor | None) -> None:
        if node is not None and gradient is not None:
            held = incoming.setdefault(node, [None] * max(1, len(node._input_metadata)))
            shape = node._input_metadata[number].shape
            if gradient.shape != shape:  # it was broadcast
                gradient = gradient.sum_to_size(shape)
            before = held[number]
            held[number] = gradient if before is None else before + gradient

    edges = [get_gradient_edge(out) if isinstance(out, Tensor) else out for out in outputs]
    for out, edge, gradient in zip(outputs, edges, grads, strict=True):
        add(edge.node, edge.output_nr, torch.ones_like(out) if gradient is None else gradient)
    leaves: dict[Any, Tensor] = {}
    for node in _in_order([edge.node for edge in edges]):
        held = incoming.pop(node, None)
        if held is None:
            continue
        if not node.next_functions:
            assert held[0] is not None
            leaves[node] = held[0]
            continue
        made = node.apply(*held) if hasattr(node, "apply") else node(*held)
        made = made if isinstance(made, tuple) else (made,)
        if len(made) > len(node.next_functions):  # a function in Python answers for what is no tensor, too
            made = tuple(part for part in made if part is not None)
        for (after, number), gradient in zip(node.next_functions, made, strict=True):
            add(after, number, gradient)
    return leaves


def _in_order(roots: Sequence[Any]) -> list[Any]:
    """The nodes of a graph, each before those that it leads to."""
    done: dict[Any, None] = {}

    def follow(node: Any) -> None:
        if node is not None and node not in done:
            for after, _ in node.next_functions:
                follow(after)
            done[node] = None

    for root in roots:
        follow(root)
    return list(done)[::-1]
