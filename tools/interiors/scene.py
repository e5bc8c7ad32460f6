"""One scene from its seed: furnish, light, choose the view, render, write."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mitsuba as mi
import numpy as np
from PIL import Image

from upbench.datasets.interiors.classes import IGNORE_INDEX, RAW_CLASSES
from upbench.datasets.interiors.files import SPLITS, SUFFIXES

from .assets import Assets, write_atomic
from .camera import View, propose, score
from .catalogue import Catalogue
from .film import develop, render
from .layout import Furnisher
from .lights import add_lights, ceiling_panel, load_environment
from .materials import MaterialStore
from .mesh import ModelStore
from .procedural import Maker
from .room import RoomBuilder
from .stage import Placed, Room, Stage
from .textures import Pictures
from .themes import CYCLE, THEMES, hang_lamp
from .truth import Truth, trace

STREAM = 20260611
"""First word of every random stream: change it to get other scenes for the same seeds."""

CANDIDATES = 14
SEARCH_SIZE = 112


@dataclass
class Setup:
    """A furnished and lit scene, loaded, with the view that was chosen."""

    kind: str
    environment: str
    stage: Stage
    scene: Any
    view: View


class Studio:
    """Makes scenes; keeps what they share (libraries, decoded pictures, converted models)."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.catalogue = Catalogue(assets.furniture)
        self.store = ModelStore(self.catalogue, assets.cache)
        self.pictures = Pictures(self.catalogue)

    def set_up(self, split: str, seed: int, kind: str | None = None) -> Setup:
        """Furnishes and lights the scene of a seed and finds its view.

        Raises:
            RuntimeError: nothing that could be looked at was placed.
        """
        kind = kind or CYCLE[seed % len(CYCLE)]
        rng = np.random.default_rng([STREAM, SPLITS.index(split), seed])
        room = Room(float(rng.uniform(3.2, 5.2)), float(rng.uniform(3.2, 5.0)), float(rng.uniform(2.4, 2.8)))
        stage = Stage()
        name, environment = load_environment(self.assets, rng)
        builder = RoomBuilder(stage, room, self.pictures, environment, rng)
        materials = MaterialStore(self.pictures, rng)
        maker = Maker(self.assets.cache, rng, str(seed))
        furnisher = Furnisher(stage, room, self.store, materials, maker, split, rng)
        builder.shell()
        table = self._furnish(kind, furnisher, builder)
        if rng.random() < 0.55:
            hang_lamp(furnisher)
        elif rng.random() < 0.6:
            ceiling_panel(stage, room, rng)
        add_lights(stage, room, environment, rng)
        scene = mi.load_dict({"type": "scene", **stage.shapes, **stage.lights}, optimize=False)
        return Setup(kind, name, stage, scene, _best_view(scene, stage, room, table, rng))

    def _furnish(self, kind: str, furnisher: Furnisher, builder: RoomBuilder) -> Placed | None:
        rng = furnisher.rng
        if rng.random() < (0.35 if kind == "tabletop" else 0.7):
            builder.door(furnisher)
        if rng.random() < 0.6:
            builder.window()
        for _ in range(int(rng.integers(0, 3))):
            builder.picture()
        table = THEMES[kind](furnisher, builder)
        if kind == "tabletop" and table is None:
            raise RuntimeError("no room for the table")
        return table


def _best_view(scene: Any, stage: Stage, room: Room, table: Placed | None, rng: np.random.Generator) -> View:
    best, best_score = None, -np.inf
    small = np.array([thing.z > 0.05 for thing in stage.placed], dtype=bool)
    for _ in range(CANDIDATES):
        view = propose(room, stage, table, rng)
        seen = trace(scene, stage, view, SEARCH_SIZE)
        value = score(seen.label, seen.depth, seen.thing, small, close_up=table is not None)
        if value > best_score:
            best, best_score = view, value
    if best is None:
        raise RuntimeError("no view shows anything")
    return best


def make_scene(studio: Studio, split: str, seed: int, size: int, spp: int, folder: Path) -> dict[str, Any]:
    """Renders the scene of a seed, writes its four files, and returns its index line."""
    setup = studio.set_up(split, seed)
    truth = trace(setup.scene, setup.stage, setup.view, size)
    radiance = render(setup.scene, setup.view, size, spp, seed)
    image = develop(radiance, np.random.default_rng([STREAM, SPLITS.index(split), seed, 1]))
    digest = write_scene(folder, seed, image, truth)
    hit = truth.depth > 0
    shares = np.bincount(truth.label.ravel(), minlength=256) / truth.label.size
    return {
        "seed": seed,
        "kind": setup.kind,
        "environment": setup.environment,
        "fov_deg": round(setup.view.fov_deg, 6),
        "intrinsics": [round(x, 5) for x in setup.view.intrinsics(size)],
        "size": size,
        "spp": spp,
        "models": setup.stage.models,
        "classes": {name: round(float(s), 5) for name, s in zip(RAW_CLASSES, shares, strict=False) if s > 0},
        "void": round(float(shares[IGNORE_INDEX]), 6),
        "depth": [
            round(float(x), 3) for x in (truth.depth[hit].min(), np.median(truth.depth), truth.depth.max())
        ],
        "image_sha256": digest,
    }


def write_scene(folder: Path, seed: int, image: np.ndarray, truth: Truth) -> str:
    """Writes the four files of a scene, each whole or not at all; returns the SHA-256 of the image's.

    Depth has 16 bits (millimetres), normals have 8 bits a channel (`127 n + 128`), 0 where nothing was hit.
    """
    hit = (truth.depth > 0)[..., None]
    millimetres = np.clip(np.round(truth.depth * 1000), 0, 65535).astype(np.uint16)
    normal = np.where(hit, np.round(truth.normal * 127) + 128, 0).astype(np.uint8)
    arrays: tuple[np.ndarray, ...] = (image, truth.label, millimetres, normal)
    for suffix, array in zip(SUFFIXES, arrays, strict=True):
        buffer = io.BytesIO()
        if suffix == ".jpg":
            Image.fromarray(array).save(buffer, "JPEG", quality=92, subsampling=0)
        else:
            Image.fromarray(array).save(buffer, "PNG", optimize=True)
        write_atomic(folder / f"{seed}{suffix}", buffer.getvalue())
        if suffix == ".jpg":
            digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    return digest
