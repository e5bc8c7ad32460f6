"""The contract of weights: a checkpoint that a method knows by name. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_BACKBONE = "dinov2_vits14_focus"


@dataclass(frozen=True)
class Weights:
    """A checkpoint that is known by name: a value of `Upsampler.weights`, whose key is the name.

    Attributes:
        source: A file in `upbench/checkpoints`, an absolute path, or a URL (https, http, file).
        sha256: Of the file, in hexadecimal. None for a URL whose hash is not known: the first download, which
            has to be a checkpoint, is then pinned: its hash is noted beside it, and every later use must be
            equal.
        filename: Name of the file in the cache and in `$UPBENCH_WEIGHTS`; the last part of `source` if empty.
        size: Bytes of the file.
        license: License of the weights.
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
    license: str = ""
    backbone: str = ""
    channels: int | None = None
    key: str | None = None
    notes: str = ""
    by_hand: bool = False
    licence: InitVar[str] = ""  # as plugins of the first edition spell it

    def __post_init__(self, licence: str) -> None:
        if licence and not self.license:
            object.__setattr__(self, "license", licence)

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
            license="Apache-2.0; trained on research-only photos",
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


Weights.licence = property(lambda self: self.license)  # type: ignore[attr-defined]


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
