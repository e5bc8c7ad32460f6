"""A method's features of a split: per-pixel outputs of any linear probe, at the least cost the method
allows."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from typing import Protocol as Interface

import torch
from torch import Tensor

from upbench.contracts.operator import FunctionOperator, Operator, SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.task import Crop, DenseBatch, DenseFeatures, Images
from upbench.dense.method import OPERATOR, MethodCall, resized_guidance, sound
from upbench.dense.project import Part, project_parts
from upbench.dense.spill import DISK_RESERVE, Store, size_of
from upbench.errors import UpbenchError
from upbench.system.allocator import trim
from upbench.system.cache import cache_dir
from upbench.system.progress import say, track

Size = tuple[int, int]

DEFAULT_BUDGET = 3_000_000_000
"""Bytes of memory that one split's kept operators or dense maps may take."""

SCRATCH_BUDGET = 20_000_000_000
"""Bytes of files that they may take beyond it unless UPBENCH_SCRATCH says how many GB; a split that needs
more computes them again each time."""

WORKING_BUDGET = 256_000_000
"""Bytes that an operator may take to be made that is not kept."""

_TRIM_EVERY = 16
"""Operators between two returns of freed memory to the system: they are large, and moved to files they leave
holes that the next ones may not fit."""

_SIZES = 512
"""Operators of methods that look at sizes alone, one a size, that are kept at most."""


def scratch_budget() -> int:
    """Bytes of files that the operators of a split may take.

    Raises:
        UpbenchError: UPBENCH_SCRATCH is no number of GB.
    """
    told = os.environ.get("UPBENCH_SCRATCH", "")
    if not told:
        return SCRATCH_BUDGET
    try:
        gigabytes = float(told)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < math.inf:
        raise UpbenchError(f"UPBENCH_SCRATCH must be a number of GB, got '{told}'")
    return int(gigabytes * 1e9)


class LowResolution(Interface):
    """Features of the same frames, as `upbench.features.store.FeatureStore` gives them."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """`[B, C, h, w]` float32 on the device."""


class UpsampledSplit(DenseFeatures):
    """The upsampled features of a split's frames, never all in memory at once.

    Where the method has a linear `Operator` for a frame, a probe is applied to the low-resolution features
    first and its K outputs are upsampled instead of the C channels: the same result, K / C of the cost.
    Otherwise the dense features are computed and the probe is applied to them.

    Operators (dense maps) of a small split are computed once and kept: in memory as they are where the whole
    split fits `budget`, else in float16, and beyond that in files. Those of a large split are computed each
    time, of the crop that is asked for where the method can do that. The first frame decides, and the log
    says so. A method that looks at sizes alone, such as bilinear interpolation, has one operator for all
    frames of a size. One object serves every task and every seed of a method on a split.
    """

    def __init__(
        self,
        call: MethodCall,
        images: Images,
        features: LowResolution,
        *,
        guidance_size: str = "image",
        budget: int = DEFAULT_BUDGET,
        title: str = "",
    ) -> None:
        """Takes a method and what it is applied to.

        Args:
            call: The method.
            images: What guides it.
            features: Of the same frames in the same order.
            guidance_size: "image", or "output" for guidance resized to the output's size.
            budget: Bytes of memory to keep operators and dense maps in.
            title: Of the split, for messages.

        Raises:
            UpbenchError: Counts that do not match.
        """
        if len(images) != len(features) or not len(images):
            raise UpbenchError(f"{len(images)} images do not go with features of {len(features)}")
        self.call, self.images, self.low = call, images, features
        self.title = title
        self._at_output = guidance_size == "output"
        self._store = Store(budget, len(images), spill=call.device.type == "cpu")
        self._keeps: bool | None = None  # not decided before the first frame
        self._alike = False
        self._by_size: dict[tuple[object, ...], Operator | Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def output_size(self, index: int) -> Size:
        """See `DenseFeatures`."""
        return self.images.output_size(index)

    def batch(self, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> Batch:
        """See `DenseFeatures`. Frames may be asked for twice, with different crops."""
        indices = list(indices)
        if crops is not None and len(crops) != len(indices):
            raise UpbenchError(f"{len(indices)} frames do not go with {len(crops)} crops")
        if crops is not None and all(
            (rows.start, rows.stop, cols.start, cols.stop) == (0, height, 0, width)
            for (rows, cols), (height, width) in zip(crops, map(self.output_size, indices), strict=True)
        ):
            crops = None  # whole frames: nothing is gained by operators that are made for a crop
        if self.keeps():
            return Batch(self, indices, self._kept(indices, crops))
        return Batch(self, indices, self._made(indices, crops))

    def keeps(self) -> bool:
        """Whether operators of this split are kept; the first frame is looked at to tell."""
        if self._keeps is None:
            item = self._compute(0)
            method = self.call.method
            blind = method.linear and not (method.guided or method.uses_camera or method.uses_backbone)
            self._alike = blind and isinstance(item, Operator)
            self._keeps = self._alike or self._room(size_of(item) * len(self))
            if self._keeps and not self._alike:
                self._store.offer(0, item)
        return self._keeps

    def prepare(self, description: str) -> None:
        """Computes what is kept of each frame now, with a progress bar, instead of when it is first needed.

        Args: description: Of the progress bar.
        """
        if not self.keeps() or self._alike:
            return
        missing = [index for index in range(len(self)) if index not in self._store]
        for index in track(missing, description):
            self._store.offer(index, self._compute(index))
            if index not in self._store:
                break
            if index % _TRIM_EVERY == 0 and self.call.device.type == "cpu":
                trim()

    def nbytes(self) -> int:
        """Bytes of memory that are kept at the moment."""
        return self._store.used

    def explain(self, indices: Sequence[int]) -> UpbenchError | None:
        """Why outputs for these frames are not finite, if it is the method's doing."""
        for index in indices:
            name = self.images.names[index]
            view = self._view(index)
            if isinstance(view, Operator):
                features = view.takes(self.low.batch([index]))
                ones = torch.ones_like(features[:, :1]).unsqueeze(1).expand(-1, view.groups, -1, -1, -1)
                if not bool(features.isfinite().all()):
                    return UpbenchError(f"features of image '{name}' are not finite")
                if not bool(view(ones).isfinite().all()):
                    return UpbenchError(
                        f"method '{self.call.method.name}': its operator gives values that are not finite "
                        f"for image '{name}'"
                    )
            elif not bool(view.isfinite().all()):
                return self._not_finite(name)
        return None

    def _room(self, total: int) -> bool:
        """Whether so many bytes (half of it in float16) can be kept; says so where they cannot."""
        if total // 2 <= self._store.budget:
            return True
        beyond = total // 2 - self._store.budget
        on_cpu = self.call.device.type == "cpu"
        free = shutil.disk_usage(cache_dir("scratch")).free - DISK_RESERVE if on_cpu else 0
        if on_cpu and beyond <= min(scratch_budget(), free):
            return True
        fits = on_cpu and beyond <= free
        hint = f" (UPBENCH_SCRATCH={math.ceil(beyond / 1e9)} keeps them in files)" if fits else ""
        say(
            f"{self.call.method.name}: operators of {len(self)} images of {self.title or 'this split'} would "
            f"take {total / 2e9:.0f} GB; they are computed again each time{hint}"
        )
        return False

    def _kept(self, indices: list[int], crops: Sequence[Crop] | None) -> list[Part]:
        """A part for each frame, from what is kept; one for all frames that share an operator."""
        features = self._features(indices)
        if self._alike:
            return self._shared(indices, features, crops)
        parts = []
        for place, index in enumerate(indices):
            low = features[place]
            view = self._view(index, low)
            if crops is not None:
                view = _cropped(view, crops[place])
            parts.append(Part([place], view, low))
        return parts

    def _shared(self, indices: list[int], features: list[Tensor], crops: Sequence[Crop] | None) -> list[Part]:
        """Parts of a method with one operator a size: few large products instead of many small ones."""
        groups: dict[tuple[object, ...], list[int]] = {}
        views = [self._view(index, low) for index, low in zip(indices, features, strict=True)]
        for place, view in enumerate(views):
            side = () if crops is None else tuple(s.stop - s.start for s in crops[place])
            groups.setdefault((id(view), side), []).append(place)
        parts = []
        for places in groups.values():
            view, low = views[places[0]], [features[p] for p in places]
            if crops is None:
                parts.append(Part(places, view, torch.cat(low)))
                continue
            joined = (
                view.cropped_each([crops[p] for p in places], low) if isinstance(view, Operator) else None
            )
            if joined is None:
                parts += [Part([p], _cropped(view, crops[p]), features[p]) for p in places]
            else:
                parts.append(Part(places, *joined))
        return parts

    def _made(self, indices: list[int], crops: Sequence[Crop] | None) -> list[Part]:
        """Parts made for this batch alone: frames of one size and one crop share an operator."""
        groups: dict[tuple[object, ...], list[int]] = {}
        inputs = [self._inputs(index) for index in indices]
        features = self._features(indices)
        for place, (image, _) in enumerate(inputs):
            crop = None if crops is None else tuple((s.start, s.stop) for s in crops[place])
            size = self.output_size(indices[place])
            groups.setdefault((tuple(image.shape), tuple(features[place].shape), size, crop), []).append(
                place
            )
        return [self._part(places, indices, inputs, features, crops) for places in groups.values()]

    def _part(
        self,
        places: list[int],
        indices: list[int],
        inputs: list[tuple[Tensor, Camera | None]],
        features: list[Tensor],
        crops: Sequence[Crop] | None,
    ) -> Part:
        """One operator, or dense features, for frames of one size and one crop."""
        image, low = torch.cat([inputs[p][0] for p in places]), torch.cat([features[p] for p in places])
        camera = _joined([inputs[p][1] for p in places])
        size = self.output_size(indices[places[0]])
        if crops is None:
            return Part(places, self._operator_or_dense(image, low, size, camera, None), low)
        view = self._operator_or_dense(image, low, size, camera, WORKING_BUDGET)
        return Part(places, _cropped(view, crops[places[0]]), low)

    def _features(self, indices: list[int]) -> list[Tensor]:
        """`[1, C, h, w]` of each frame; read once where a frame is asked for again."""
        unique = list(dict.fromkeys(indices))
        try:
            read = dict(zip(unique, self.low.batch(unique).unsqueeze(1), strict=True))
        except UpbenchError:  # of different sizes
            read = {index: self.low.batch([index]) for index in unique}
        return [read[index] for index in indices]

    def _view(self, index: int, low: Tensor | None = None) -> Operator | Tensor:
        """The frame's operator, else its dense features `[1, C, H, W]`; from memory where it is kept.

        Args: index: Of the frame; low: Its features, where they are at hand.
        """
        if self._alike:
            grid = tuple((self.low.batch([index]) if low is None else low).shape)
            key = (grid, self.output_size(index))
            if key not in self._by_size:
                if len(self._by_size) >= _SIZES:
                    self._by_size.clear()
                self._by_size[key] = self._compute(index)
            return self._by_size[key]
        kept = self._store.get(index)
        if kept is None:
            kept = self._compute(index)
            if self._keeps:
                kept = self._store.offer(index, kept)
        return kept

    def _compute(self, index: int) -> Operator | Tensor:
        image, camera = self._inputs(index)
        made = self._operator_or_dense(image, self.low.batch([index]), self.output_size(index), camera, None)
        if isinstance(made, Tensor) and not bool(made.isfinite().all()):
            raise self._not_finite(self.images.names[index])
        return made

    def _operator_or_dense(
        self, image: Tensor, low: Tensor, size: Size, camera: Camera | None, budget: int | None
    ) -> Operator | Tensor:
        image = resized_guidance(image, size) if self._at_output else image
        made = self.call.operator(image, low, size, camera, budget)
        return self.call.forward(image, low, size, camera) if made is None else made

    def _inputs(self, index: int) -> tuple[Tensor, Camera | None]:
        framed = self.images.framed(index)
        camera = self.call.given_camera(framed.name, framed.camera)
        return framed.image[None].to(self.call.device), camera

    def _not_finite(self, name: str) -> UpbenchError:
        return UpbenchError(
            f"method '{self.call.method.name}' gives features that are not finite for image '{name}'"
        )


class Batch(DenseBatch):
    """See `DenseBatch`.

    Attributes:
        indices: Of the frames, in the order of the batch.
        parts: What is applied to which of them.
    """

    def __init__(self, split: UpsampledSplit, indices: list[int], parts: list[Part]) -> None:
        self.split = split
        self.indices = indices
        self.parts = parts

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def sizes(self) -> list[Size]:
        """(H, W) of each frame's output."""
        found = {place: part.size for part in self.parts for place in part.places}
        return [found[place] for place in range(len(self))]

    def crop(self, crop: Crop) -> Batch:
        """The same rectangle of every frame; nothing is computed again."""
        parts = [Part(part.places, _cropped(part.view, crop), part.features) for part in self.parts]
        return Batch(self.split, self.indices, parts)

    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `DenseBatch`."""
        return project_parts(self.parts, len(self), weight, bias)

    def dense(self) -> Tensor:
        """See `DenseBatch`."""
        out: Tensor | None = None
        for part in self.parts:
            view = part.view
            if isinstance(view, Operator):
                features = view.takes(part.features)
                values = sound(view.dense(features), features, (*features.shape[:2], *part.size), OPERATOR)
            else:
                values = view
            if out is None:
                height, width = (max(p.size[axis] for p in self.parts) for axis in (0, 1))
                out = values.new_zeros(len(self), values.shape[1], height, width, dtype=torch.float32)
            for row, place in enumerate(part.places):
                out[place, :, : values.shape[-2], : values.shape[-1]] = values[row]
        assert out is not None
        return out

    def at(self, points: Tensor) -> Tensor:
        """See `DenseBatch`."""
        if points.ndim != 3 or points.shape[0] != len(self) or points.shape[2] != 2:
            raise UpbenchError(f"points must be [{len(self)}, P, 2], got {list(points.shape)}")
        columns: list[Tensor | None] = [None] * len(self)
        for part in self.parts:
            height, width = part.size
            for row, place in enumerate(part.places):
                own = points[place]
                if len(own) and not bool(((own >= 0) & (own < own.new_tensor([height, width]))).all()):
                    raise UpbenchError(f"points lie outside of an output of {height}x{width}")
                columns[place] = _pixels(part, row, own.tolist())
        return torch.stack([column for column in columns if column is not None])


def _pixels(part: Part, row: int, points: list[list[int]]) -> Tensor:
    """`[C, P]` features of a frame at some pixels."""
    view = part.view
    inner = view.operator if isinstance(view, SourcedOperator) else view
    if isinstance(inner, FunctionOperator):  # each of its crops would compute the whole
        view = view.dense(view.takes(part.features))  # type: ignore[union-attr]
    if isinstance(view, Tensor):
        index = torch.tensor(points, dtype=torch.int64, device=view.device).reshape(-1, 2)
        return view[row][:, index[:, 0], index[:, 1]].float()
    features = view.takes(part.features)
    found = []
    for y, x in points:
        pixel = view.crop(slice(y, y + 1), slice(x, x + 1))
        found.append(pixel.dense(features)[row, :, 0, 0])
    return torch.stack(found, 1) if found else features.new_zeros(int(features.shape[1]), 0)


def _cropped(view: Operator | Tensor, crop: Crop) -> Operator | Tensor:
    """A view's rectangle; the view itself where that is all of it."""
    rows, cols = crop
    whole = view.output_size if isinstance(view, Operator) else (int(view.shape[-2]), int(view.shape[-1]))
    if (rows.start, rows.stop) == (0, whole[0]) and (cols.start, cols.stop) == (0, whole[1]):
        return view
    return view.crop(rows, cols) if isinstance(view, Operator) else view[..., rows, cols]


def _joined(cameras: list[Camera | None]) -> Camera | None:
    """One batch of cameras."""
    there = [camera for camera in cameras if camera is not None]
    if len(there) != len(cameras) or not there:
        return None
    poses = [c.pose for c in there if c.pose is not None]
    if poses and len(poses) != len(there):
        eye = torch.eye(4).to(poses[0])[None]
        poses = [eye if c.pose is None else c.pose for c in there]
    return Camera(torch.cat([c.intrinsics for c in there]), torch.cat(poses) if poses else None)
