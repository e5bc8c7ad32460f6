"""Lights a scene: the environment, a softbox behind the camera, sometimes a low sun and a panel on the
ceiling."""

from __future__ import annotations

import math

import mitsuba as mi
import numpy as np

from .assets import ENVIRONMENTS, Assets
from .materials import colour, emitter, principled
from .stage import Room, Stage, upright


def load_environment(assets: Assets, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """One of the environments: its name and the panorama `[H, W, 3]`, linear."""
    name = ENVIRONMENTS[rng.integers(len(ENVIRONMENTS))]
    picture = mi.Bitmap(str(assets.environment(name)))
    return name, np.array(picture.convert(mi.Bitmap.PixelFormat.RGB, mi.Struct.Type.Float32))


def warm(amount: float) -> np.ndarray:
    """A white between that of a bulb (0) and daylight (1)."""
    return np.array([1.0, 0.78 + 0.22 * amount, 0.55 + 0.5 * amount])


def add_lights(stage: Stage, room: Room, environment: np.ndarray, rng: np.random.Generator) -> None:
    """Adds all lights but the windows; the sun in the panorama is capped, since it makes noise, not light."""
    capped = np.minimum(environment, 60 * environment.mean())
    panorama = mi.Bitmap(
        np.ascontiguousarray(capped / capped.mean() * rng.uniform(0.5, 1.0), dtype=np.float32)
    )
    pose = mi.ScalarTransform4f().rotate([0, 0, 1], float(rng.uniform(0, 360))).rotate([1, 0, 0], 90)
    stage.lights["environment"] = {"type": "envmap", "bitmap": panorama, "to_world": pose}

    position = [rng.uniform(-1, 1) * room.width / 2, -room.depth / 2 - 1.5, rng.uniform(1.8, 2.6)]
    target = [rng.uniform(-0.5, 0.5), 0.3, 0.6]
    side = rng.uniform(0.4, 1.0)
    pose = mi.ScalarTransform4f().look_at([float(x) for x in position], [float(x) for x in target], [0, 0, 1])
    radiance = warm(rng.uniform(0.2, 1.0)) * rng.uniform(6, 14) / side**2
    stage.lights["softbox"] = {
        "type": "rectangle",
        "to_world": pose.scale(side / 2),
        "emitter": emitter(radiance),
    }

    if rng.random() < 0.45:
        azimuth, elevation = rng.uniform(-1.1, 1.1), rng.uniform(0.35, 0.95)
        direction = [
            -math.sin(azimuth) * math.cos(elevation),
            math.cos(azimuth) * math.cos(elevation),
            -math.sin(elevation),
        ]
        irradiance = np.array([1.0, 0.86, 0.68]) * rng.uniform(2.0, 5.0)
        stage.lights["sun"] = {
            "type": "directional",
            "direction": direction,
            "irradiance": colour(irradiance),
        }


def ceiling_panel(stage: Stage, room: Room, rng: np.random.Generator) -> None:
    """A round panel on the ceiling that gives light, labelled as a lamp."""
    radius, thick = rng.uniform(0.12, 0.25), 0.05
    x, y = rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.6)
    low = room.height - thick
    body = {"type": "cylinder", "p0": [x, y, room.height], "p1": [x, y, low], "radius": radius + 0.01}
    stage.add("lamp", {**body, "bsdf": mi.load_dict(principled(colour(0.7), 0.4))})
    glow = emitter(warm(rng.uniform(0.1, 0.8)) * rng.uniform(4, 12))
    pose = upright(x, y, low, 0.0).rotate([1, 0, 0], 180).scale(radius)
    stage.add("lamp", {"type": "disk", "to_world": pose, "emitter": glow})
