"""Reads checkpoint files of the usual kinds into flat mappings of tensors."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from upbench.errors import UpbenchError

# entries that trainers put a model's tensors under
_WRAPPERS = ("state_dict", "model_state_dict", "model", "weights", "params", "upsampler", "net")
_PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint, on the CPU.

    Pickles are read with `weights_only=True`: no code is run. Objects of classes that this does not know
    become `Opaque`, such as the configuration that JAFAR's training saves beside the tensors.

    Raises:
        UpbenchError: The file is corrupt, truncated, or holds something else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content: Any = load_file(path, device="cpu")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old formats; they say nothing of the content
                content = _load_pickle(path)
    except (SafetensorError, zipfile.BadZipFile, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UpbenchError(f"checkpoint {path} is corrupt or truncated ({_first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UpbenchError(
            f"checkpoint {path} is corrupt, or holds more than tensors and plain values"
        ) from error
    except OSError as error:
        raise UpbenchError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
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
    except (SafetensorError, OSError) as error:
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
    if not content:
        raise UpbenchError(f"{where} is empty")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UpbenchError(f"{where} is not a mapping of tensors: '{name}' is a {type(value).__name__}")
    state = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    return state


def _unwrapped(content: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    for name in (*_WRAPPERS, method):
        inner = content.get(name)
        if isinstance(inner, Mapping):
            return _unwrapped(inner, method)
    return content


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
