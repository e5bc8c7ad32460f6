"""Exact ground truth: one ray through the centre of every pixel.

What the study measured, and what this does about it:

* The `aov` integrator's depth is the distance along the ray, and from the near plane at that: up to 1.37
  times z in the corners. Here z is the hit position less the camera's, along the optical axis.
* `shape_index` has no fixed order, and Mitsuba merges shapes by default: scenes are loaded with
  `optimize=False` and the hit shape itself is mapped to its label.
* Leaves and cane chairs are pictures with holes: a ray goes on until the surface it meets is at least half
  opaque.
* Normals are brought from the world to the camera and turned towards the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import drjit as dr
import mitsuba as mi
import numpy as np

from upbench.datasets.interiors.classes import IGNORE_INDEX

from .camera import View
from .stage import Stage

MAX_LAYERS = 8
"""So many see-through surfaces may be in front of what a pixel shows."""


@dataclass(frozen=True)
class Truth:
    """What every pixel shows.

    Attributes:
        label: `uint8 [H, W]` raw class, 255 where nothing was hit.
        depth: `float32 [H, W]` metres along the optical axis, 0 where nothing was hit.
        normal: `float32 [H, W, 3]` unit shading normals in camera space (x right, y down, z forward), facing
            the viewer; 0 where nothing was hit.
        thing: `int32 [H, W]` number of the placed object, -1 for what is built in, -2 for the room's shell
            and where nothing was hit.
    """

    label: np.ndarray
    depth: np.ndarray
    normal: np.ndarray
    thing: np.ndarray


def trace(scene: Any, stage: Stage, view: View, size: int) -> Truth:
    """Ground truth of a loaded scene from a view, `size` x `size` pixels."""
    directions = view.directions(size).reshape(-1, 3)
    position, normal, shape = _first_opaque(scene, view.origin, directions)
    hit = shape > 0

    labels, things = _shape_tables(scene, stage)
    ids, index = np.unique(shape, return_inverse=True)
    label = np.array([labels.get(int(i), IGNORE_INDEX) for i in ids], dtype=np.uint8)[index]
    thing = np.array([things.get(int(i), -2) for i in ids], dtype=np.int32)[index]

    depth = np.where(hit, ((position - view.origin) @ view.axes.T)[:, 2], 0.0)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
    away = (normal * directions).sum(1, keepdims=True) > 0
    normal = np.where(away, -normal, normal) @ view.axes.T * hit[:, None]
    return Truth(
        label=np.where(hit, label, IGNORE_INDEX).astype(np.uint8).reshape(size, size),
        depth=depth.astype(np.float32).reshape(size, size),
        normal=normal.astype(np.float32).reshape(size, size, 3),
        thing=thing.reshape(size, size),
    )


def _first_opaque(
    scene: Any, origin: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World position `[N, 3]`, shading normal `[N, 3]` and shape id `[N]` (0: none) of the first opaque
    hit."""
    columns = [mi.Float(np.ascontiguousarray(column, dtype=np.float32)) for column in directions.T]
    ray = mi.Ray3f(mi.Point3f(*(float(x) for x in origin)), mi.Vector3f(*columns))
    count = len(directions)
    position, normal = dr.zeros(mi.Point3f, count), dr.zeros(mi.Vector3f, count)
    shape: Any = dr.zeros(mi.UInt32, count)
    active = dr.full(mi.Bool, True, count)
    for _ in range(MAX_LAYERS):
        hit = scene.ray_intersect(ray, active)
        valid = hit.is_valid() & active
        see_through = valid & (dr.mean(hit.bsdf().eval_null_transmission(hit, valid)) > 0.5)
        opaque = valid & ~see_through
        position = dr.select(opaque, hit.p, position)
        normal = dr.select(opaque, hit.sh_frame.n, normal)
        shape = dr.select(opaque, dr.reinterpret_array(mi.UInt32, hit.shape), shape)
        ray, active = hit.spawn_ray(ray.d), see_through
        dr.eval(position, normal, shape, ray, active)
        if not dr.any(active):
            break
    return np.array(position).T, np.array(normal).T, np.array(shape)


def _shape_tables(scene: Any, stage: Stage) -> tuple[dict[int, int], dict[int, int]]:
    """Registry number of each loaded shape -> its label and its object."""
    labels, things = {}, {}
    for shape in scene.shapes():
        number = int(np.array(dr.reinterpret_array(mi.UInt32, mi.ShapePtr(shape)))[0])
        if shape.id() in stage.labels:
            labels[number] = stage.labels[shape.id()]
            things[number] = stage.objects[shape.id()]
    return labels, things
