"""Builds the room: floor, walls, ceiling, skirting boards, windows, doors, pictures and rugs."""

from __future__ import annotations

import math
from typing import Any

import mitsuba as mi
import numpy as np
from PIL import Image

from .layout import Furnisher
from .materials import bitmap, colour, emitter, principled
from .stage import SIDES, Room, Side, Span, Stage, upright
from .textures import Pictures, Surface, floor, noise, painting, rug, wall

BEYOND = 1.2
"""Floor and side walls go on this far behind the open side, so that a camera there sees no edge (metres)."""


class RoomBuilder:
    """Builds the fixed parts of a room from a scene's random numbers.

    Args:
        environment: `[H, W, 3]` the panorama outside, linear; windows and landscapes are cut out of it.
    """

    def __init__(
        self, stage: Stage, room: Room, pictures: Pictures, environment: np.ndarray, rng: np.random.Generator
    ) -> None:
        self.stage, self.room, self.pictures, self.environment, self.rng = (
            stage,
            room,
            pictures,
            environment,
            rng,
        )

    def shell(self) -> None:
        """Floor, three walls, ceiling and skirting boards."""
        rng, w, d, h = self.rng, self.room.width, self.room.depth, self.room.height
        front = -d / 2 - BEYOND
        walls = wall(self.pictures, rng)
        back = wall(self.pictures, rng) if rng.random() < 0.3 else walls
        self._quad("floor", (-w / 2, front, 0), (w, 0, 0), (0, d + BEYOND, 0), floor(self.pictures, rng))
        self._quad("wall", (-w / 2, d / 2, 0), (w, 0, 0), (0, 0, h), back)
        self._quad("wall", (-w / 2, front, 0), (0, d + BEYOND, 0), (0, 0, h), walls)
        self._quad("wall", (w / 2, d / 2, 0), (0, -d - BEYOND, 0), (0, 0, h), walls)
        white = np.clip(np.array([0.82, 0.81, 0.79]) * (1 + 0.01 * noise(rng, 256)[..., None]), 0, 0.9)
        self._quad("ceiling", (-w / 2, -d / 2, h), (w, 0, 0), (0, d, 0), Surface(white, 0.4, 0.9))

        paint = mi.load_dict(principled(colour(float(rng.choice([0.75, 0.6, 0.08]))), 0.4))
        tall = rng.uniform(0.06, 0.12)
        for centre, half in (
            ([0, d / 2 - 0.01, tall / 2], [w / 2, 0.01, tall / 2]),
            ([-w / 2 + 0.01, 0, tall / 2], [0.01, d / 2, tall / 2]),
            ([w / 2 - 0.01, 0, tall / 2], [0.01, d / 2, tall / 2]),
        ):
            pose = mi.ScalarTransform4f().translate(centre).scale(half)
            self.stage.add("wall", {"type": "cube", "to_world": pose, "bsdf": paint})

    def _quad(self, raw_class: str, corner: Any, u: Any, v: Any, surface: Surface) -> None:
        corner, u, v = (np.array(x, dtype=float) for x in (corner, u, v))
        length_u, length_v = float(np.linalg.norm(u)), float(np.linalg.norm(v))
        pose = np.eye(4)
        pose[:3, 0], pose[:3, 1] = u / 2, v / 2
        pose[:3, 2] = np.cross(u / length_u, v / length_v)
        pose[:3, 3] = corner + (u + v) / 2
        texture = bitmap(surface.texture)
        repeats = [length_u * surface.per_metre, length_v * surface.per_metre, 1.0]
        texture["to_uv"] = mi.ScalarTransform4f().scale(repeats)
        bsdf = principled(texture, surface.roughness)
        shape = {"type": "rectangle", "to_world": mi.ScalarTransform4f(pose.tolist()), "bsdf": bsdf}
        self.stage.add(raw_class, shape, thing=-2)

    def window(self) -> None:
        """A bright window with a view of the environment, a frame and a sill."""
        rng = self.rng
        width, height, bottom = rng.uniform(0.9, 1.8), rng.uniform(1.0, 1.4), rng.uniform(0.8, 1.0)
        side = self._side()
        along = self.room.spot(side, width, rng)
        if not self.room.claim(
            Span(side, along - width / 2 - 0.1, along + width / 2 + 0.1, bottom, bottom + height)
        ):
            return
        x, y, angle = self.room.at_wall(side, along, 0.012)
        middle = upright(x, y, bottom + height / 2, angle)
        view = self._view(width / height)
        view = view / view.mean() * rng.uniform(1.0, 2.2)
        glass = {
            "type": "rectangle",
            "to_world": middle.rotate([1, 0, 0], 90).scale([width / 2, height / 2, 1]),
            "bsdf": {"type": "diffuse", "reflectance": colour(0.05)},
            "emitter": emitter(bitmap(view[::-1])),
        }
        self.stage.add("window", glass)
        paint = mi.load_dict(principled(colour(float(rng.choice([0.8, 0.75, 0.2]))), 0.35))
        bars = [(0.0, height / 2, width / 2, 0.05), (0.0, -height / 2, width / 2, 0.05)]
        bars += [(-width / 2, 0.0, 0.05, height / 2 + 0.05), (width / 2, 0.0, 0.05, height / 2 + 0.05)]
        if width > 1.2:
            bars.append((0.0, 0.0, 0.035, height / 2))
        for px, pz, half_x, half_z in bars:
            pose = middle.translate([px, -0.02, pz]).scale([half_x, 0.035, half_z])
            self.stage.add("window", {"type": "cube", "to_world": pose, "bsdf": paint})
        sill = middle.translate([0, -0.08, -height / 2 - 0.065]).scale([width / 2 + 0.1, 0.09, 0.015])
        self.stage.add("window", {"type": "cube", "to_world": sill, "bsdf": paint})

    def _view(self, aspect: float) -> np.ndarray:
        """A part of the environment around the horizon, linear `[h, w, 3]`, highlights limited."""
        panorama = np.roll(self.environment, int(self.rng.integers(self.environment.shape[1])), axis=1)
        rows = panorama.shape[0]
        view = panorama[int(rows * 0.28) : int(rows * 0.62), : int(rows * 0.34 * aspect)]
        size = (512, int(512 / aspect))
        channels = [Image.fromarray(np.ascontiguousarray(view[..., c])) for c in range(3)]
        view = np.stack([np.asarray(c.resize(size, Image.Resampling.BICUBIC)) for c in channels], axis=-1)
        view = np.clip(view, 0, None)
        limited: np.ndarray = np.minimum(view, 8 * np.median(view) + 0.01)
        return limited

    def _landscape(self) -> np.ndarray:
        view = self._view(float(self.rng.uniform(0.7, 1.6)))
        exposed: np.ndarray = np.clip(0.4 * view / np.median(view), 0, 0.9)
        return exposed

    def picture(self) -> None:
        """A framed picture."""
        rng = self.rng
        image = painting(rng, self._landscape)
        height = rng.uniform(0.3, 0.8)
        width = height * image.shape[1] / image.shape[0]
        side = self._side()
        along, z = self.room.spot(side, width, rng), rng.uniform(1.3, 1.65)
        low, high = z - height / 2, z + height / 2
        if not self.room.claim(Span(side, along - width / 2 - 0.1, along + width / 2 + 0.1, low, high)):
            return
        x, y, angle = self.room.at_wall(side, along, 0.0)
        middle = upright(x, y, z, angle)
        canvas = {
            "type": "rectangle",
            "to_world": middle.translate([0, -0.022, 0])
            .rotate([1, 0, 0], 90)
            .scale([width / 2, height / 2, 1]),
            "bsdf": principled(bitmap(np.clip(image[::-1], 0, 0.9)), 0.35),
        }
        self.stage.add("picture", canvas)
        tone = [(0.02, 0.02, 0.02), (0.75, 0.75, 0.75), (0.25, 0.12, 0.05)][rng.integers(3)]
        paint = mi.load_dict(principled(colour(tone), 0.4))
        bars = [(0.0, -height / 2, width / 2 + 0.02, 0.02), (0.0, height / 2, width / 2 + 0.02, 0.02)]
        bars += [(-width / 2, 0.0, 0.02, height / 2), (width / 2, 0.0, 0.02, height / 2)]
        for px, pz, half_x, half_z in bars:
            pose = middle.translate([px, -0.018, pz]).scale([half_x, 0.018, half_z])
            self.stage.add("picture", {"type": "cube", "to_world": pose, "bsdf": paint})

    def door(self, furnisher: Furnisher) -> None:
        """A closed door; the floor before it stays free."""
        picked = furnisher.pick("door")
        if picked is None:
            return
        model, scale = picked
        width, depth, height = (size * scale for size in model.size)
        side = self._side()
        along = self.room.spot(side, width, self.rng)
        if not self.room.claim(Span(side, along - width / 2 - 0.05, along + width / 2 + 0.05, 0.0, height)):
            return
        x, y, angle = self.room.at_wall(side, along, depth / 2 - min(0.06, depth / 2))
        furnisher.add(model, "door", x, y, 0.0, angle, scale)
        front = self.room.at_wall(side, along, 0.35)
        furnisher.reserve(front[0], front[1], width, 0.7, angle)

    def rug(self, furnisher: Furnisher, x: float, y: float) -> None:
        """A rug of the library or a woven one, flat on the floor."""
        turn = float(self.rng.choice([0, math.pi / 2]) + self.rng.normal(0, 0.05))
        longest = self.rng.uniform(1.5, 2.5)
        if self.rng.random() < 0.35:
            picked = furnisher.pick("rug")
            if picked is not None:
                model = picked[0]
                furnisher.add(model, "rug", x, y, 0.001, turn, longest / max(model.size[:2]))
            return
        half = [longest / 2, longest * self.rng.uniform(0.5, 0.8) / 2, 0.004]
        shape = {
            "type": "cube",
            "to_world": upright(x, y, 0.005, turn).scale([float(v) for v in half]),
            "bsdf": principled(bitmap(rug(self.pictures, self.rng)), 0.95, 0.2),
        }
        self.stage.add("rug", shape)

    def _side(self) -> Side:
        return SIDES[self.rng.choice(3, p=[0.5, 0.25, 0.25])]
