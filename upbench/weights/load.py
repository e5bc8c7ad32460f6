"""How a checkpoint gets into a method; its key names are ours or the official ones.

`load_method` is the public door.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import UpbenchError, shown
from upbench.registry import find_method
from upbench.system.environment import check_memory
from upbench.weights.resolve import ResolvedWeights, resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from upbench.contracts.backbone import Backbone
    from upbench.contracts.upsampler import Upsampler

_DIGITS = 19
"""Of the largest count in a checkpoint's metadata that is believed."""


_LARGE = 8192
"""Channels or another size beyond those of any backbone: parameters are counted before they are made."""


def load_method(
    name: str,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] = "default",
    channels: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    backbone: Backbone | str | None = None,
    **options: Any,
) -> Upsampler:
    """Builds a method and fills it with weights.

    Args:
        name: Name of the method, as in `upbench list methods`.
        weights: "default" (what the method names as such), "none" (random, from `seed`), a name from
            `upbench list weights`, a path, or a mapping of tensors. Official key names and ours both work.
        channels: C of the features it is to upsample; those of `backbone` where one is given, else 384.
        device: Where to put it.
        seed: Of random weights; torch's global generators are left as they are.
        backbone: What computes these features, or its name: it gives `channels`, or has to have as many. A
            method that runs it is given it with every call: `method(image, features, size,
            backbone=backbone)`.
        options: Options of the method's constructor.

    Returns:
        The method, in eval mode.

    Raises:
        UpbenchError: Unknown method, weights or option; a checkpoint that is missing, corrupt, not the one
            that its sha256 promises, or not for this method, these options or this C; a backbone of another
            C.
    """
    from upbench.contracts.upsampler import extras

    cls = find_method(name)
    if isinstance(backbone, str):
        from upbench.features.backbones import load_backbone

        backbone = load_backbone(backbone, device)
    channels = _agreed_channels(name, channels, backbone)
    module = load_resolved(cls, resolve(cls, weights), channels, device=device, seed=seed, options=options)
    extras(module, backbone=backbone)  # attaches it to a method of the first edition
    return module


def load_resolved(
    cls: type[Upsampler],
    resolved: ResolvedWeights,
    channels: int,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Upsampler:
    """`load_method` for a class and weights that were found before.

    Args:
        cls: The method.
        resolved: As `upbench.weights.resolve.resolve` gives them.
        channels: C of the features it is to upsample.
        device: Where to put it.
        seed: Of random weights.
        options: Of the method's constructor.

    Raises:
        UpbenchError: As `load_method`.
    """
    state = read_state(cls, resolved)
    agreed = dict(options or {})
    if state is not None:
        agreed = _agreed_options(cls, state, resolved, channels, agreed)
    try:
        module = _build(cls, channels, seed, agreed)
    except (UpbenchError, TypeError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
        if state is None or agreed == dict(options or {}):
            raise
        raise UpbenchError(
            f"{_where(resolved)} states options that no '{cls.name}' can be built with: {_reason(error)}"
        ) from error
    if state is not None:
        _load_strictly(module, state, resolved)
    elif resolved.name == "default" and any(True for _ in module.parameters()):
        raise UpbenchError(
            f"method '{cls.name}' has no default weights; give it a checkpoint, or 'none' for random ones"
        )
    return module.eval().to(device)


def read_state(cls: type[Upsampler], resolved: ResolvedWeights) -> dict[str, Tensor] | None:
    """The tensors of resolved weights under the method's own names, or None where there are none.

    Raises:
        UpbenchError: A file that cannot be read, is not a checkpoint, or that `convert_state` refuses.
    """
    from upbench.system.checkpoint.read import read_checkpoint, state_of

    if resolved.tensors is None and resolved.path is None:
        return None
    content = resolved.tensors if resolved.tensors is not None else read_checkpoint(_there(resolved))
    key = resolved.entry.key if resolved.entry else None
    state = state_of(content, key, cls.name, _where(resolved))
    try:
        return dict(cls.convert_state(state))
    except UpbenchError:
        raise
    except Exception as error:  # a plugin's own code, on whatever a file holds
        raise UpbenchError(
            f"{_where(resolved)} is not a checkpoint of method '{cls.name}': {_reason(error)}"
        ) from error


def trained_options(cls: type[Upsampler], resolved: ResolvedWeights) -> dict[str, Any]:
    """Constructor options that `upbench train` wrote into a checkpoint, of those that the method has."""
    import json

    from upbench.system.checkpoint.read import read_metadata

    noted = read_metadata(resolved.path) if resolved.path is not None else {}
    if noted.get("method") != cls.name:
        return {}
    try:
        options = json.loads(noted.get("options", "{}"))
    except (ValueError, RecursionError):
        raise UpbenchError(f"{_where(resolved)} has options in its metadata that are not JSON") from None
    if not isinstance(options, dict):
        raise UpbenchError(f"{_where(resolved)} has options in its metadata that are no mapping")
    return {name: value for name, value in options.items() if name in cls.option_names()}


def images_seen(resolved: ResolvedWeights) -> int | None:
    """How many images a checkpoint was trained on, or None where it does not say (`upbench train` does)."""
    from upbench.system.checkpoint.read import read_metadata

    noted = read_metadata(resolved.path) if resolved.path is not None else {}
    text = noted.get("images_seen", "")
    return int(text) if text.isdecimal() and len(text) < _DIGITS else None


def options_unlike_training(
    cls: type[Upsampler], resolved: ResolvedWeights, options: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those that weights were trained with: name -> (asked for, trained with).

    A checkpoint that says nothing of them counts as trained with the constructor's defaults.
    """
    import inspect

    if resolved.path is None:
        return {}
    parameters = inspect.signature(cls.__init__).parameters
    state = read_state(cls, resolved) or {}
    trained = {name: parameters[name].default for name in cls.option_names()}
    trained |= {**trained_options(cls, resolved), **cls.options_from(state)}
    return {name: (value, trained[name]) for name, value in options.items() if value != trained[name]}


def _there(resolved: ResolvedWeights) -> Path:
    assert resolved.path is not None
    return resolved.path


def _where(resolved: ResolvedWeights) -> str:
    return "the mapping of tensors" if resolved.path is None else f"checkpoint {resolved.path}"


def _agreed_channels(name: str, channels: int | None, backbone: Backbone | None) -> int:
    if backbone is None:
        return 384 if channels is None else channels
    if channels is not None and channels != backbone.channels:
        raise UpbenchError(
            f"method '{name}' is asked for {channels} channels, but backbone '{backbone.name}' has "
            f"{backbone.channels}"
        )
    return backbone.channels


def _build(cls: type[Upsampler], channels: int, seed: int, options: Mapping[str, Any]) -> Upsampler:
    """The method with random weights from `seed`."""
    import torch

    sizes = [v for v in (channels, *options.values()) if isinstance(v, int) and not isinstance(v, bool)]
    if any(size > _LARGE for size in sizes):
        _check_memory(cls, channels, options)
    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reset other devices' generators too
        torch.default_generator.manual_seed(seed)
        return cls.build(channels=channels, **options)


def _check_memory(cls: type[Upsampler], channels: int, options: Mapping[str, Any]) -> None:
    """Raises UpbenchError where the parameters would not fit into memory: those of a twin that has none."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            twin = cls.build(channels=channels, **options)
        except UpbenchError:
            raise
        except Exception:  # a constructor that looks at values has no twin; the method itself tells its fault
            return
    tensors = [*twin.parameters(), *twin.buffers()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    check_memory(f"method '{cls.name}' with {shown({'channels': channels, **options})}", needed)


def _agreed_options(
    cls: type[Upsampler],
    state: Mapping[str, Tensor],
    resolved: ResolvedWeights,
    channels: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Constructor options from the checkpoint and from the user, who may contradict what it was trained with
    but not what its tensors say."""
    where = _where(resolved)
    try:
        implied = dict(cls.options_from(state))
    except UpbenchError:
        raise
    except Exception as error:  # as in `read_state`
        raise UpbenchError(
            f"{where} is not a checkpoint of method '{cls.name}': no sizes can be read from it "
            f"({_reason(error)})"
        ) from error
    tied = implied.pop("channels", None)
    if tied is None and resolved.entry is not None:
        tied = resolved.entry.channels
    if tied is not None and tied != channels:
        raise UpbenchError(f"{where} of method '{cls.name}' is for {tied} channels, asked for {channels}")
    for option, value in options.items():
        if option in implied and implied[option] != value:
            raise UpbenchError(f"{where} has {option}={implied[option]}, asked for {option}={value}")
    return {**trained_options(cls, resolved), **implied, **options}


def _load_strictly(module: Upsampler, state: Mapping[str, Tensor], resolved: ResolvedWeights) -> None:
    import torch

    expected = module.state_dict()
    faults = []
    if missing := [name for name in expected if name not in state]:
        faults.append(f"lacks {_few(missing)}")
    if extra := [name for name in state if name not in expected]:
        faults.append(f"has {_few(extra)} left over")
    shared = [name for name in expected if name in state]
    if wrong := [name for name in shared if state[name].shape != expected[name].shape]:
        texts = [f"{n} {list(state[n].shape)} instead of {list(expected[n].shape)}" for n in wrong]
        faults.append(f"has {_few(texts)}")
    real = [name for name in shared if expected[name].is_floating_point()]
    if odd := [name for name in real if not state[name].is_floating_point()]:
        faults.append(f"has {_few(f'{name} of {state[name].dtype}' for name in odd)}")
    if faults:
        raise UpbenchError(f"{_where(resolved)} does not fit method '{module.name}': it {'; '.join(faults)}")
    if bad := [name for name in shared if not torch.isfinite(state[name].to(expected[name].dtype)).all()]:
        raise UpbenchError(f"{_where(resolved)} has values that are not finite in {_few(bad)}")
    module.load_state_dict(dict(state), strict=True)


def _reason(error: Exception) -> str:
    """What an error says, with its type unless it is one of those that say it all."""
    text = str(error)
    return (
        text if text and isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {text}"
    )


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
