"""How a stored image becomes what a backbone sees, and its ground truth what is scored.

A `Geometry` cuts one or several `Frame`s out of an image. A frame is three steps, each of which may do
nothing:

    stored image ──pad──► canvas ──resize──► resized ──crop──► frame
       H x W               border            rh x rw    offset   h x w

Labels, depth, normals and cameras go the same way, exactly: a map is sampled once, at the stored pixel under
the centre of each pixel of the result, so that no label, depth or normal is an average over a boundary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from upbench.contracts.sample import IGNORE, Camera, Framed, Sample
from upbench.errors import UpbenchError, unknown

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filters; all but "nearest" antialias."""

SAMPLINGS = ("centre", "pillow", "floor")
"""How a map is read: the stored pixel under the centre of each pixel of the result ("centre"); the same as
Pillow's NEAREST computes it, which differs where a centre falls on the edge of a stored pixel ("pillow"); or
the frame's map (read as Pillow does) brought to another size by PyTorch's "nearest", which rounds down
("floor")."""

MOST_PIXELS = 2**28
"""Of an image at any step: 0.8 GB of colours, and four times that as floats."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """A rectangle of an image, resized.

    Attributes:
        source: (H, W) of the stored image.
        resized: (rh, rw) of the canvas after the resize.
        size: (h, w) of the frame.
        offset: (top, left) of the frame in the resized canvas; negative where it hangs over the border.
        pad: Pixels added to the stored image before the resize: top, left, bottom, right.
        filter: A key of `FILTERS`.
        fill: RGB in 0..255 of pixels outside the stored image.
        mirrored: Whether left and right are exchanged, last of all.
    """

    source: Size
    resized: Size
    size: Size
    offset: tuple[int, int] = (0, 0)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    filter: str = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise unknown("filter", self.filter, FILTERS)
        if min(*self.source, *self.resized, *self.size) < 1 or min(self.pad) < 0:
            raise UpbenchError(f"a frame of {self.size} from {self.resized} from {self.source} is empty")
        for what, (height, width) in (("padded", self.canvas), ("resized", self.resized), ("cut", self.size)):
            if height * width > MOST_PIXELS:
                stored, memory = f"{self.source[1]}x{self.source[0]}", height * width * 3 / 1e9
                raise UpbenchError(
                    f"{what} to {width}x{height} pixels, an image of {stored} takes {memory:.1f} GB and more"
                )

    @property
    def canvas(self) -> Size:
        """(H, W) of the padded image."""
        top, left, bottom, right = self.pad
        return self.source[0] + top + bottom, self.source[1] + left + right

    def mirror(self) -> Frame:
        """The same frame with left and right exchanged."""
        return replace(self, mirrored=not self.mirrored)

    def image(self, image: Tensor) -> Tensor:
        """`[3, H, W]` uint8 to `[3, h, w]` float32 in 0..1."""
        pixels = image.permute(1, 2, 0).numpy()
        if any(self.pad):
            top, left, _, _ = self.pad
            canvas = np.full((*self.canvas, 3), self.fill, dtype=np.uint8)
            canvas[top : top + self.source[0], left : left + self.source[1]] = pixels
            pixels = canvas
        if self.resized != self.canvas:
            height, width = self.resized
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.asarray(picture.resize((width, height), FILTERS[self.filter]))
        pixels = self._cropped(pixels)
        pixels = pixels[:, ::-1] if self.mirrored else pixels
        return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1).contiguous()

    def nearest(self, values: Tensor, size: Size | None = None, sampling: str = "centre") -> Tensor:
        """A map of the stored image (`[..., H, W]`, any dtype) at the frame's pixels, or at those of another
        grid over the same rectangle. Pixels outside the image get the nearest that there is (`inside`).

        Args:
            values: What to sample.
            size: (h', w') of the result; the frame's own by default.
            sampling: One of `SAMPLINGS`.
        """
        rows, cols, _ = self._indices(size or self.size, sampling)
        return values[..., rows[:, None], cols[None, :]]

    def inside(self, size: Size | None = None, sampling: str = "centre") -> Tensor:
        """`[h', w']` bool: which pixels lie in the stored image, and not in a border."""
        return self._indices(size or self.size, sampling)[2]

    def camera(self, camera: Camera) -> Camera:
        """The camera in pixels of the frame.

        A mirrored image is that of the mirrored world: its centre is mirrored, and so is its pose.
        """
        fx, fy, cx, cy = camera.intrinsics.double().unbind(1)
        (ch, cw), (rh, rw), (top, left) = self.canvas, self.resized, self.offset
        sy, sx = rh / ch, rw / cw
        cx, cy = (cx + self.pad[1]) * sx - left, (cy + self.pad[0]) * sy - top
        pose = camera.pose
        if self.mirrored:
            cx = self.size[1] - cx
            if pose is not None:
                sign = pose.new_tensor([-1.0, 1, 1, 1])
                pose = pose * sign[:, None] * sign
        intrinsics = torch.stack([fx * sx, fy * sy, cx, cy], 1)
        return Camera(intrinsics.to(camera.intrinsics.dtype), pose)

    def of(self, sample: Sample, size: Size | None = None, sampling: str = "centre") -> Framed:
        """The sample in this frame.

        Args:
            sample: Of the size `source`.
            size: (H, W) of the ground truth; the frame's own by default. The image has always the frame's.
            sampling: One of `SAMPLINGS`, for ground truth of another size.
        """
        truth = self.truth(sample, size, sampling)
        return replace(truth, image=self.image(sample.image))

    def truth(self, sample: Sample, size: Size | None = None, sampling: str = "centre") -> Framed:
        """`of` without its image, which is empty: for those who only score."""
        rows, cols, inside = self._indices(size or self.size, sampling)

        def at(values: Tensor) -> Tensor:
            return values[..., rows[:, None], cols[None, :]]

        valid = inside if sample.valid is None else at(sample.valid) & inside
        label = depth = normal = None
        if sample.label is not None:
            label = at(sample.label).long().masked_fill(~inside, IGNORE)
        if sample.depth is not None:
            depth = at(sample.depth).masked_fill(~inside, 0)
        if sample.normal is not None:
            normal = at(sample.normal).masked_fill(~inside, 0)
            if self.mirrored:
                normal = normal * normal.new_tensor([-1.0, 1, 1]).view(3, 1, 1)
        camera = None if sample.camera is None else self.camera(sample.camera)
        empty = torch.zeros(3, 0, 0)
        return Framed(sample.name, empty, valid, label, depth, normal, camera)

    def _cropped(self, pixels: np.ndarray) -> np.ndarray:
        """The frame's part of the resized canvas, with `fill` where it hangs over."""
        (h, w), (top, left), (rh, rw) = self.size, self.offset, self.resized
        if top >= 0 and left >= 0 and top + h <= rh and left + w <= rw:
            return pixels[top : top + h, left : left + w]
        out = np.full((h, w, 3), self.fill, dtype=np.uint8)
        r0, r1, c0, c1 = max(0, top), min(rh, top + h), max(0, left), min(rw, left + w)
        out[r0 - top : r1 - top, c0 - left : c1 - left] = pixels[r0:r1, c0:c1]
        return out

    def _indices(self, size: Size, sampling: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns of the stored image under the pixels of a grid, and which lie inside it."""
        if sampling not in SAMPLINGS:
            raise unknown("sampling", sampling, SAMPLINGS)
        rows, rows_in = self._axis(0, size[0], sampling, mirrored=False)
        cols, cols_in = self._axis(1, size[1], sampling, mirrored=self.mirrored)
        return rows, cols, rows_in[:, None] & cols_in[None, :]

    def _axis(self, axis: int, count: int, sampling: str, mirrored: bool) -> tuple[Tensor, Tensor]:
        """Stored positions under the pixels of an axis, and which of them are real."""
        own, before, canvas = self.size[axis], self.pad[axis], self.canvas[axis]
        if sampling == "centre":  # in whole numbers: a centre may fall on the edge of a stored pixel
            place = (2 * torch.arange(count) + 1) * own + 2 * count * self.offset[
                axis
            ]  # of 2 * count a pixel
            inside = (place >= 0) & (place < 2 * count * self.resized[axis])
            stored = (place * canvas).div(2 * count * self.resized[axis], rounding_mode="floor")
            stored = stored.clamp_(0, canvas - 1)
            if mirrored:
                stored, inside = stored.flip(0), inside.flip(0)
        else:
            if sampling == "floor":  # of the mirrored map
                index = _rounded_down(own, count)
                index = own - 1 - index if mirrored else index
            else:
                index = _whole(own, count)
                index = index.flip(0) if mirrored else index
            index = index + self.offset[axis]
            inside = (index >= 0) & (index < self.resized[axis])
            stored = _pillow(canvas, self.resized[axis])[index.clamp(0, self.resized[axis] - 1)]
        stored = stored - before
        inside &= (stored >= 0) & (stored < self.source[axis])
        return stored.clamp_(0, self.source[axis] - 1), inside


def _whole(own: int, count: int) -> Tensor:
    """`[count]` pixels of the frame under those of a grid of another size, by their centres."""
    return ((2 * torch.arange(count) + 1) * own).div(2 * count, rounding_mode="floor")


def _rounded_down(own: int, count: int) -> Tensor:
    """`[count]` pixels of the frame that PyTorch's "nearest" takes; in float32, as there."""
    scale = torch.tensor(own, dtype=torch.float32) / torch.tensor(count, dtype=torch.float32)
    return (torch.arange(count, dtype=torch.float32) * scale).floor().long().clamp_(0, own - 1)


@lru_cache(maxsize=64)
def _pillow(stored: int, resized: int) -> Tensor:
    """`[resized]` stored positions that Pillow's NEAREST takes."""
    if stored == resized:
        return torch.arange(stored)
    ramp = Image.fromarray(np.arange(stored, dtype=np.int32)[None])
    return torch.from_numpy(np.array(ramp.resize((resized, 1), Image.Resampling.NEAREST))[0]).long()


class Geometry(ABC):
    """Where the frames of an image lie. Subclasses are frozen dataclasses: their fields are the protocol's
    parameters, and name what is cached under them."""

    @abstractmethod
    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """The frames of an image, at least one.

        Args:
            source: (H, W) of the stored image.
            stride: Pixels per feature of the backbone, for geometries that keep to whole patches.
        """

    windows: bool = False
    """Whether an image may have several frames."""

    def size(self, stride: int = 1) -> Size | None:
        """(h, w) of every frame, or None where it depends on the image."""
        return None

    @property
    def key(self) -> str:
        """Name and parameters in one line: what caches are keyed by and what tables show."""
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({given})"

    def describe(self) -> dict[str, Any]:
        """Its parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def assemble(
        self, frames: Sequence[Frame], predictions: Sequence[Tensor], nearest: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predictions of an image's frames at the stored size: frames that overlap are averaged.

        Args:
            frames: As `frames` gives them.
            predictions: `[K, h', w']` of each, on any grid over its rectangle.
            nearest: Whether they are brought to other sizes by nearest, so that the largest of the K is that
                of some pixel of a prediction.

        Returns:
            `[K, H, W]`, resized bilinearly (half-pixel centres) where not by nearest, and `[H, W]` bool:
            which pixels some frame saw. Those of mirrored frames are mirrored back.
        """
        first, frame = predictions[0], frames[0]
        total = first.new_zeros(first.shape[0], *frame.resized)
        weight = first.new_zeros(frame.resized)
        for one, prediction in zip(frames, predictions, strict=True):
            (h, w), (top, left), (rh, rw) = one.size, one.offset, one.resized
            values = resized(prediction, (h, w), nearest)
            values = values.flip(-1) if one.mirrored else values
            r0, r1, c0, c1 = max(0, top), min(rh, top + h), max(0, left), min(rw, left + w)
            total[:, r0:r1, c0:c1] += values[:, r0 - top : r1 - top, c0 - left : c1 - left]
            weight[r0:r1, c0:c1] += 1
        seen = (weight > 0).to(first.dtype)
        # Divided by how much of it was seen: what was not does not bleed into what was.
        share = resized(seen[None], frame.canvas, nearest)
        canvas = resized(total / weight.clamp(min=1), frame.canvas, nearest) / share.clamp(min=1e-6)
        (top, left, _, _), (height, width) = frame.pad, frame.source
        rows, cols = (at.to(seen.device) for at in _stored_to_resized(frame))
        covered = weight[rows[:, None], cols[None, :]] > 0
        return canvas[:, top : top + height, left : left + width], covered


def resized(values: Tensor, size: Size, nearest: bool = False) -> Tensor:
    """`[K, h, w]` at another size: unchanged if equal, else bilinear with half-pixel centres, or the value
    under each centre."""
    if tuple(values.shape[-2:]) == size:
        return values
    if nearest:
        return F.interpolate(values[None], size, mode="nearest-exact")[0]
    return F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]


def _stored_to_resized(frame: Frame) -> tuple[Tensor, Tensor]:
    """Row and column of the resized canvas under the centre of each stored pixel."""
    axes = []
    for axis in (0, 1):
        place = 2 * (torch.arange(frame.source[axis]) + frame.pad[axis]) + 1
        axes.append((place * frame.resized[axis]).div(2 * frame.canvas[axis], rounding_mode="floor"))
    return axes[0], axes[1]
