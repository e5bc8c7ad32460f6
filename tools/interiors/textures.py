"""Pictures and patterns for surfaces: linear RGB `float32 [H, W, 3]`, values that a real surface can
reflect."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from upbench.errors import UpbenchError

from .catalogue import Catalogue

try:
    from skimage import data as skimage_data
except ImportError as error:  # pragma: no cover
    raise UpbenchError("rendering needs scikit-image: pip install 'upbench[render]'") from error

WOOD = (
    "A:american_oak.jpg", "A:oak.jpg", "A:Wood_013_COLOR*", "A:cherry.jpg", "A:wood10.jpg", "A:wood12.jpg",
    "B:Wood1.jpg", "B:Tabletop-light.jpg", "S:rojiza.jpg", "S:tipical.jpg", "S:oaktexture*",
)  # fmt: skip
FABRIC = (
    "A:Denim_001_COLOR*", "A:Fabric_011_COLOR*", "A:Plain001*", "A:tecido.jpg", "B:Fabric_04.jpg",
    "S:bump_sofa.jpg", "S:fabric_beige.jpg",
)  # fmt: skip
STONE = ("A:marble_14.jpg", "B:white-marble*")
PAPER = ("S:wallpaper-chiyog*", "S:wallpaper-japane*", "S:beige_pattern.jpg")

WALL_COLOURS = (
    (0.80, 0.78, 0.73), (0.72, 0.74, 0.72), (0.75, 0.66, 0.52), (0.45, 0.55, 0.60), (0.60, 0.66, 0.55),
    (0.82, 0.80, 0.78), (0.62, 0.45, 0.38), (0.40, 0.47, 0.42), (0.78, 0.70, 0.66), (0.50, 0.50, 0.53),
)  # fmt: skip
TILE_COLOURS = (
    (0.8, 0.78, 0.74),
    (0.55, 0.5, 0.45),
    (0.75, 0.65, 0.55),
    (0.35, 0.36, 0.38),
    (0.7, 0.74, 0.76),
)
CARPET_COLOURS = (
    (0.45, 0.42, 0.38), (0.3, 0.33, 0.4), (0.5, 0.35, 0.3), (0.55, 0.52, 0.45), (0.3, 0.35, 0.28),
)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """A texture, how often it repeats a metre, and its roughness."""

    texture: np.ndarray
    per_metre: float
    roughness: float


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 to linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB; values above one stay above one."""
    high = 1.055 * np.clip(linear, 1e-8, None) ** (1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, high)


class Pictures:
    """Pictures out of the furniture libraries, decoded once; linear RGB, with alpha where the file has it."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._decoded: dict[str, np.ndarray] = {}

    def get(self, reference: str) -> np.ndarray:
        """`[H, W, 3 or 4]` of `LETTER:path in the library`."""
        if reference not in self._decoded:
            letter, _, path = reference.partition(":")
            with Image.open(io.BytesIO(self.catalogue.libraries[letter].read(path))) as picture:
                transparent = "A" in picture.getbands() or "transparency" in picture.info
                pixels = (
                    np.asarray(picture.convert("RGBA" if transparent else "RGB")).astype(np.float32) / 255
                )
            pixels[..., :3] = to_linear(pixels[..., :3])
            self._decoded[reference] = pixels
        return self._decoded[reference]

    def any_of(self, patterns: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
        """`[H, W, 3]` of one of the pictures that `LETTER:pattern` name."""
        letter, _, pattern = patterns[rng.integers(len(patterns))].partition(":")
        return self.get(f"{letter}:{self.catalogue.libraries[letter].find(pattern)}")[..., :3]

    def grain(self, patterns: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
        """`[H, W, 1]` with mean one: the structure of a picture, to be multiplied with any colour."""
        grey = self.any_of(patterns, rng).mean(-1, keepdims=True)
        grain: np.ndarray = np.clip(grey / grey.mean(), 0.3, 2.2)
        return grain


def noise(rng: np.random.Generator, size: int, octaves: int = 5, persistence: float = 0.55) -> np.ndarray:
    """Tileable fractal noise `[size, size]` with mean zero and deviation one."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = 4 * 2**octave
        grid = np.pad(rng.standard_normal((cells, cells)).astype(np.float32), ((0, 1), (0, 1)), mode="wrap")
        side = size + size // cells
        layer = np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
        total += layer[:size, :size] * persistence**octave
    normalised: np.ndarray = (total - total.mean()) / total.std()
    return normalised


def parquet(
    pictures: Pictures, rng: np.random.Generator, planks: int, rows: int, size: int = 768
) -> np.ndarray:
    """Planks along y, each cut from one picture of wood, with dark joints."""
    wood = pictures.any_of(WOOD, rng)
    wood = np.rot90(wood) if rng.random() < 0.5 else wood
    width, length = size // planks, size // rows
    target = (max(width * 3, wood.shape[1]), max(length, wood.shape[0]))
    wood8 = Image.fromarray((np.clip(wood, 0, 1) * 255).astype(np.uint8)).resize(target)
    wood = np.asarray(wood8).astype(np.float32) / 255
    out = np.zeros((size, size, 3), np.float32)
    for i in range(planks):
        offset = int(rng.integers(size))
        for j in range(rows + 1):
            top = (j * length + offset) % size
            y, x = (int(rng.integers(max(1, wood.shape[k] - n + 1))) for k, n in ((0, length), (1, width)))
            plank = wood[y : y + length, x : x + width] * (1 + 0.13 * rng.standard_normal())
            plank = plank[::-1] if rng.random() < 0.5 else plank
            out[(np.arange(len(plank)) + top) % size, i * width : i * width + plank.shape[1]] = plank
            out[(top + np.arange(2)) % size, i * width : (i + 1) * width] *= 0.45
        out[:, i * width : i * width + 2] *= 0.45
    if planks * width < size:
        out[:, planks * width :] = out[:, : size - planks * width]
    return np.clip(out, 0, 1)


def tiles(pictures: Pictures, rng: np.random.Generator, count: int, size: int = 768) -> np.ndarray:
    """`count` x `count` stone tiles with grey joints."""
    colour = np.array(TILE_COLOURS[rng.integers(len(TILE_COLOURS))])
    stone = np.tile(pictures.grain(STONE, rng), (2, 2, 1))
    side = size // count
    out = np.zeros((size, size, 3), np.float32)
    for i in range(count):
        for j in range(count):
            y, x = (int(rng.integers(max(1, n // 2 - side))) for n in stone.shape[:2])
            patch = stone[y : y + side, x : x + side]
            place = out[i * side : (i + 1) * side, j * side : (j + 1) * side]
            place[:] = colour * patch[: place.shape[0], : place.shape[1]] * (1 + 0.05 * rng.standard_normal())
    joint = max(3, size // 200)
    for i in range(count):
        out[i * side : i * side + joint] = out[:, i * side : i * side + joint] = (0.45, 0.43, 0.4)
    return np.clip(out, 0, 0.95)


def wall(pictures: Pictures, rng: np.random.Generator) -> Surface:
    """Plaster most often, else brick, wallpaper or panelling."""
    kind = rng.random()
    if kind < 0.62:
        colour = np.array(WALL_COLOURS[rng.integers(len(WALL_COLOURS))])
        return Surface(
            np.clip(colour * (1 + 0.035 * noise(rng, 512, 6, 0.7)[..., None]), 0, 0.92), 1 / 2.5, 0.85
        )
    if kind < 0.74:
        brick = to_linear(np.rot90(skimage_data.brick()).astype(np.float32) / 255)[..., None]
        colour = np.array([(0.75, 0.45, 0.35), (0.9, 0.88, 0.85), (0.6, 0.5, 0.42)][rng.integers(3)])
        return Surface(np.clip(brick / brick.mean() * colour * 0.55, 0, 0.9), 1 / 1.6, 0.9)
    if kind < 0.88:
        figure = np.clip(pictures.grain(PAPER, rng) - 0.6, 0, 1)
        ground = np.array(WALL_COLOURS[rng.integers(len(WALL_COLOURS))])
        ink = ground + rng.uniform(0.1, 0.5) * (to_linear(rng.uniform(0.2, 0.95, 3)) - ground)
        return Surface(np.clip(ground * (1 - figure) + ink * figure, 0, 0.9), 1 / rng.uniform(0.6, 1.2), 0.85)
    return Surface(parquet(pictures, rng, 8, 2) * 0.9, 1 / 1.6, 0.6)


def floor(pictures: Pictures, rng: np.random.Generator) -> Surface:
    """Parquet most often, else tiles or carpet."""
    kind = rng.random()
    if kind < 0.6:
        wood = parquet(pictures, rng, int(rng.integers(6, 12)), int(rng.integers(1, 4)))
        return Surface(wood, 1 / rng.uniform(1.0, 1.8), rng.uniform(0.25, 0.5))
    if kind < 0.8:
        stone = tiles(pictures, rng, int(rng.integers(2, 5)))
        return Surface(stone, 1 / rng.uniform(1.2, 2.0), rng.uniform(0.15, 0.4))
    colour = np.array(CARPET_COLOURS[rng.integers(len(CARPET_COLOURS))])
    return Surface(np.clip(pictures.grain(FABRIC, rng) * colour, 0, 0.9), 1 / 0.35, 0.95)


def rug(pictures: Pictures, rng: np.random.Generator, size: int = 512) -> np.ndarray:
    """A woven rug `[size, size, 3]`: a field with stripes or diamonds, and a border."""
    colours = to_linear(rng.uniform(0.15, 0.85, (4, 3)))
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.broadcast_to(colours[0], (size, size, 3)).copy()
    repeats = int(rng.integers(3, 9))
    pattern = [(x * repeats % 1 < 0.5), ((np.abs(x - 0.5) + np.abs(y - 0.5)) * repeats % 1 < 0.5), (x < 0)]
    out[pattern[rng.integers(3)]] = colours[1]
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    width = rng.uniform(0.03, 0.12)
    out[edge < width] = colours[2]
    out[edge < width * 0.4] = colours[3]
    grain = pictures.grain(FABRIC, rng)
    grey = Image.fromarray(np.clip(grain[..., 0] * 100, 0, 255).astype(np.uint8)).resize((size, size))
    return np.clip(out * (np.asarray(grey)[..., None] / 100.0), 0.01, 0.9).astype(np.float32)


def painting(rng: np.random.Generator, landscape: Callable[[], np.ndarray]) -> np.ndarray:
    """A picture to hang up: a photograph, a landscape, or an abstract painting; linear `[H, W, 3]`."""
    kind = rng.random()
    if kind < 0.35:
        name = ("coffee", "chelsea", "rocket", "astronaut", "hubble_deep_field")[rng.integers(5)]
        return to_linear(getattr(skimage_data, name)()[..., :3].astype(np.float32) / 255)
    if kind < 0.65:
        return landscape()
    height, width = [(400, 400), (400, 300), (300, 450)][rng.integers(3)]
    field = noise(rng, 512, int(rng.integers(1, 4)), 0.5)[:height, :width]
    palette = to_linear(rng.uniform(0.1, 0.95, (int(rng.integers(3, 6)), 3)))
    levels = np.clip(((field + 2) / 4 * len(palette)).astype(int), 0, len(palette) - 1)
    painted: np.ndarray = palette[levels]
    return painted
