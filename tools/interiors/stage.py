"""What a scene consists of while it is being furnished: shapes with a label each, and the room around
them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import mitsuba as mi
import numpy as np

from upbench.datasets.interiors.classes import RAW_CLASSES

Side = Literal["back", "left", "right"]
SIDES: tuple[Side, ...] = ("back", "left", "right")


@dataclass(frozen=True)
class Placed:
    """A thing that stands somewhere: metres, z up, angle in radians around z."""

    code: str
    raw_class: str
    x: float
    y: float
    z: float
    angle: float
    size: tuple[float, float, float]
    top: float

    def local(self, x: float, y: float) -> tuple[float, float]:
        """A point given in the thing's own axes (front to -y), in the room."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.x + cos * x - sin * y, self.y + sin * x + cos * y


@dataclass
class Stage:
    """All shapes of a scene as Mitsuba dictionaries, the raw class and the object of each, and the models
    used."""

    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    lights: dict[str, dict[str, Any]] = field(default_factory=dict)
    placed: list[Placed] = field(default_factory=list)

    def add(self, raw_class: str, shape: dict[str, Any], thing: int = -1) -> None:
        """Adds a shape; `thing` numbers the object that it is a part of."""
        key = f"s{len(self.shapes):04d}"
        self.shapes[key] = {**shape, "id": key}
        self.labels[key] = RAW_CLASSES.index(raw_class)
        self.objects[key] = thing

    @property
    def models(self) -> list[str]:
        """Codes of the models in the scene, sorted."""
        return sorted({thing.code for thing in self.placed})


@dataclass(frozen=True)
class Span:
    """A stretch of a wall that something hangs on: from `left` to `right`, from `bottom` to `top`."""

    side: Side
    left: float
    right: float
    bottom: float
    top: float

    def overlaps(self, other: Span) -> bool:
        """Whether two things would hang on the same spot."""
        return (
            self.side == other.side
            and self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


@dataclass
class Room:
    """A room with three walls; the fourth, at y = -depth / 2, is open towards the camera."""

    width: float
    depth: float
    height: float
    spans: list[Span] = field(default_factory=list)

    def along(self, side: Side) -> float:
        """Length of a wall."""
        return self.width if side == "back" else self.depth

    def at_wall(self, side: Side, along: float, off: float) -> tuple[float, float, float]:
        """x, y and angle of a thing whose back is to a wall, its centre `off` from it."""
        if side == "back":
            return along, self.depth / 2 - off, 0.0
        if side == "left":
            return -self.width / 2 + off, along, math.pi / 2
        return self.width / 2 - off, along, -math.pi / 2

    def spot(self, side: Side, width: float, rng: np.random.Generator) -> float:
        """A random place along a wall for something of a width."""
        reach = self.along(side) / 2 - width / 2 - 0.1
        return float(rng.uniform(-reach, reach)) if reach > 0 else 0.0

    def claim(self, span: Span) -> bool:
        """Reserves a stretch of wall if it is free."""
        if any(span.overlaps(other) for other in self.spans):
            return False
        self.spans.append(span)
        return True


def footprint(x: float, y: float, width: float, depth: float, angle: float) -> np.ndarray:
    """Corners `[4, 2]` of a turned rectangle."""
    cos, sin = math.cos(angle), math.sin(angle)
    half = np.array([(-width, -depth), (width, -depth), (width, depth), (-width, depth)]) / 2
    corners: np.ndarray = half @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
    return corners


def collide(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rectangles overlap (separating axes)."""
    for corners in (a, b):
        for edge in np.roll(corners, -1, axis=0) - corners:
            axis = np.array([-edge[1], edge[0]])
            p, q = a @ axis, b @ axis
            if p.max() <= q.min() or q.max() <= p.min():
                return False
    return True


def upright(x: float, y: float, z: float, angle: float, scale: float = 1.0) -> Any:
    """Transform of something that stands at a place, turned around z."""
    return mi.ScalarTransform4f().translate([x, y, z]).rotate([0, 0, 1], math.degrees(angle)).scale(scale)
