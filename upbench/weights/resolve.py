"""Where a method's checkpoint comes from: a file that ships with the package, one that is downloaded once, a
path, or a mapping of tensors. Imports no torch.

A file is checked against its sha256 where that is known. Where it is not, the first download has to be a
checkpoint that can be read, and its sha256 is noted and holds from then on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upbench.contracts.weights import Weights, weights_fingerprint
from upbench.errors import UpbenchError, unknown
from upbench.registry import plugins
from upbench.system.cache import cache_dir, sha256_file
from upbench.system.download import download, pin_of
from upbench.system.reading import is_file
from upbench.values import user_path

if TYPE_CHECKING:
    from torch import Tensor

    from upbench.contracts.upsampler import Setting, Upsampler

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


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
        checked: How the file is known to be the right one: "sha256", "pinned on first download", "pinned"
            (downloaded before, and noted), or "not checked" (no sha256 is known, and it is not downloaded).
    """

    method: str
    name: str
    default: bool
    place: str
    entry: Weights
    checked: str = ""


def resolve(
    cls: type[Upsampler], weights: str | os.PathLike[str] | Mapping[str, Tensor] = "default"
) -> ResolvedWeights:
    """Finds the file that `weights` (as for `load_method`) stands for; downloads and checks it where needed.

    Raises:
        UpbenchError: Unknown name, missing file, failed download, or a sha256 that differs.
    """
    if isinstance(weights, Mapping):
        from upbench.system.checkpoint.read import check_tensors

        check_tensors(weights, "the mapping of tensors")
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
    path = user_path(weights)
    if path.suffix.lower() not in SUFFIXES:
        raise UpbenchError(f"checkpoint {path} must end in one of {', '.join(SUFFIXES)}")
    if not is_file(path):
        raise UpbenchError(f"checkpoint not found: {path}")
    return ResolvedWeights(str(path), path, sha256_file(path))


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


def list_weights() -> list[ListedWeights]:
    """Every checkpoint that a registered method knows by name."""
    rows = []
    for method, cls in plugins("method").items():
        for name, entry in cls.weights.items():
            place = _place(method, entry)
            how = _how_checked(method, entry, place)
            rows.append(ListedWeights(method, name, name == cls.default_weights, place, entry, how))
    return rows


def _looks_like_path(text: str) -> bool:
    return Path(text).suffix.lower() in SUFFIXES or os.sep in text or "/" in text or is_file(Path(text))


def _local(entry: Weights) -> Path | None:
    """The file as `$UPBENCH_WEIGHTS` has it, or None."""
    folder = os.environ.get("UPBENCH_WEIGHTS")
    path = user_path(folder) / entry.file if folder else None
    return path if path is not None and is_file(path) else None


def _place(method: str, entry: Weights) -> str:
    if _local(entry):
        return "local"
    if entry.by_hand:
        return "by hand"
    if entry.remote:
        return "cached" if is_file(_cached(method, entry)) else "remote"
    return "packaged" if is_file(CHECKPOINTS / entry.source) else "missing"


def _how_checked(method: str, entry: Weights, place: str) -> str:
    if entry.sha256:
        return "sha256"
    if place == "cached":
        return "pinned" if is_file(pin_of(_cached(method, entry))) else "pinned on next use"
    return "pinned on first download" if place == "remote" else "not checked"


def _is_checkpoint(path: Path) -> None:
    """Whether a file that nobody knows the hash of is a checkpoint.

    Raises:
        UpbenchError: It cannot be read as one.
    """
    from upbench.system.checkpoint.read import read_checkpoint

    read_checkpoint(path)


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
        found = download(
            entry.source, path, sha256=entry.sha256, size=entry.size, label=label, check=_is_checkpoint
        )
        return path, found
    path = local or CHECKPOINTS / entry.source
    if not is_file(path):
        raise UpbenchError(f"file of {label} not found: {path}")
    found = sha256_file(path)
    if entry.sha256 is not None and found != entry.sha256:
        raise UpbenchError(f"{path} is not {label}: its sha256 is {found}, expected {entry.sha256}")
    return path, found
