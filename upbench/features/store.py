"""Low-resolution features of a split, computed once and kept on disk.

A cache file is a safetensors file with `features` `[N, C, h, w]` float32 and `crc32` `[N]`, one checksum an
image. It is written as the features come, so that memory holds one batch, and read by mapping it, so that it
need not fit in memory. Files of a key lie in one folder, by how many images they hold: a limited run never
passes for a full one, and a full one serves every limit.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.contracts.dataset import Dataset
from upbench.errors import UpbenchError
from upbench.system.cache import cache_dir, digest, replacing, safe_name
from upbench.system.progress import Bar, bar, say

VERSION = 1
"""Rises with every change of this module that changes features."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of the first images of a split.

    Attributes:
        features: `[N, C, h, w]` float32, mapped from `path`: reading an image reads its part of the file.
        names: Names of the images, in the order of the dataset.
        path: The cache file.
    """

    features: Tensor
    names: tuple[str, ...]
    path: Path

    def __len__(self) -> int:
        return len(self.names)


def cached_features(
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    size: int,
    *,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
) -> FeatureSet:
    """The backbone's features of a split, from the cache where they are in it.

    Images are squares of `size` pixels (`Dataset.load`), brought to the nearest size that the stride divides
    (`Backbone.fit`). The key of the cache holds all that features depend on: the backbone's weights and
    statistics, the images, both sizes, the kind of device, the versions of torch and timm, and `VERSION`.

    Args:
        backbone: It is moved to `device`.
        dataset: Where the images come from.
        split: Which of them.
        size: Side in pixels.
        limit: Only the first so many.
        device: Where to compute.
        batch_size: Images at a time.

    Raises:
        UpbenchError: An image that cannot be read, features that are not finite, a full or read-only disk.
    """
    if limit is not None and limit < 1:
        raise UpbenchError(f"limit must be at least 1, got {limit}")
    names = tuple(dataset.names(split))[:limit]
    if not names:
        raise UpbenchError(f"split '{split}' of dataset '{dataset.name}' has no images")
    folder = _folder(backbone, dataset, split, size, torch.device(device).type)
    found = _lookup(folder, names)
    if found is None:
        path = folder / f"{len(names)}.safetensors"
        _compute(path, backbone.to(device), dataset, split, size, names, max(1, batch_size))
        found = _lookup(folder, names)
        if found is None:
            raise UpbenchError(
                f"features that were just written to {path} cannot be read again: failing disk?"
            )
        _remove_shorter(path)
    return found


def _folder(backbone: Backbone, dataset: Dataset, split: str, size: int, device: str) -> Path:
    key = digest(
        VERSION,
        backbone.name,
        backbone.fingerprint,
        backbone.stride,
        dataset.name,
        split,
        dataset.fingerprint(split),
        size,
        backbone.input_size(size, size),
        device,
        torch.float32,
        torch.__version__,
        timm.__version__,
    )
    return cache_dir("features", safe_name(f"{backbone.name}-{dataset.name}-{split}-{size}-{key}"))


def _lookup(folder: Path, names: Sequence[str]) -> FeatureSet | None:
    """The shortest file that holds these images; files that are damaged are said to be and removed."""
    for path in sorted(folder.glob("*.safetensors"), key=_count):
        if _count(path) < len(names):
            continue
        try:
            return _read(path, names)
        except FileNotFoundError:
            continue  # another process put a longer one in its place
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            say(f"cached features {path} are damaged ({reason}) and are computed again")
            with suppress(OSError):
                path.unlink()
    return None


def _count(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else -1


def _remove_shorter(path: Path) -> None:
    """Removes files that `path` replaces; processes that have them mapped keep them until they end."""
    for other in path.parent.glob("*.safetensors"):
        if _count(other) < _count(path):
            with suppress(OSError):
                other.unlink()


def _read(path: Path, names: Sequence[str]) -> FeatureSet:
    with safe_open(path, framework="pt", device="cpu") as file:
        held = json.loads(file.metadata()["names"])
        features, checksums = file.get_tensor("features"), file.get_tensor("crc32").tolist()
    if list(held[: len(names)]) != list(names) or len(held) != len(features):
        raise ValueError("it holds other images")
    for name, image, checksum in zip(names, features, checksums, strict=False):
        if zlib.crc32(image.numpy()) != checksum:
            raise ValueError(f"the checksum of '{name}' differs")
    return FeatureSet(features[: len(names)], tuple(names), path)


def _compute(
    path: Path,
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    size: int,
    names: Sequence[str],
    batch_size: int,
) -> None:
    """Writes the file, image by image: it is whole or it is not there."""
    height, width = backbone.input_size(size, size)
    shape = (len(names), backbone.channels, height // backbone.stride, width // backbone.stride)
    metadata = {
        "names": json.dumps(list(names)),
        "backbone": backbone.name,
        "fingerprint": backbone.fingerprint,
        "dataset": f"{dataset.name}/{split}",
    }
    checksums = []
    description = f"features of {dataset.name}/{split} by {backbone.name}"
    with replacing(path) as temporary, temporary.open("wb") as file, bar(description, len(names)) as progress:
        _write_header(file, shape, metadata)
        for features in _batches(backbone, dataset, split, size, names, batch_size, progress):
            for image in features.cpu().contiguous().numpy():
                file.write(image.data)
                checksums.append(zlib.crc32(image))
        file.write(struct.pack(f"<{len(checksums)}q", *checksums))


def _batches(
    backbone: Backbone,
    dataset: Dataset,
    split: str,
    size: int,
    names: Sequence[str],
    batch_size: int,
    progress: Bar,
) -> Iterator[Tensor]:
    device = next(backbone.parameters()).device
    for start in range(0, len(names), batch_size):
        indices = range(start, min(start + batch_size, len(names)))
        images = torch.stack([dataset.load(split, i, size).image for i in indices]).to(device)
        with torch.inference_mode():
            features = backbone(backbone.fit(images)).float()
        finite = torch.isfinite(features).flatten(1).all(dim=1)
        if not finite.all():
            name = names[start + int((~finite).nonzero()[0])]
            raise UpbenchError(
                f"backbone '{backbone.name}' gives features that are not finite "
                f"for image '{name}' of {dataset.name}/{split}"
            )
        yield features
        progress.advance(len(indices))


def _write_header(file: BinaryIO, shape: tuple[int, ...], metadata: dict[str, str]) -> None:
    """Head of a safetensors file whose data (features, then checksums) follows as it comes."""
    count = shape[0]
    end = 4 * count * shape[1] * shape[2] * shape[3]
    header = {
        "__metadata__": metadata,
        "features": {"dtype": "F32", "shape": shape, "data_offsets": (0, end)},
        "crc32": {"dtype": "I64", "shape": (count,), "data_offsets": (end, end + 8 * count)},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
