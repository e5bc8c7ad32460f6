"""Computes the features that a store keeps: threads read images, the backbone takes them in batches."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.errors import UpbenchError
from upbench.features.shards import DTYPES, Format
from upbench.system.ahead import ahead


class Images(Protocol):
    """What a store is filled from: the images of a split as a protocol shows them to the backbone."""

    @property
    def key(self) -> str:
        """Names all that the images depend on: dataset, fingerprint of the split, geometry. Not how many
        there are: a prefix of a split has the key of the split."""

    @property
    def title(self) -> str:
        """The split in messages, as in "interiors/train"."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, without reading it."""

    def image(self, index: int) -> Tensor:
        """`[3, h, w]` float32 RGB in 0..1. Sizes may differ between images. Called from several threads."""


class Extractor:
    """Computes features as they are stored.

    What it gives does not depend on the number of workers.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Images,
        format: Format,
        device: torch.device,
        batch_size: int,
        workers: int | None,
    ) -> None:
        """
        Args:
            backbone: What computes; it is moved to `device`.
            images: What it sees.
            format: Of the store.
            device: Where to compute.
            batch_size: Images at a time.
            workers: Threads that read images; 0 for none, None for one a core, at most four.
        """
        self._backbone, self._images, self._format, self._device = backbone, images, format, device
        self._batch_size = max(1, batch_size)
        self._workers = min(4, _usable_cores()) if workers is None else workers
        self._first: dict[int, Tensor] = {}

    def first_size(self) -> int:
        """Bytes of the first image's features and token, computed from its size."""
        self._first[0] = image = self._image(0)
        stride, channels = self._backbone.stride, self._backbone.channels
        height, width = self._backbone.input_size(*image.shape[1:])
        numbers = channels * (height // stride) * (width // stride) + channels * self._format.token
        return numbers * self._format.itemsize

    def read(self, indices: Sequence[int]) -> Generator[Tensor, None, None]:
        """The images, read ahead by the threads; to be closed where it is not used up."""
        return ahead(self._image, indices, self._workers, 2 * self._batch_size + self._workers)

    def batches(
        self, indices: Sequence[int], images: Iterator[Tensor]
    ) -> Iterator[tuple[Sequence[int], Tensor, Tensor | None]]:
        """Features of consecutive images of one size: indices, `[B, C, h, w]`, and tokens `[B, C]` if any.

        They are on `device`, contiguous, in the store's dtype.

        Args:
            indices: Of the images.
            images: From `read`; so many of them are taken.

        Raises:
            UpbenchError: Features that are not finite, or too large for float16.
        """
        self._backbone.to(self._device)
        for some, batch in _batches(indices, images, self._batch_size):
            features, tokens = self._features(some, batch)
            yield some, features, tokens

    def _features(self, indices: Sequence[int], images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        name, token = self._backbone.name, self._format.token
        with torch.no_grad():
            batch = self._backbone.fit(torch.stack(list(images)).to(self._device))
            if token:
                exact = list(self._backbone.with_token(batch))  # type: ignore[operator]
            else:
                exact = [self._backbone(batch)]
        shape = exact[0].shape
        if len(shape) != 4 or shape[:2] != (len(images), self._backbone.channels):
            raise UpbenchError(f"backbone '{name}' gave features {list(shape)}")
        if token and (exact[1].ndim != 2 or len(exact[1]) != len(images)):
            raise UpbenchError(f"backbone '{name}' gave class tokens {list(exact[1].shape)}")
        dtype = DTYPES[self._format.dtype]
        # Contiguous, so that sums over them are the same to the bit as over those that are read again.
        stored = [part.to(dtype).contiguous() for part in exact]
        finite = _finite(stored)
        if not finite.all():  # a batch's only synchronisation, its copy to the CPU aside
            position = int((~finite).nonzero()[0])
            image = f"image '{self._images.name(indices[position])}' of {self._images.title}"
            if _finite(exact)[position]:
                raise UpbenchError(
                    f"backbone '{name}' gives features beyond {torch.finfo(dtype).max:g} for {image}, "
                    f"too large for {self._format.dtype}; use float32"
                )
            raise UpbenchError(f"backbone '{name}' gives features that are not finite for {image}")
        return stored[0], stored[1] if token else None

    def _image(self, index: int) -> Tensor:
        image = self._first.pop(index, None)
        if image is not None:
            return image
        try:
            image = self._images.image(index)
        except OSError as error:
            if error.errno is not None and error.filename is None:  # else it would pass for the cache's
                error.filename = self._images.name(index)
            raise
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.float32 or not image.numel():
            raise UpbenchError(
                f"image '{self._images.name(index)}' of {self._images.title} must be float32 [3, h, w], "
                f"got {image.dtype} {list(image.shape)}"
            )
        return image


def _batches(
    indices: Sequence[int], images: Iterator[Tensor], size: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Consecutive images of one size, at most `size` of them, with their indices."""
    held: list[int] = []
    batch: list[Tensor] = []
    for index, image in zip(indices, images, strict=False):
        if batch and batch[0].shape != image.shape:
            yield held, batch
            held, batch = [], []
        held.append(index)
        batch.append(image)
        if len(batch) == size:
            yield held, batch
            held, batch = [], []
    if batch:
        yield held, batch


def _finite(parts: Sequence[Tensor]) -> Tensor:
    """`[B]` bool: which images have only finite numbers."""
    return torch.stack([torch.isfinite(part).flatten(1).all(dim=1) for part in parts]).all(dim=0)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
