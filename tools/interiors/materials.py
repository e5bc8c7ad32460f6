"""Materials of furniture models as Mitsuba BSDFs, and the dictionary pieces that everything else is built
of."""

from __future__ import annotations

from typing import Any

import mitsuba as mi
import numpy as np

from .mesh import Part
from .models import OPAQUE_CLASSES
from .textures import FABRIC, WOOD, Pictures, to_linear

SOFT_CLASSES = frozenset({"bed", "sofa", "armchair", "rug", "clothing"})
WOODEN_CLASSES = frozenset({"table", "cabinet", "chair", "door"})
TINTED_CLASSES = SOFT_CLASSES | {"chair", "vase", "box", "lamp", "door", "toy"}
METALS = ("chrom", "metal", "steel", "inox", "alumin", "iron", "silver", "acier", "brass", "gold")
MIN_OPACITY = 0.12


def colour(rgb: Any) -> dict[str, Any]:
    """A plain colour, linear RGB; one number is a grey."""
    values = [float(x) for x in np.broadcast_to(np.asarray(rgb, dtype=float), (3,))]
    return {"type": "rgb", "value": values}


def bitmap(linear: np.ndarray) -> dict[str, Any]:
    """A texture from linear values `[H, W, C]`."""
    return {
        "type": "bitmap",
        "bitmap": mi.Bitmap(np.ascontiguousarray(linear, dtype=np.float32)),
        "raw": True,
    }


def principled(
    base: dict[str, Any], roughness: float, specular: float = 0.4, metallic: float = 0.0
) -> dict[str, Any]:
    """The one reflection model of all scenes, seen from both sides."""
    bsdf = {
        "type": "principled",
        "base_color": base,
        "roughness": float(roughness),
        "specular": float(specular),
        "metallic": float(metallic),
    }
    return {"type": "twosided", "bsdf": bsdf}


def emitter(radiance: Any) -> dict[str, Any]:
    """An area light of a colour, or of a texture if it is one."""
    return {"type": "area", "radiance": radiance if isinstance(radiance, dict) else colour(radiance)}


class MaterialStore:
    """BSDFs of one scene; the parts of a model that share a material share its BSDF."""

    def __init__(self, pictures: Pictures, rng: np.random.Generator) -> None:
        self.pictures = pictures
        self.rng = rng
        self._built: dict[tuple[str, str], Any] = {}

    def get(self, part: Part, raw_class: str, code: str, tint: np.ndarray) -> Any:
        """The BSDF of a part, made from what its material file says (Phong terms, a picture, a name)."""
        key = (code, part.material["name"])
        if key not in self._built:
            self._built[key] = mi.load_dict(self._describe(part.material, raw_class, tint))
        return self._built[key]

    def _describe(self, material: dict[str, Any], raw_class: str, tint: np.ndarray) -> dict[str, Any]:
        diffuse = np.array(material.get("kd", [0.6] * 3))
        shine = float(np.mean(material.get("ks", [0.0] * 3)))
        roughness = float(np.clip((2 / (material.get("ns", 30.0) + 2)) ** 0.25, 0.18, 0.9))
        specular = float(np.clip(0.25 + 0.5 * shine, 0.1, 0.7))
        metal = any(word in material["name"].lower() for word in METALS) or (
            diffuse.max() < 0.12 and shine > 0.6
        )
        if metal:
            roughness = float(np.clip(roughness, 0.2, 0.4))
            diffuse = np.maximum(diffuse, 0.5) if diffuse.max() < 0.3 and shine > 0.5 else diffuse
        elif raw_class in SOFT_CLASSES:
            roughness, specular = max(roughness, 0.75), min(specular, 0.3)

        base, opacity = self._base(material, diffuse, raw_class, tint, metal)
        density = float(material.get("d", 1.0))
        if density < 0.95 and opacity is None and raw_class not in OPAQUE_CLASSES:
            opacity = max(density, MIN_OPACITY)
            if density < 0.7:  # glass
                roughness, specular = 0.08, 0.6
        bsdf = principled(base, roughness, specular, 0.9 if metal else 0.0)
        return bsdf if opacity is None else {"type": "mask", "opacity": opacity, "bsdf": bsdf}

    def _base(
        self, material: dict[str, Any], diffuse: np.ndarray, raw_class: str, tint: np.ndarray, metal: bool
    ) -> tuple[dict[str, Any], Any]:
        """Base colour and, for pictures with holes, opacity."""
        if "texture" in material:
            pixels = self.pictures.get(material["texture"])
            cut_out = pixels.shape[2] == 4 and pixels[..., 3].min() < 0.5
            opacity = bitmap(np.repeat(pixels[..., 3:], 3, axis=2)) if cut_out else None
            return bitmap(np.clip(pixels[..., :3], 0.01, 0.92)), opacity
        linear = to_linear(np.clip(diffuse, 0, 1))
        linear = np.clip(linear * tint if raw_class in TINTED_CLASSES else linear, 0.015, 0.85)
        reddish = linear.max() < 0.6 and linear[0] > linear[2] * 1.6
        if not metal and raw_class in SOFT_CLASSES:
            return self._grained(linear, FABRIC, 5.0), None
        if not metal and raw_class in WOODEN_CLASSES and reddish:
            return self._grained(linear, WOOD, 1.5), None
        return colour(linear), None

    def _grained(self, linear: np.ndarray, patterns: tuple[str, ...], per_metre: float) -> dict[str, Any]:
        texture = bitmap(np.clip(linear * self.pictures.grain(patterns, self.rng), 0.01, 0.9))
        texture["to_uv"] = mi.ScalarTransform4f().scale([per_metre, per_metre, 1])
        return texture
