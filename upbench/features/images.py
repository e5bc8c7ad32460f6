"""The frames of a split under a protocol: read when asked for, and kept while they fit a budget."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.geometry import Frame, Size
from upbench.contracts.protocol import Protocol
from upbench.contracts.sample import IGNORE, Camera, Framed, Sample
from upbench.contracts.task import Crop, Images, Truth
from upbench.errors import UpbenchError
from upbench.features.arena import Arena
from upbench.system.cache import digest
from upbench.system.sources import code_digest

S = TypeVar("S", Sample, Framed)

RECENT = 8
"""Frames beyond the budget that are held for a moment, apart from those that somebody holds who has them
read ahead."""

BUDGET = 500_000_000
"""Bytes that the frames of one split may keep."""


class SplitImages(Images):
    """The frames of a split. Whatever it gives is the caller's own: cells share it.

    Attributes:
        dataset: Where the images come from.
        split: Which of them.
        protocol: What is made of them.
        mirrored: Whether left and right are exchanged.
        names: Of every frame; windows of an image have its name and their number.
        title: As in "interiors/train".
        count: How many images there are, windows apart.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        protocol: Protocol,
        *,
        stride: int = 1,
        limit: int | None = None,
        mirrored: bool = False,
        budget: int = BUDGET,
    ) -> None:
        """Takes what the frames are of.

        Args:
            dataset: Opened.
            split: One of its splits.
            protocol: Its geometry makes the frames.
            stride: Pixels per feature of the backbone.
            limit: Only the first so many images.
            mirrored: Exchange left and right.
            budget: Bytes to keep frames in.

        Raises:
            UpbenchError: An unknown split, or more classes than labels have numbers.
        """
        if len(dataset.classes) > IGNORE:
            raise UpbenchError(
                f"dataset '{dataset.name}' names {len(dataset.classes)} classes, but labels go from 0 to "
                f"{IGNORE - 1}: {IGNORE} is ignored"
            )
        self.dataset, self.split, self.protocol = dataset, split, protocol
        self.stride, self.mirrored = stride, mirrored
        names = dataset.names(split)[:limit]
        self.count = len(names)
        if protocol.geometry.windows:
            parts = [len(self._frames(dataset.size(split, i), name)) for i, name in enumerate(names)]
            self._entries = [(i, part) for i, count in enumerate(parts) for part in range(count)]
            self._starts = [0, *itertools.accumulate(parts)]
            self.names: list[str] = [f"{names[i]}#{part}" for i, part in self._entries]
        else:
            self._entries = [(i, 0) for i in range(self.count)]
            self.names = list(names)
        self.title = f"{dataset.name}/{split}" + (" (mirrored)" if mirrored else "")
        self._kept: dict[int, _Compact] = {}
        self._held: WeakValueDictionary[int, _Compact] = WeakValueDictionary()
        self._recent: deque[_Compact] = deque(maxlen=RECENT)
        self._sizes: dict[int, tuple[Size, Size]] = {}
        self._arena = Arena(budget)
        self._frame_bytes: int | None = None  # of a frame that stands for all
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """Names all that the images depend on: content, geometry, and the code that makes them."""
        parts = (
            self.dataset.name,
            self.split,
            self.dataset.fingerprint(self.split),
            self.protocol.geometry.key,
        )
        code = code_digest(type(self.dataset), type(self.protocol.geometry), Frame, type(self))
        return digest(*parts, self.stride, self.mirrored, code)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Of a frame."""
        return self.names[index]

    def windows(self, image: int) -> list[int]:
        """The frames of an image, by their index."""
        if not self.protocol.geometry.windows:
            return [image]
        return list(range(self._starts[image], self._starts[image + 1]))

    def stored(self, index: int) -> Sample:
        """See `Images`."""
        return _own(self._sample(index))

    def frame(self, index: int) -> Frame:
        """See `Images`."""
        image, part = self._entries[index]
        return self._frames(self.dataset.size(self.split, image), self.names[index])[part]

    def image(self, index: int) -> Tensor:
        """`[3, h, w]` float32 in 0..1."""
        held = self._compact(index)
        if held is not None:
            return held.restore().image
        sample = self._sample(index)
        return self._frames(sample.size, sample.name)[self._entries[index][1]].image(sample.image)

    def framed(self, index: int, size: Size | None = None) -> Framed:
        """See `Images`. Ground truth of the protocol's usual size is kept; another is read anew."""
        held = self._compact(index)
        if held is not None and (size is None or size == held.truth_size):
            return held.restore()
        made, usual = self._read(index, size)
        if usual:
            self._keep(index, made)
        return _own(made)

    def original(self, index: int) -> Framed:
        """Ground truth as it is stored, for protocols that score there: never mirrored, and without an
        image."""
        sample = self._sample(index)
        return _own(self._labelled(Frame(sample.size, sample.size, sample.size).truth(sample)))

    @property
    def reads(self) -> bool:  # type: ignore[override]
        """See `Images`; what was not read yet is judged by a frame that was.

        Threads that have nothing to read are not free: they take turns with the loop that they serve.
        """
        left = len(self) - len(self._kept)
        if not left:
            return False
        if self._frame_bytes is None:
            known = next(iter(self._kept.values()), None) or self._compact(0)
            self._frame_bytes = (known or self._keep(0, self._read(0)[0])).nbytes
        return self._frame_bytes * left > self._arena.budget

    def prefetch(self, indices: Sequence[int]) -> object:
        """See `Images`."""
        return [self._compact(index) or self._keep(index, self._read(index)[0]) for index in indices]

    def output_size(self, index: int) -> Size:
        """(H, W) of the upsampled features of a frame."""
        fixed = self.protocol.geometry.size(self.stride)
        if fixed is not None:
            return self._output(fixed)
        if index not in self._sizes:
            frame = self.frame(index)
            self._sizes[index] = (frame.size, self._output(frame.size))
        return self._sizes[index][1]

    def truth(
        self,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        crops: Sequence[Crop] | None = None,
    ) -> Truth:
        """See `Images`; of frames in memory, nothing but the rectangles is looked at."""
        held = [self._compact(i) or self._keep(i, self._read(i)[0]) for i in indices]
        if crops is not None:
            held = [one.cut(*crop) for one, crop in zip(held, crops, strict=True)]
        return Truth.stack(held, device)

    def _sample(self, index: int) -> Sample:
        """The image of a frame, as the dataset has it: maybe not the caller's own.

        Raises:
            UpbenchError: It cannot be read, or no metric could be trusted with its ground truth.
        """
        sample = self.dataset.read(self.split, self._entries[index][0])
        try:
            sample.check()
        except UpbenchError as error:
            raise UpbenchError(f"{self.dataset.name}/{self.split}: {error}") from error
        return sample

    def _frames(self, source: Size, name: str) -> Sequence[Frame]:
        try:
            frames = self.protocol.geometry.frames(source, self.stride)
        except UpbenchError as error:
            raise UpbenchError(f"{self.dataset.name}/{self.split}: image '{name}': {error}") from error
        return [frame.mirror() for frame in frames] if self.mirrored else frames

    def _output(self, frame_size: Size) -> Size:
        cells = (max(1, round(frame_size[0] / self.stride)), max(1, round(frame_size[1] / self.stride)))
        return self.protocol.output.size(frame_size, cells)

    def _truth_size(self, frame: Frame) -> Size:
        """That of the output, where a head answers for each of its pixels; heads of several layers have an
        output of their own, which is brought to the frame's size."""
        return self._output(frame.size) if self.protocol.recipe.head == "linear" else frame.size

    def _labelled(self, framed: Framed) -> Framed:
        """Labels as the protocol counts them, checked.

        Raises:
            UpbenchError: A label that is no class of the dataset.
        """
        label = framed.label
        if label is None:
            return framed
        count, odd = len(self.dataset.classes), label[label != IGNORE]
        if len(odd) and not 0 <= int(odd.min()) <= int(odd.max()) < count:
            raise UpbenchError(
                f"labels {int(odd.min())} to {int(odd.max())} of image '{framed.name}' are out of range: "
                f"dataset '{self.dataset.name}' names {count} classes (0 to {count - 1}; {IGNORE} is ignored)"
            )
        other = self.dataset.other_class
        if self.protocol.labels == "all" or other is None:
            return framed
        label = label.masked_fill(label == other, IGNORE)
        return replace(framed, label=torch.where((label > other) & (label != IGNORE), label - 1, label))

    def _compact(self, index: int) -> _Compact | None:
        """What is in memory of a frame."""
        kept = self._kept.get(index)
        return self._held.get(index) if kept is None else kept

    def _read(self, index: int, size: Size | None = None) -> tuple[Framed, bool]:
        """A frame from disk, and whether its ground truth has the protocol's usual size."""
        sample = self._sample(index)
        frame = self._frames(sample.size, sample.name)[self._entries[index][1]]
        usual = self._truth_size(frame)
        made = frame.of(sample, size or usual, self.protocol.sampling)
        made = self._labelled(replace(made, name=self.names[index]))
        return made, size is None or size == usual

    def _keep(self, index: int, framed: Framed) -> _Compact:
        """Holds a frame for good, or else for as long as somebody holds what this returns."""
        compact = _Compact.of(framed)
        with self._lock:
            there = self._compact(index)
            if there is not None:
                return there
            kept = compact.within(self._arena)
            if kept is not None:
                self._kept[index] = kept
                return kept
            self._held[index] = compact
            self._recent.append(compact)  # asked for again soon: by the view, then by the loss
            return compact


def _copy(value: Any) -> Any:
    """A copy of a tensor or of cameras; else the value itself."""
    if isinstance(value, Camera):
        return value.to("cpu", copy=True)
    return value.clone() if isinstance(value, Tensor) else value


def _own(parts: S) -> S:
    """A sample or a frame in tensors that nobody else sees: neither the dataset nor another cell."""
    return replace(parts, **{field.name: _copy(getattr(parts, field.name)) for field in fields(parts)})


@dataclass(frozen=True)
class _Compact:
    """A frame in few bytes: an image in 0..1 is a byte over 255, a label is a byte. Nothing is lost."""

    name: str
    image: Tensor
    valid: Tensor
    label: Tensor | None
    depth: Tensor | None
    normal: Tensor | None
    camera: Camera | None

    @classmethod
    def of(cls, framed: Framed) -> _Compact:
        label = None if framed.label is None else framed.label.to(torch.uint8)
        image = (framed.image * 255).round().to(torch.uint8)
        return cls(framed.name, image, framed.valid, label, framed.depth, framed.normal, framed.camera)

    def restore(self) -> Framed:
        """The frame, the caller's own."""
        label = None if self.label is None else self.label.long()
        image = self.image.float() / 255
        depth, normal, camera = _copy(self.depth), _copy(self.normal), _copy(self.camera)
        return Framed(self.name, image, self.valid.clone(), label, depth, normal, camera)

    def cut(self, rows: slice, cols: slice) -> _Compact:
        """A rectangle of the ground truth; the image stays whole."""
        height, width = self.truth_size
        if height < rows.stop or width < cols.stop:
            raise UpbenchError(
                f"ground truth of image '{self.name}' is {[height, width]}, less than the output"
            )

        def at(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[..., rows, cols]

        return replace(
            self,
            valid=self.valid[rows, cols],
            label=at(self.label),
            depth=at(self.depth),
            normal=at(self.normal),
        )

    @property
    def truth_size(self) -> Size:
        return int(self.valid.shape[-2]), int(self.valid.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.image, self.valid, self.label, self.depth, self.normal)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def within(self, arena: Arena) -> _Compact | None:
        """The same in an arena; None where that has no room."""
        tensors = (self.image, self.valid, self.label, self.depth, self.normal)
        copies = arena.keep([tensor for tensor in tensors if tensor is not None])
        if copies is None:
            return None
        each = iter(copies)
        image, valid = next(each), next(each)
        label, depth, normal = (None if tensor is None else next(each) for tensor in tensors[2:])
        return _Compact(self.name, image, valid, label, depth, normal, self.camera)
