"""Where a method's checkpoint comes from, and how it gets into the method.

`load_method` is the public door. A checkpoint is a file that ships with the package, a file that is
downloaded once and checked against its sha256, a path, or a mapping of tensors; its key names are ours or the
official ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.cache import cache_dir, sha256_file
from upbench.config import DEFAULT_BACKBONE
from upbench.download import download
from upbench.errors import UpbenchError, unknown
from upbench.registry import find_method, plugins

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from upbench.backbones import Backbone
    from upbench.base import Setting, Upsampler

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Weights:
    """A checkpoint that is known by name: a value of `Upsampler.weights`, whose key is the name.

    Attributes:
        source: A file in `upbench/checkpoints`, an absolute path, or a URL (https, http, file).
        sha256: Of the file, in hexadecimal. None for a URL whose hash is not known: that of the first
            download is then noted beside the file, and every later use must be equal.
        filename: Name of the file in the cache and in `$UPBENCH_WEIGHTS`; the last part of `source` if empty.
        size: Bytes of the file.
        licence: Licence of the weights.
        backbone: Backbone whose features it was trained on; "" for any.
        channels: C that it is tied to, or None for any.
        key: Entry of the checkpoint that holds the method's tensors, where there are others beside it.
        notes: Training data and recipe, in a few words.
        by_hand: Whether `source` is a page that the file is fetched from by hand, into `$UPBENCH_WEIGHTS`.
    """

    source: str
    sha256: str | None = None
    filename: str = ""
    size: int | None = None
    licence: str = ""
    backbone: str = ""
    channels: int | None = None
    key: str | None = None
    notes: str = ""
    by_hand: bool = False

    @classmethod
    def shipped(cls, method: str, sha256: str, channels: int | None = None, variant: str = "") -> Weights:
        """The file that this project trained for a method and ships, with a model card beside it.

        Args:
            method: Name of the method.
            sha256: Of the file.
            channels: C that it is tied to, or None for any.
            variant: End of the file's name, where a method has several.
        """
        return cls(
            f"{method}_{DEFAULT_BACKBONE}{variant}.safetensors",
            sha256=sha256,
            licence="Apache-2.0; trained on research-only photos",
            backbone=DEFAULT_BACKBONE,
            channels=channels,
            notes="trained here on BSDS500 and Urban100; see the card beside the file",
        )

    @property
    def remote(self) -> bool:
        """Whether the source is a URL."""
        return "://" in self.source

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.filename or self.source.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class ResolvedWeights:
    """Which weights a method gets, with enough to find them again.

    Attributes:
        name: Name of the entry of `Upsampler.weights`, "none", the path as given, or "mapping".
        path: File on this machine, or None.
        sha256: Of the file (of the tensors, for a mapping); None where there are no weights.
        entry: The entry that `name` stands for, or None.
        tensors: The mapping that was given, or None.
    """

    name: str
    path: Path | None = None
    sha256: str | None = None
    entry: Weights | None = None
    tensors: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class ListedWeights:
    """A row of `upbench list weights`.

    Attributes:
        method: Name of the method.
        name: Name of the checkpoint.
        default: Whether `weights="default"` stands for it.
        place: "packaged", "cached" (downloaded), "local" (in `$UPBENCH_WEIGHTS`), "remote", "by hand" (see
            `Weights.by_hand`) or "missing".
        entry: The rest.
    """

    method: str
    name: str
    default: bool
    place: str
    entry: Weights


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
        backbone: What computes these features, or its name. Methods with `uses_backbone` run it
            themselves; without one they load, but their `forward` raises. Other methods do not keep it.
        options: Options of the method's constructor.

    Returns:
        The method, in eval mode.

    Raises:
        UpbenchError: Unknown method, weights or option; a checkpoint that is missing, corrupt, not the one
            that its sha256 promises, or not for this method, these options or this C; a backbone of another
            C.
    """
    cls = find_method(name)
    if isinstance(backbone, str):
        from upbench.backbones import load_backbone

        backbone = load_backbone(backbone, device)
    channels = _agreed_channels(name, channels, backbone)
    resolved = resolve(cls, weights)
    state = read_state(cls, resolved)
    if state is not None:
        options = _agreed_options(cls, state, resolved, channels, options)
    module = _build(cls, channels, seed, options)
    if state is not None:
        _load_strictly(module, state, resolved)
    elif resolved.name == "default" and any(True for _ in module.parameters()):
        raise UpbenchError(
            f"method '{cls.name}' has no default weights; give it a checkpoint, or 'none' for random ones"
        )
    module = module.eval().to(device)
    if backbone is not None and cls.uses_backbone:
        module.attach_backbone(backbone)
    return module


def resolve(
    cls: type[Upsampler], weights: str | os.PathLike[str] | Mapping[str, Tensor] = "default"
) -> ResolvedWeights:
    """Finds the file that `weights` (as for `load_method`) stands for; downloads and checks it where needed.

    Raises:
        UpbenchError: Unknown name, missing file, failed download, or a sha256 that differs.
    """
    if isinstance(weights, Mapping):
        return ResolvedWeights("mapping", sha256=weights_fingerprint(weights), tensors=weights)
    if isinstance(weights, str):
        if weights == "default" and cls.default_weights is None:
            return ResolvedWeights("default")
        if weights == "none":
            return ResolvedWeights("none")
        name = (cls.default_weights or "") if weights == "default" else weights
        if name in cls.weights:
            entry = cls.weights[name]
            path, sha256 = _locate(cls.name, name, entry)
            return ResolvedWeights(name, path, sha256, entry)
        if not _looks_like_path(name):
            choices = [*cls.weights, "default", "none"]
            raise unknown(f"weights of method '{cls.name}'", name, choices, "a path works too")
    path = Path(os.fspath(weights)).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UpbenchError(f"checkpoint {path} must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UpbenchError(f"checkpoint not found: {path}")
    return ResolvedWeights(str(path), path, sha256_file(path))


def read_state(cls: type[Upsampler], resolved: ResolvedWeights) -> dict[str, Tensor] | None:
    """The tensors of resolved weights under the method's own names, or None where there are none.

    Raises:
        UpbenchError: A file that cannot be read, is not a checkpoint, or that `convert_state` refuses.
    """
    from upbench.checkpoint import read_checkpoint, state_of

    if resolved.tensors is None and resolved.path is None:
        return None
    content = resolved.tensors if resolved.tensors is not None else read_checkpoint(_there(resolved))
    key = resolved.entry.key if resolved.entry else None
    state = state_of(content, key, cls.name, _where(resolved))
    try:
        return dict(cls.convert_state(state))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise UpbenchError(
            f"{_where(resolved)} is not a checkpoint of method '{cls.name}': {text}"
        ) from error


def trained_options(cls: type[Upsampler], resolved: ResolvedWeights) -> dict[str, Any]:
    """Constructor options that `upbench train` wrote into a checkpoint, of those that the method has."""
    import json

    from upbench.checkpoint import read_metadata

    noted = read_metadata(resolved.path) if resolved.path is not None else {}
    if noted.get("method") != cls.name:
        return {}
    try:
        options = json.loads(noted.get("options", "{}"))
    except ValueError:
        raise UpbenchError(f"{_where(resolved)} has options in its metadata that are not JSON") from None
    return {name: value for name, value in options.items() if name in cls.option_names()}


def images_seen(resolved: ResolvedWeights) -> int | None:
    """How many images a checkpoint was trained on, or None where it does not say (`upbench train` does)."""
    from upbench.checkpoint import read_metadata

    noted = read_metadata(resolved.path) if resolved.path is not None else {}
    text = noted.get("images_seen", "")
    return int(text) if text.isdecimal() else None


def options_unlike_training(
    cls: type[Upsampler], weights: str, options: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those that weights were trained with: name -> (asked for, trained with).

    A checkpoint that says nothing of them counts as trained with the constructor's defaults.
    """
    import inspect

    resolved = resolve(cls, weights)
    if resolved.path is None:
        return {}
    parameters = inspect.signature(cls.__init__).parameters
    state = read_state(cls, resolved) or {}
    trained = {name: parameters[name].default for name in cls.option_names()}
    trained |= {**trained_options(cls, resolved), **cls.options_from(state)}
    return {name: (value, trained[name]) for name, value in options.items() if value != trained[name]}


def weights_reason(cls: type[Upsampler], setting: Setting) -> str | None:
    """Why weights that are known by name cannot serve a setting, in words, or None where they can.

    Weights that depend on C were trained on the features of one backbone and mean nothing to another's, even
    of the same C. A path is the user's own decision.
    """
    name = (cls.default_weights or "") if setting.weights == "default" else setting.weights
    entry = cls.weights.get(name)
    if entry is None or entry.channels is None:
        return None
    if entry.channels != setting.channels:
        return f"weights '{cls.name}:{name}' are for {entry.channels} channels, not {setting.channels}"
    if entry.backbone and not _same_model(entry.backbone, setting.backbone):
        return f"weights '{cls.name}:{name}' are for backbone '{entry.backbone}'"
    return None


def _same_model(one: str, other: str) -> bool:
    """Whether two names of timm models mean the same: the tag after the dot may be left out."""
    (name, _, tag), (other_name, _, other_tag) = one.partition("."), other.partition(".")
    return name == other_name and (tag == other_tag or not (tag and other_tag))


def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values; the order of the mapping plays no part."""
    import hashlib

    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def list_weights() -> list[ListedWeights]:
    """Every checkpoint that a registered method knows by name."""
    rows = []
    for method, cls in plugins("method").items():
        for name, entry in cls.weights.items():
            rows.append(
                ListedWeights(method, name, name == cls.default_weights, _place(method, entry), entry)
            )
    return rows


def _looks_like_path(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES or os.sep in text or "/" in text or Path(text).is_file()


def _there(resolved: ResolvedWeights) -> Path:
    assert resolved.path is not None
    return resolved.path


def _where(resolved: ResolvedWeights) -> str:
    return "the mapping of tensors" if resolved.path is None else f"checkpoint {resolved.path}"


def _local(entry: Weights) -> Path | None:
    """The file as `$UPBENCH_WEIGHTS` has it, or None."""
    folder = os.environ.get("UPBENCH_WEIGHTS")
    path = Path(folder).expanduser() / entry.file if folder else None
    return path if path is not None and path.is_file() else None


def _place(method: str, entry: Weights) -> str:
    if _local(entry):
        return "local"
    if entry.by_hand:
        return "by hand"
    if entry.remote:
        return "cached" if _cached(method, entry).is_file() else "remote"
    return "packaged" if (CHECKPOINTS / entry.source).is_file() else "missing"


def _cached(method: str, entry: Weights) -> Path:
    return cache_dir("weights", method) / entry.file


def _locate(method: str, name: str, entry: Weights) -> tuple[Path, str]:
    """The file of an entry and its sha256, checked."""
    label = f"weights '{method}:{name}'"
    local = _local(entry)
    if local is None and entry.by_hand:
        raise UpbenchError(
            f"{label} cannot be downloaded by a program: fetch {entry.file} from {entry.source} and put it "
            "into the folder that UPBENCH_WEIGHTS names"
        )
    if local is None and entry.remote:
        path = _cached(method, entry)
        return path, download(entry.source, path, sha256=entry.sha256, size=entry.size, label=label)
    path = local or CHECKPOINTS / entry.source
    if not path.is_file():
        raise UpbenchError(f"file of {label} not found: {path}")
    found = sha256_file(path)
    if entry.sha256 is not None and found != entry.sha256:
        raise UpbenchError(f"{path} is not {label}: its sha256 is {found}, expected {entry.sha256}")
    return path, found


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

    with torch.random.fork_rng(devices=[]):  # torch.manual_seed would reset other devices' generators too
        torch.default_generator.manual_seed(seed)
        return cls.build(channels=channels, **options)


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
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UpbenchError(
            f"{where} is not a checkpoint of method '{cls.name}': no sizes can be read from it ({error})"
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
    if faults:
        raise UpbenchError(f"{_where(resolved)} does not fit method '{module.name}': it {'; '.join(faults)}")
    if bad := [name for name in shared if not torch.isfinite(state[name]).all()]:
        raise UpbenchError(f"{_where(resolved)} has values that are not finite in {_few(bad)}")
    module.load_state_dict(dict(state), strict=True)


def _few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
