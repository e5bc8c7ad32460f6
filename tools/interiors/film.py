"""From light to an image: path tracing, denoising, tone mapping."""

from __future__ import annotations

from typing import Any

import mitsuba as mi
import numpy as np

from upbench.errors import UpbenchError

from .camera import View
from .textures import to_srgb

try:
    import mitsuba_oidn
except ImportError as error:  # pragma: no cover
    raise UpbenchError("rendering needs mitsuba-oidn: pip install 'upbench[render]'") from error

PATH_DEPTH = 6
MAX_RADIANCE = 60.0
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
KEY = 0.26
"""Linear value that the scene's mean (geometric) luminance is exposed to."""


def render(scene: Any, view: View, size: int, spp: int, seed: int) -> np.ndarray:
    """Denoised radiance `float32 [size, size, 3]`; albedo and normals of the first hit guide the denoiser."""
    image = {"type": "path", "max_depth": PATH_DEPTH, "rr_depth": 5}
    integrator = mi.load_dict({"type": "aov", "aovs": "albedo:albedo,normal:sh_normal", "image": image})
    layers = np.array(
        mi.render(scene, sensor=view.sensor(size, spp), integrator=integrator, spp=spp, seed=seed)
    )
    radiance = np.ascontiguousarray(np.clip(np.nan_to_num(layers[..., :3]), 0, MAX_RADIANCE))
    albedo = np.ascontiguousarray(np.clip(layers[..., 3:6], 0, 1))
    normal = np.ascontiguousarray(layers[..., 6:9])
    denoised: np.ndarray = np.array(mitsuba_oidn.denoise(radiance, albedo, normal, hdr=True))
    return denoised


def develop(radiance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Tone maps radiance to `uint8 [H, W, 3]` sRGB: exposure, highlight roll-off, vignette, sensor noise."""
    key = np.exp(np.mean(np.log(np.maximum(radiance @ LUMINANCE, 1e-4))))
    exposed = radiance * (KEY / key * rng.uniform(0.85, 1.25))
    white = max(float(np.quantile(exposed, 0.985)), 1.0) * 1.5
    exposed = exposed * (1 + exposed / white**2) / (1 + exposed) * 1.15
    height, width = exposed.shape[:2]
    y, x = np.mgrid[0:height, 0:width]
    radius2 = ((y - height / 2) ** 2 + (x - width / 2) ** 2) / (width / 2) ** 2
    exposed = exposed * (1 - 0.06 * radius2)[..., None]
    srgb = to_srgb(exposed) + rng.normal(0, 1.3 / 255, exposed.shape)
    image: np.ndarray = (np.clip(srgb, 0, 1) * 255 + 0.5).astype(np.uint8)
    return image
