"""Objects that are made rather than taken from a library: turned vases and bowls, books, picture frames.

A model's shape follows from its scene's random numbers, so no two scenes (and no two splits) share one; their
codes are `class:number of the scene.number in it`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .assets import write_atomic
from .mesh import Model, Part, box_map, crease_normals, ply_bytes

SEGMENTS = 48


def turned(profile: np.ndarray) -> np.ndarray:
    """Triangles `[T, 3, 3]` of a profile `[N, 2]` of (radius, height), bottom to top, turned around the z
    axis."""
    angle = np.linspace(0, 2 * np.pi, SEGMENTS + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    points = np.concatenate(
        [
            profile[:, None, :1] * ring[None],
            np.broadcast_to(profile[:, None, 1:], (len(profile), SEGMENTS + 1, 1)),
        ],
        axis=-1,
    )
    a, b, c, d = points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]
    quads = np.stack([np.stack([a, b, c], -2), np.stack([a, c, d], -2)], axis=2)
    triangles = quads.reshape(-1, 3, 3)
    area = np.linalg.norm(
        np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1
    )
    kept: np.ndarray = triangles[area > 1e-12]
    return kept


def _spline(rng: np.random.Generator, heights: np.ndarray, low: float, high: float) -> np.ndarray:
    knots = rng.uniform(low, high, int(rng.integers(3, 6)))
    where = np.linspace(0, 1, len(knots))
    radii: np.ndarray = np.interp(heights, where, knots)
    return radii


def _smooth(values: np.ndarray, rounds: int = 3) -> np.ndarray:
    for _ in range(rounds):
        inner = (values[:-2] + 2 * values[1:-1] + values[2:]) / 4
        values = np.concatenate([values[:1], inner, values[-1:]])
    return values


def vase_profile(rng: np.random.Generator) -> np.ndarray:
    """A hollow vase: up the outside, over the rim and down again."""
    t = np.linspace(0, 1, 24)
    height, radius = rng.uniform(0.12, 0.32), rng.uniform(0.04, 0.085)
    outside = _smooth(_spline(rng, t, 0.35, 1.0)) * radius
    inside = np.maximum(outside - 0.006, 0.003)
    up = np.stack([outside, t * height], axis=-1)
    down = np.stack([inside, t * height], axis=-1)[::-1][:-2]
    return np.concatenate([[[1e-4, 0]], up, down, [[1e-4, down[-1, 1]]]])


def bowl_profile(rng: np.random.Generator) -> np.ndarray:
    """A bowl, a deep plate or a beaker."""
    t = np.linspace(0, 1, 16)
    height, radius = rng.uniform(0.025, 0.11), rng.uniform(0.035, 0.13)
    foot = rng.uniform(0.4, 0.95)
    outside = radius * (foot + (1 - foot) * t ** rng.uniform(0.35, 1.2))
    inside = np.maximum(outside - 0.005, 0.003)
    up = np.stack([outside, t * height], axis=-1)
    down = np.stack([inside, 0.006 + t * (height - 0.006)], axis=-1)[::-1]
    return np.concatenate([[[1e-4, 0]], up, down, [[1e-4, 0.006]]])


def cuboid(size: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Twelve triangles of a box of a size whose lower corner is at `base`."""
    quads = []
    for axis in range(3):
        for side in (0, 1):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            corners = np.zeros((4, 3))
            corners[:, axis] = side
            corners[:, u], corners[:, v] = [0, 1, 1, 0], [0, 0, 1, 1]
            quads.append(corners if side else corners[::-1])
    points = np.array(quads) * size + base
    return np.concatenate([points[:, [0, 1, 2]], points[:, [0, 2, 3]]])


class Maker:
    """Makes the procedural models of one scene; meshes are kept in the cache under a hash of their
    contents."""

    def __init__(self, folder: Path, rng: np.random.Generator, scene: str) -> None:
        self.folder = folder / "procedural"
        self.rng = rng
        self.scene = scene
        self.made = 0

    def make(self, name: str) -> Model:
        """A new object: `vase`, `tableware` or `box` (a stack of books)."""
        if name == "vase":
            return self._turned("vase", vase_profile(self.rng))
        if name == "tableware":
            return self._turned("tableware", bowl_profile(self.rng))
        return self._books()

    def _turned(self, raw_class: str, profile: np.ndarray) -> Model:
        glossy = float(self.rng.choice([20.0, 200.0, 2000.0]))
        part = self._part(turned(profile), "glaze", self._colour(), glossy)
        size = (2 * profile[:, 0].max(), 2 * profile[:, 0].max(), profile[:, 1].max())
        return self._model(raw_class, [part], size)

    def _books(self) -> Model:
        parts, height = [], 0.0
        width, depth = self.rng.uniform(0.12, 0.17), self.rng.uniform(0.18, 0.24)
        for number in range(int(self.rng.integers(1, 5))):
            thick = self.rng.uniform(0.012, 0.045)
            size = np.array([width, depth, thick]) * np.array([*self.rng.uniform(0.85, 1.0, 2), 1.0])
            shift = self.rng.uniform(-0.006, 0.006, 2)
            corner = np.array([shift[0] - size[0] / 2, shift[1] - size[1] / 2, height])
            board = np.array([size[0], size[1], 0.0025])
            spine = np.array([0.003, size[1], thick])
            upper = corner + np.array([0, 0, thick - 0.0025])
            cover = np.concatenate([cuboid(board, corner), cuboid(board, upper), cuboid(spine, corner)])
            margin = np.array([0.003, 0.004, 0.0025])
            pages = cuboid(size - 2 * margin, corner + margin)
            parts.append(self._part(cover, f"cover{number}", self._colour(), 60.0))
            parts.append(self._part(pages, f"pages{number}", [0.88, 0.86, 0.79], 5.0))
            height += thick
        return self._model("box", parts, (width, depth, height))

    def _colour(self) -> list[float]:
        if self.rng.random() < 0.3:
            return [float(self.rng.choice([0.12, 0.55, 0.9]))] * 3
        return [float(x) for x in self.rng.uniform(0.12, 0.9, 3)]

    def _part(self, triangles: np.ndarray, name: str, srgb: list[float], glossy: float) -> Part:
        data = ply_bytes(triangles, crease_normals(triangles), box_map(triangles))
        assert data is not None
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:16]}.ply"
        if not path.is_file():
            write_atomic(path, data)
        return Part(path, {"name": name, "kd": srgb, "ks": [0.3] * 3, "ns": glossy})

    def _model(self, raw_class: str, parts: list[Part], size: tuple[float, ...]) -> Model:
        self.made += 1
        width, depth, height = (float(x) for x in size)
        return Model(
            f"{raw_class}:{self.scene}.{self.made}", tuple(parts), (width, depth, height), height, 0.0
        )
