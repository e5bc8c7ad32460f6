"""Places furniture: against walls, freely, and small things on top of it, without collisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mitsuba as mi
import numpy as np

from .materials import MaterialStore
from .mesh import Model, ModelStore
from .models import GROUPS
from .procedural import Maker
from .stage import SIDES, Placed, Room, Side, Span, Stage, collide, footprint, upright

PROCEDURAL = {"made_vase": "vase", "made_bowl": "tableware", "made_books": "box"}
"""Groups whose members are made on the spot -> what `procedural.Maker` calls them."""

REPEATED_GROUPS = frozenset({"frame", "rug", "door"})
"""Groups of so few models that one may be in a scene twice."""


LARGE_CLASSES = frozenset({"door", "bed", "sofa"})


class Furnisher:
    """Adds models to a stage; every choice comes from one random generator.

    Args:
        stage, room: What is filled.
        store, materials, maker: Where models and what they look like come from.
        split: Decides which models may be shown.
    """

    def __init__(
        self,
        stage: Stage,
        room: Room,
        store: ModelStore,
        materials: MaterialStore,
        maker: Maker,
        split: str,
        rng: np.random.Generator,
    ) -> None:
        self.stage, self.room, self.store, self.materials, self.maker = stage, room, store, materials, maker
        self.split = split
        self.rng = rng
        self.taken: list[np.ndarray] = []
        self._surfaces: dict[int, Any] = {}

    def pick(
        self, group: str, fits: Callable[[Model, float], bool] | None = None
    ) -> tuple[Model, float] | None:
        """A model of a group and its scale: one that the split may show, that fits and that is not in the
        scene yet."""
        if group in PROCEDURAL:
            model = self.maker.make(PROCEDURAL[group])
            return (model, 1.0) if fits is None or fits(model, 1.0) else None
        scale = GROUPS[group].scale
        codes = list(GROUPS[group].codes(self.split))
        if group not in REPEATED_GROUPS:
            used = set(self.stage.models)
            codes = [code for code in codes if code not in used]
        for number in self.rng.permutation(len(codes)):
            model = self.store.load(codes[number])
            if fits is None or fits(model, scale):
                return model, scale
        return None

    def add(
        self, model: Model, group: str, x: float, y: float, z: float, angle: float, scale: float = 1.0
    ) -> Placed:
        """Puts a model into the scene without looking for collisions."""
        raw_class = PROCEDURAL.get(group) or GROUPS[group].raw_class
        tint = self.rng.uniform(0.35, 1.1, 3) if self.rng.random() < 0.6 else np.ones(3)
        if raw_class in LARGE_CLASSES:  # a whole door in pink would be a rare sight
            tint = 0.3 * tint + 0.7 * tint.mean()
        pose = upright(x, y, z, angle, scale)
        number = len(self.stage.placed)
        for part in model.parts:
            bsdf = self.materials.get(part, raw_class, model.code, tint)
            shape = {"type": "ply", "filename": str(part.ply), "to_world": pose, "bsdf": bsdf}
            self.stage.add(raw_class, shape, number)
        width, depth, height = (size * scale for size in model.size)
        thing = Placed(model.code, raw_class, x, y, z, angle, (width, depth, height), model.top * scale)
        self.stage.placed.append(thing)
        return thing

    def free(self, area: np.ndarray) -> bool:
        """Whether nothing stands on a footprint, and it is inside the room."""
        inside = np.abs(area[:, 0]).max() < self.room.width / 2 and area[:, 1].max() < self.room.depth / 2
        return bool(inside) and not any(collide(area, other) for other in self.taken)

    def at_wall(self, group: str, sides: Sequence[Side] = SIDES, tries: int = 25) -> Placed | None:
        """Stands a model with its back against a wall, away from windows that it would hide."""
        picked = self.pick(group)
        if picked is None:
            return None
        model, scale = picked
        width, depth, height = (size * scale for size in model.size)
        for _ in range(tries):
            side = sides[int(self.rng.integers(len(sides)))]
            along = self.room.spot(side, width, self.rng)
            x, y, angle = self.room.at_wall(side, along, depth / 2 + 0.03)
            area = footprint(x, y, width + 0.06, depth + 0.06, angle)
            shadow = Span(side, along - width / 2, along + width / 2, 0.0, height)
            if self.free_at_wall(area) and not any(shadow.overlaps(other) for other in self.room.spans):
                self.taken.append(area)
                return self.add(model, group, x, y, 0.0, angle + self.rng.normal(0, 0.01), scale)
        return None

    def free_at_wall(self, area: np.ndarray) -> bool:
        """As `free`, but a footprint may touch the wall it stands at."""
        return not any(collide(area, other) for other in self.taken)

    def at(
        self, group: str, x: float, y: float, angle: float, picked: tuple[Model, float] | None = None
    ) -> Placed | None:
        """Stands a model on the floor at a place if that is free."""
        picked = picked or self.pick(group)
        if picked is None:
            return None
        model, scale = picked
        area = footprint(x, y, model.size[0] * scale, model.size[1] * scale, angle)
        if not self.free(area):
            return None
        self.taken.append(area)
        return self.add(model, group, x, y, 0.0, angle, scale)

    def reserve(self, x: float, y: float, width: float, depth: float, angle: float) -> None:
        """Keeps a place on the floor free."""
        self.taken.append(footprint(x, y, width, depth, angle))

    def scatter(self, groups: Sequence[str], count: int, margin: float = 0.4) -> None:
        """Stands up to `count` models anywhere on the floor."""
        for _ in range(count * 6):
            if count == 0:
                return
            group = groups[int(self.rng.integers(len(groups)))]
            x = self.rng.uniform(-self.room.width / 2 + margin, self.room.width / 2 - margin)
            y = self.rng.uniform(-self.room.depth / 2 + 0.2, self.room.depth / 2 - margin)
            count -= self.at(group, x, y, self.rng.uniform(0, 2 * math.pi)) is not None

    def on_top(
        self, base: Placed, groups: Sequence[str], count: int, widest: float = 0.5, spread: float = 0.9
    ) -> int:
        """Puts up to `count` small things on a piece of furniture, each where its whole foot is supported."""

        def fits(model: Model, scale: float) -> bool:
            return max(model.size[:2]) * scale < widest and model.size[2] * scale < 0.75

        placed: list[np.ndarray] = []
        for _ in range(count * 20):
            if len(placed) >= count:
                break
            group = groups[int(self.rng.integers(len(groups)))]
            picked = self.pick(group, fits)
            if picked is None:
                continue
            model, scale = picked
            width, depth = model.size[0] * scale, model.size[1] * scale
            reach = [max(0.0, (base.size[k] * spread - extent) / 2) for k, extent in ((0, width), (1, depth))]
            x, y = base.local(*(self.rng.uniform(-1, 1) * r for r in reach))
            angle = base.angle + self.rng.normal(0, 0.5) + (math.pi if self.rng.random() < 0.1 else 0.0)
            area = footprint(x, y, width * 1.05 + 0.01, depth * 1.05 + 0.01, angle)
            if any(collide(area, other) for other in placed):
                continue
            height = self.support(base, area)
            if height is None:
                continue
            placed.append(area)
            self.add(model, group, x, y, height, angle, scale)
        return len(placed)

    def support(self, base: Placed, area: np.ndarray) -> float | None:
        """Height of the furniture under a footprint, from rays down onto its mesh; None where it is not
        level."""
        surface = self._surface(base)
        centre = area.mean(0)
        middles = (area + np.roll(area, 1, axis=0)) / 2
        points = np.vstack([centre, centre + (area - centre) * 0.85, centre + (middles - centre) * 0.84])
        start = base.z + base.top + 0.02
        columns = (points[:, 0], points[:, 1], np.full(len(points), start))
        origin = mi.Point3f(*(mi.Float(np.ascontiguousarray(column, np.float32)) for column in columns))
        hit = surface.ray_intersect(mi.Ray3f(origin, mi.Vector3f(0, 0, -1)))
        distance = np.array(hit.t)
        if not np.isfinite(distance).all() or np.ptp(distance) > 0.008 or distance.max() > 0.1:
            return None
        return float(start - distance.min() + 0.0005)

    def _surface(self, base: Placed) -> Any:
        if id(base) not in self._surfaces:
            model = self.store.load(base.code)
            pose = upright(base.x, base.y, base.z, base.angle, base.size[0] / model.size[0])
            shapes = {
                f"p{i}": {"type": "ply", "filename": str(part.ply), "to_world": pose}
                for i, part in enumerate(model.parts)
            }
            self._surfaces[id(base)] = mi.load_dict({"type": "scene", **shapes}, optimize=False)
        return self._surfaces[id(base)]
