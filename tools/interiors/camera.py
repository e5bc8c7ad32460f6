"""Cameras: where they look from, their rays, and the choice of a good one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mitsuba as mi
import numpy as np

from .stage import Placed, Room, Stage

UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class View:
    """A pinhole camera with square pixels and its principal point in the middle.

    Attributes:
        origin, target: In the world, metres.
        fov_deg: Field of view, horizontal and vertical, degrees.
    """

    origin: np.ndarray
    target: np.ndarray
    fov_deg: float

    @cached_property
    def axes(self) -> np.ndarray:
        """`[3, 3]`: the camera's x (right), y (down) and z (forward) in the world, a row each."""
        forward = self.target - self.origin
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, UP)
        right = right / np.linalg.norm(right)
        return np.stack([right, np.cross(forward, right), forward])

    def intrinsics(self, size: int) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy in pixels of a `size` x `size` image."""
        focal = size / 2 / math.tan(math.radians(self.fov_deg) / 2)
        return focal, focal, size / 2, size / 2

    def directions(self, size: int) -> np.ndarray:
        """Unit world directions `[size, size, 3]` of the rays through the centres of the pixels."""
        fx, fy, cx, cy = self.intrinsics(size)
        centre = np.arange(size) + 0.5
        x, y = np.meshgrid((centre - cx) / fx, (centre - cy) / fy)
        rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ self.axes
        units: np.ndarray = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
        return units

    def sensor(self, size: int, spp: int) -> Any:
        """The same camera for Mitsuba; a box filter, because a wider one correlates pixels and defeats the
        denoiser."""
        pose = mi.ScalarTransform4f().look_at(
            [float(v) for v in self.origin], [float(v) for v in self.target], [float(v) for v in UP]
        )
        film = {
            "type": "hdrfilm",
            "width": size,
            "height": size,
            "rfilter": {"type": "box"},
            "pixel_format": "rgb",
        }
        return mi.load_dict(
            {
                "type": "perspective",
                "fov": float(self.fov_deg),
                "fov_axis": "x",
                "near_clip": 0.01,
                "far_clip": 100.0,
                "to_world": pose,
                "film": {**film, "component_format": "float32"},
                "sampler": {"type": "independent", "sample_count": spp},
            }
        )


def propose(room: Room, stage: Stage, table: Placed | None, rng: np.random.Generator) -> View:
    """A random view: of the room from its open side, or down onto `table`."""
    if table is None:
        inside = np.array([rng.uniform(-0.35, 0.35) * room.width, -room.depth / 2 - rng.uniform(0, 0.7)])
        eye = rng.uniform(1.1, 1.75)
        far = np.array([rng.uniform(-0.3, 0.3) * room.width, room.depth / 2 * rng.uniform(0.2, 0.9)])
        low = rng.uniform(0.45, 0.95)
        return View(np.array([*inside, eye]), np.array([*far, low]), float(rng.uniform(50, 68)))
    top = table.z + table.top
    things = [thing for thing in stage.placed if abs(thing.z - top) < 0.15 and thing is not table] or [table]
    middle = np.mean([(thing.x, thing.y) for thing in things], axis=0)
    aim = np.array([middle[0] + rng.normal(0, 0.06), middle[1] + rng.normal(0, 0.05), top + 0.06])
    distance = rng.uniform(0.7, 1.15) * float(np.clip(max(table.size[:2]) * 0.85, 0.8, 1.3))
    azimuth, elevation = rng.uniform(-0.7, 0.7), rng.uniform(0.3, 0.85)
    back = [
        math.sin(azimuth) * math.cos(elevation),
        -math.cos(azimuth) * math.cos(elevation),
        math.sin(elevation),
    ]
    origin = aim + distance * np.array(back)
    origin[0] = np.clip(origin[0], -room.width / 2 + 0.1, room.width / 2 - 0.1)
    origin[2] = min(origin[2], room.height - 0.1)
    return View(origin, aim, float(rng.uniform(45, 60)))


def score(
    label: np.ndarray, depth: np.ndarray, thing: np.ndarray, small: np.ndarray, close_up: bool
) -> float:
    """How good a view is: many classes and objects, nothing in front of the lens, no pixel without a surface.

    Args:
        label: As in `truth.Truth`.
        depth: As in `truth.Truth`.
        thing: As in `truth.Truth`.
        small: `[things]` bool, whether a placed object stands on another one.
        close_up: Whether the view is of a table.
    """
    hit = depth > 0
    if not hit.any():
        return -math.inf
    shares = np.bincount(label[hit], minlength=256) / label.size
    things = np.bincount(thing[thing >= 0], minlength=len(small)) / label.size
    value = float((shares > 0.004).sum()) + 0.7 * float((things > 0.002).sum())
    value += (16 if close_up else 10) * min(0.2, float(things[small].sum()))
    value -= 20 * max(0.0, 1 - float(hit.mean()) - 0.0005)
    value -= 3 * float(depth[hit].min() < 0.25) + 6 * max(0.0, float(shares.max()) - 0.45)
    value -= 8 * max(0.0, float(things.max(initial=0.0)) - (0.55 if close_up else 0.3))
    if not close_up:
        value -= 8 * float(np.mean(depth < 0.6) > 0.2)
    return value
