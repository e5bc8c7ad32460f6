"""Reads checkpoint files of the usual kinds into flat mappings of tensors."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from upbench.errors import UpbenchError, named
from upbench.system.checkpoint.stated import Refused, check_stated

# entries that trainers put a model's tensors under
_WRAPPERS = ("state_dict", "model_state_dict", "model", "weights", "params", "upsampler", "net")
_PREFIXES = ("module.", "_orig_mod.")
_DEEPEST = 8
_EXPECTED = (SafetensorError, RuntimeError, ValueError, EOFError)  # what readers say of damaged files
_HEAD = 64
SAFETENSORS = "safetensors"


def kind_of(path: Path) -> str | None:
    """What a file is by its first bytes: "zip" (as `torch.save` writes), "pickle" (as it wrote before PyTorch
    1.6), "safetensors", or None for anything else.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return SAFETENSORS
    return None


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint, on the CPU.

    Pickles are read with `weights_only=True`: no code is run. Before that the sizes that they state are held
    against the file's (see `stated`). Objects of classes that this does not know become `Opaque`, such as the
    configuration that JAFAR's training saves beside the tensors.

    A file is safetensors where its name or its first bytes say so.

    Raises:
        UpbenchError: The file is corrupt, truncated, states sizes that it cannot have, or holds something
            else.
    """
    try:
        kind = kind_of(path)
        if kind == SAFETENSORS or path.suffix.lower() == f".{SAFETENSORS}":
            content: Any = load_file(path, device="cpu")
        elif kind is None:
            raise UpbenchError(f"checkpoint {path} is corrupt or truncated ({_first_bytes(path)})")
        else:
            check_stated(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old formats; they say nothing of the content
                content = _load_pickle(path)
    except UpbenchError:
        raise
    except Refused as error:
        raise UpbenchError(f"checkpoint {path} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        raise UpbenchError(
            f"checkpoint {path} is corrupt, or holds more than tensors and plain values"
        ) from error
    except OSError as error:
        raise UpbenchError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle may lead to any; which one it was is said
        raise UpbenchError(f"checkpoint {path} is corrupt or truncated ({_first_line(error)})") from error
    if not isinstance(content, Mapping):
        raise UpbenchError(f"checkpoint {path} holds a {type(content).__name__}, not a mapping of tensors")
    return content


class Opaque:
    """Stands in a checkpoint where an object of a class was that is not to be imported."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Takes and forgets whatever the object was made of."""

    def __setstate__(self, state: object) -> None:
        """Forgets its attributes."""


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        try:
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # the old format, which has no list of them
            strange = []
        if not strange:
            raise
        with torch.serialization.safe_globals([(Opaque, name) for name in strange]):
            return torch.load(path, map_location="cpu", weights_only=True)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file; none for other kinds of files.

    Raises:
        UpbenchError: The file is corrupt.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # as for the content
        raise UpbenchError(f"checkpoint {path} is corrupt or truncated ({_first_line(error)})") from error


def state_of(content: Mapping[str, Any], key: str | None, method: str, where: str) -> dict[str, Tensor]:
    """The mapping of tensors inside a checkpoint's content.

    Args:
        content: As read.
        key: Entry that holds the tensors; None to look under the usual names and the method's.
        method: Name of the method.
        where: What the checkpoint is called in errors.

    Raises:
        UpbenchError: There is no such mapping.
    """
    if key is not None and isinstance(content.get(key), Mapping):
        content = content[key]
    else:
        content = _unwrapped(content, method)
    check_tensors(content, where)
    state = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def check_tensors(content: Mapping[Any, Any], where: str) -> None:
    """Whether a mapping is one of names to dense tensors.

    Args:
        content: The mapping.
        where: What it is called in errors.

    Raises:
        UpbenchError: It is not, or is empty.
    """
    if not content:
        raise UpbenchError(f"{where} is empty")
    for name, value in content.items():
        if not isinstance(name, str):
            raise UpbenchError(f"{where} is not a mapping of tensors: {named(repr(name))} is no name of one")
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UpbenchError(f"{where} is not a mapping of tensors: {named(name)} is a {kind}")
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise UpbenchError(f"{where} holds a tensor that is not dense: {named(name)}")


def _unwrapped(content: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    for _ in range(_DEEPEST):  # a mapping may hold itself
        inner = next((content[n] for n in (*_WRAPPERS, method) if isinstance(content.get(n), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if not lines:
        return kind
    return lines[0][:160] if isinstance(error, _EXPECTED) else f"{kind}: {lines[0][:160]}"


def _first_bytes(path: Path) -> str:
    """What a file that is no checkpoint is instead, as far as its first bytes say."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "it is empty"
    if head.lstrip()[:1] == b"<":
        return "it is a web page: a portal's or a login's"
    return f"it begins with {head[:8]!r}"
