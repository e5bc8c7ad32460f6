"""The geometries that papers use; a protocol names one, and a plugin may bring its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upbench.contracts.geometry import FILTERS, Frame, Geometry, Size
from upbench.errors import UpbenchError, unknown
from upbench.values import LARGEST_SIDE, choice, whole


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        whole(f"geometry: {name}", value, most=LARGEST_SIDE)


def _known(filter: str) -> None:
    choice("filter", filter, tuple(FILTERS))


@dataclass(frozen=True)
class SquareCrop(Geometry):
    """The shorter side resized to `side`, then the central square.

    Attributes:
        side: Of the square, in pixels.
        filter: Of the resize.
        long_side: Rounding of the other side: "round" or "floor" (torchvision's).
        centre: Rounding of the crop's offset: "floor", or "round" (torchvision's, halves to even).
    """

    side: int
    filter: str = "bicubic"
    long_side: str = "round"
    centre: str = "floor"

    def __post_init__(self) -> None:
        _positive(side=self.side)
        _known(self.filter)
        for name in ("long_side", "centre"):
            if getattr(self, name) not in ("round", "floor"):
                raise unknown(f"rounding '{name}'", getattr(self, name), ("round", "floor"))

    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """See `Geometry`."""
        short = min(source)
        scaled = [
            n * self.side / short if self.long_side == "round" else n * self.side // short for n in source
        ]
        height, width = (max(self.side, round(n)) for n in scaled)
        middle = [(n - self.side) / 2 for n in (height, width)]
        top, left = (round(m) if self.centre == "round" else int(m) for m in middle)
        square = (self.side, self.side)
        return [Frame(source, (height, width), square, (top, left), filter=self.filter)]

    def size(self, stride: int = 1) -> Size:
        """See `Geometry`."""
        return self.side, self.side


@dataclass(frozen=True)
class Squash(Geometry):
    """The whole image at a fixed size, whatever its aspect.

    Attributes:
        height: In pixels.
        width: In pixels.
        filter: Of the resize.
    """

    height: int
    width: int
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        _positive(height=self.height, width=self.width)
        _known(self.filter)

    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """See `Geometry`."""
        size = (self.height, self.width)
        return [Frame(source, size, size, filter=self.filter)]

    def size(self, stride: int = 1) -> Size:
        """See `Geometry`."""
        return self.height, self.width


@dataclass(frozen=True)
class NativeAspect(Geometry):
    """The whole image at its own aspect, each side floored to a multiple of the patch.

    Attributes:
        short: Length that the shorter side is brought to first; 0 leaves the image as it is.
        multiple: What both sides are floored to a multiple of; 0 is the backbone's stride.
        fit: How a side loses the pixels beyond a multiple: "resize", or "crop" (at the centre).
        filter: Of the resize.
    """

    short: int = 0
    multiple: int = 0
    fit: str = "resize"
    filter: str = "bicubic"

    def __post_init__(self) -> None:
        _positive(short=self.short or 1, multiple=self.multiple or 1)
        _known(self.filter)
        if self.fit not in ("resize", "crop"):
            raise unknown("fit", self.fit, ("resize", "crop"))

    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """See `Geometry`."""
        scale = self.short / min(source) if self.short else 1.0
        step = self.multiple or stride
        height, width = (max(1, round(n * scale)) for n in source)
        size = (max(step, height // step * step), max(step, width // step * step))
        if self.fit == "resize" or height < size[0] or width < size[1]:
            return [Frame(source, size, size, filter=self.filter)]
        offset = ((height - size[0]) // 2, (width - size[1]) // 2)
        return [Frame(source, (height, width), size, offset, filter=self.filter)]


@dataclass(frozen=True)
class PaddedSquare(Geometry):
    """The image padded to a square, then resized: nothing is lost and no aspect changes.

    Attributes:
        side: Of the square, in pixels.
        filter: Of the resize.
        place: Where the image lies: "centre" or "corner" (top left).
        fill: RGB in 0..255 of the border.
    """

    side: int
    filter: str = "bilinear"
    place: str = "centre"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _positive(side=self.side)
        _known(self.filter)
        if self.place not in ("centre", "corner"):
            raise unknown("place", self.place, ("centre", "corner"))
        if len(self.fill) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in self.fill):
            raise UpbenchError(f"geometry: fill must be three whole numbers from 0 to 255, got {self.fill}")

    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """See `Geometry`."""
        longest = max(source)
        rest = [longest - n for n in source]
        before = [n // 2 if self.place == "centre" else 0 for n in rest]
        pad = (before[0], before[1], rest[0] - before[0], rest[1] - before[1])
        square = (self.side, self.side)
        return [Frame(source, square, square, pad=pad, filter=self.filter, fill=self.fill)]

    def size(self, stride: int = 1) -> Size:
        """See `Geometry`."""
        return self.side, self.side


@dataclass(frozen=True)
class Windows(Geometry):
    """Square windows that slide over the whole image and overlap; predictions are averaged where they do.

    Attributes:
        side: Of a window, in pixels.
        step: Between windows, at most `side`; the last one of a row or column ends at the border.
        short: Length that the shorter side is brought to first, at least `side`; 0 is `side`.
        filter: Of the resize.
    """

    side: int
    step: int
    short: int = 0
    filter: str = "bicubic"

    windows = True

    def __post_init__(self) -> None:
        _positive(side=self.side, step=self.step, short=self.short or 1)
        _known(self.filter)
        if self.step > self.side:
            raise UpbenchError(f"windows of {self.side} pixels in steps of {self.step} leave gaps")
        if self.short and self.short < self.side:
            raise UpbenchError(f"windows of {self.side} pixels do not fit a shorter side of {self.short}")

    def frames(self, source: Size, stride: int = 1) -> Sequence[Frame]:
        """See `Geometry`."""
        scale = (self.short or self.side) / min(source)
        height, width = (max(self.side, round(n * scale)) for n in source)
        square = (self.side, self.side)
        return [
            Frame(source, (height, width), square, (top, left), filter=self.filter)
            for top in self._starts(height)
            for left in self._starts(width)
        ]

    def size(self, stride: int = 1) -> Size:
        """See `Geometry`."""
        return self.side, self.side

    def _starts(self, length: int) -> list[int]:
        last = length - self.side
        return [*range(0, last, self.step), last]
