"""What an upsampler is trained on: views of unlabelled photos, with features of a frozen backbone at two
resolutions.

The views of a folder are fixed by a seed, and their features are computed once and kept in the cache, one
file a view, named by everything that changes it: an interrupted preparation goes on where it stopped, and
training never runs the backbone. Two recipes (docs/training.md):

* "guidance" (JAFAR, NAF, RaysUp): the target is the feature map of the whole view.
* "crop" (AnyUp): the target is the feature map of a part of the view, seen at the size of a whole image;
  the method is asked for a larger map, and its loss is taken on the part that the crop covers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upbench.datasets import image_size, read_image
from upbench.errors import UpbenchError, reason
from upbench.system.cache import cache_dir, replacing, sha256_file
from upbench.system.progress import track
from upbench.train.config import ViewConfig
from upbench.values import existing_folder

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OUTPUT_STEPS = 5  # sizes that the crop recipe asks for: views of one size share a batch
_FORMAT = 1  # raise it when the content of a cached view changes


@dataclass(frozen=True)
class View:
    """A square part of a photo, and what is to be computed of it. All sizes are sides of squares.

    Attributes:
        photo: File.
        sha256: Of the file.
        box: Left, top and side in pixels of the upright photo.
        flip: Whether it is mirrored left to right (after the box was cut out).
        cells: Sides of the low-resolution feature maps.
        output: Side of the map that the upsampler is asked for.
        window: Top, left and side of the part of that map that has a target.
    """

    photo: Path
    sha256: str
    box: tuple[float, float, float]
    flip: bool
    cells: tuple[int, ...]
    output: int
    window: tuple[int, int, int]

    def target_box(self) -> tuple[float, float, float]:
        """Left, top and side, in pixels of the upright photo, of what the target shows."""
        left, top, side = self.box
        row, col, size = self.window
        if self.flip:
            col = self.output - size - col
        cell = side / self.output
        return left + col * cell, top + row * cell, size * cell


@dataclass(frozen=True)
class Batch:
    """Views that share all sizes.

    Attributes:
        image: `[B, 3, g, g]` RGB in 0..1, the guidance.
        features: `[B, C, h, h]`.
        target: `[B, C, n, n]`.
        output: Side of the map that the upsampler is asked for.
        windows: (top, left) of each target in that map.
    """

    image: Tensor
    features: Tensor
    target: Tensor
    output: int
    windows: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def split(self, size: int) -> list[Batch]:
        """The same views in batches of at most `size`."""
        parts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [
            Batch(self.image[p], self.features[p], self.target[p], self.output, self.windows[p])
            for p in parts
        ]

    def to(self, device: torch.device | str) -> Batch:
        """The same views on another device."""
        image, features, target = (x.to(device) for x in (self.image, self.features, self.target))
        return Batch(image, features, target, self.output, self.windows)

    def shrunk(self, size: int | None) -> Batch:
        """The same views with guidance of side `size` (None: as it is); bilinear, antialiased."""
        if size is None or size == self.image.shape[-1]:
            return self
        return replace(self, image=F.interpolate(self.image, (size, size), mode="bilinear", antialias=True))

    def covered(self, dense: Tensor) -> Tensor:
        """The parts `[B, C, n, n]` of upsampled maps `[B, C, output, output]` that have a target."""
        side = self.target.shape[-1]
        if side == self.output:
            return dense
        parts = zip(dense, self.windows, strict=True)
        return torch.stack([x[:, top : top + side, left : left + side] for x, (top, left) in parts])


def find_photos(folders: Sequence[str | Path]) -> list[Path]:
    """Every image file below the folders, in order of folder and path. Links to folders are not followed.

    Raises:
        UpbenchError: A folder is missing, may not be read or holds no image.
    """
    photos: list[Path] = []
    for given in folders:
        folder = existing_folder("image folder", given)
        found = sorted(_photos(folder))
        if not found:
            raise UpbenchError(f"no images in {folder} (looked for {', '.join(SUFFIXES)})")
        photos += found
    if not photos:
        raise UpbenchError("no folder with images was given")
    return photos


def _photos(folder: Path) -> Iterator[Path]:
    """Whatever below a folder is called like an image and is no folder: pipes and broken links included, for
    the reader to refuse."""

    def refuse(error: OSError) -> None:
        raise UpbenchError(f"cannot read the folder {error.filename}: {reason(error)}") from error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (file for name in names if (file := Path(place, name)).suffix.lower() in SUFFIXES)


def plan_views(photos: Sequence[Path], config: ViewConfig, stride: int) -> list[View]:
    """The views of each photo: a function of its content and the configuration, not of its neighbours.

    Args:
        photos: Image files.
        config: How to draw.
        stride: Pixels per feature of the backbone.

    Raises:
        UpbenchError: A file that is not an image, or a view of less than two features.
    """
    target_cells = config.view_size // stride
    if target_cells < 2:
        raise UpbenchError(f"view size {config.view_size} is under two features of stride {stride}")
    low, high = (max(1, round(share * target_cells)) for share in config.ratio)
    views = []
    for photo in photos:
        width, height = upright_size(photo)
        digest = sha256_file(photo)
        rng = np.random.default_rng([config.view_seed, int(digest[:15], 16)])
        for _ in range(config.crops_per_image):
            side = max(1.0, float(np.round(min(width, height) * rng.uniform(config.min_crop, 1))))
            left = float(rng.integers(0, width - int(side) + 1))
            top = float(rng.integers(0, height - int(side) + 1))
            flip = bool(rng.random() < 0.5)
            sizes = np.arange(low, high + 1)
            count = min(config.scales_per_view, len(sizes))
            cells = tuple(sorted(int(s) for s in rng.choice(sizes, count, replace=False)))
            output, window = target_cells, (0, 0, target_cells)
            if config.recipe == "crop":
                output, window = _crop_window(rng, target_cells)
            views.append(View(photo, digest, (left, top, side), flip, cells, output, window))
    return views


def _crop_window(rng: np.random.Generator, target_cells: int) -> tuple[int, tuple[int, int, int]]:
    """An output 1 to 2 times the side of the view's own map, and the place of a crop of half that map's
    side."""
    side = max(1, target_cells // 2)
    sizes = np.unique(np.linspace(target_cells, 2 * target_cells, OUTPUT_STEPS).round().astype(int))
    output = int(rng.choice(sizes))
    top, left = (int(v) for v in rng.integers(0, output - side + 1, size=2))
    return output, (top, left, side)


class ViewPool:
    """Views whose features are in the cache, and the batches drawn from them.

    Attributes:
        views: What the pool holds.
        fingerprint: SHA-256 over the views and their contents' keys.
    """

    def __init__(self, views: Sequence[View], files: Sequence[Path]) -> None:
        """Args: views: What the pool holds. files: The cached file of each (see `prepare`)."""
        self.views = list(views)
        self.files = list(files)
        text = "\n".join(file.stem for file in self.files)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self._choices = [(i, cells) for i, view in enumerate(self.views) for cells in view.cells]
        self._groups: dict[tuple[int, int], list[int]] = {}
        for i, cells in self._choices:
            self._groups.setdefault((cells, self.views[i].output), []).append(i)

    def __len__(self) -> int:
        return len(self.views)

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a training step: a function of its arguments alone, so that a resumed run sees the
        same.

        A (view, size) pair is drawn uniformly, then others of the same sizes; none twice where there are
        enough.
        """
        rng = np.random.default_rng([seed, step])
        first, cells = self._choices[int(rng.integers(len(self._choices)))]
        group = [i for i in self._groups[cells, self.views[first].output] if i != first]
        others = batch_size - 1
        more = rng.choice(group or [first], others, replace=len(group) < others)
        return self.read([first, *map(int, more)], cells)

    def read(self, indices: Sequence[int], cells: int) -> Batch:
        """The views of these indices with their low-resolution features of side `cells`.

        Raises:
            UpbenchError: A cached file has gone or is broken.
        """
        rows = [_read_view(self.files[i], cells) for i in indices]
        image, features, target = (torch.stack(column) for column in zip(*rows, strict=True))
        chosen = [self.views[i] for i in indices]
        windows = tuple((v.window[0], v.window[1]) for v in chosen)
        return Batch(image.float() / 255, features.float(), target.float(), chosen[0].output, windows)


class MixedPool:
    """The views of several backbones; steps take them in turn, so that all get the same share."""

    def __init__(self, pools: Sequence[ViewPool]) -> None:
        """Args: pools: One of each backbone."""
        self.pools = list(pools)

    def __len__(self) -> int:
        return sum(map(len, self.pools))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pools' own."""
        return hashlib.sha256("\n".join(pool.fingerprint for pool in self.pools).encode()).hexdigest()

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of a training step (see `ViewPool.batch`)."""
        return self.pools[step % len(self.pools)].batch(step, batch_size, seed)


def prepare(
    folders: Sequence[str | Path],
    backbone: Backbone,
    config: ViewConfig,
    *,
    limit: int | None = None,
) -> ViewPool:
    """Plans the views of the photos in some folders and computes those that are not in the cache yet.

    Args:
        folders: Folders with photos.
        backbone: Frozen; sees views in 0..1.
        config: How views are drawn.
        limit: Keep only the first views.

    Raises:
        UpbenchError: No images, an image that cannot be read, features that are not finite, a full disk.
    """
    return compute(plan_views(find_photos(folders), config, backbone.stride)[:limit], backbone, config)


def compute(views: Sequence[View], backbone: Backbone, config: ViewConfig) -> ViewPool:
    """The features of views, from the cache where they are there. Arguments and errors as for `prepare`."""
    identity = f"{backbone.name} {backbone.fingerprint}"
    folder = cache_dir("views")
    files = [folder / f"{_view_key(view, config, identity)}.safetensors" for view in views]
    missing = [(view, file) for view, file in zip(views, files, strict=True) if not file.is_file()]
    opened: tuple[Path, Image.Image] | None = None
    for view, file in track(missing, f"features of {len(views)} views"):
        if opened is None or opened[0] != view.photo:
            opened = (view.photo, _open_upright(view.photo))
        with replacing(file) as temporary:
            temporary.write_bytes(save(_compute_view(view, opened[1], backbone, config)))
    return ViewPool(views, files)


def _view_key(view: View, config: ViewConfig, backbone: str) -> str:
    content: dict[str, Any] = {k: v for k, v in asdict(view).items() if k != "photo"}
    content |= {
        "format": _FORMAT,
        "backbone": backbone,
        "view": config.view_size,
        "guidance": config.guidance_size,
        "precision": config.precision,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _compute_view(
    view: View, photo: Image.Image, backbone: Backbone, config: ViewConfig
) -> dict[str, Tensor]:
    """The content of a cached view: guidance as uint8, features in half precision."""
    stride = backbone.stride
    target_size = view.window[2] * stride
    seen = {"target": _cut(photo, view.target_box(), target_size, view.flip)}
    for cells in view.cells:
        seen[f"features_{cells}"] = _cut(photo, view.box, cells * stride, view.flip)
    tensors = {"guidance": _cut(photo, view.box, config.guidance_size, view.flip)}
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    for name, image in seen.items():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            features = backbone(image[None].to(device).float() / 255)[0].float().cpu()
        if not features.isfinite().all():
            raise UpbenchError(f"the backbone's features of {view.photo} are not finite")
        half = features.half()
        tensors[name] = half if half.isfinite().all() else features
    return tensors


def _cut(photo: Image.Image, box: tuple[float, float, float], size: int, flip: bool) -> Tensor:
    """A square of a photo as uint8 `[3, size, size]`; one antialiased bicubic resize."""
    left, top, side = box
    # float arithmetic may leave the photo by a rounding error
    right, bottom = min(left + side, photo.width), min(top + side, photo.height)
    cut = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    pixels = np.asarray(cut)
    pixels = pixels[:, ::-1] if flip else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def upright_size(photo: Path) -> tuple[int, int]:
    """Width and height after the EXIF orientation is applied; reads the header only."""
    height, width = image_size(photo)
    return width, height


def _open_upright(photo: Path) -> Image.Image:
    return Image.fromarray(read_image(photo).permute(1, 2, 0).numpy())


def _read_view(file: Path, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            names = ("guidance", f"features_{cells}", "target")
            guidance, features, target = (content.get_tensor(name) for name in names)
    except (SafetensorError, OSError) as error:
        raise UpbenchError(f"cached view {file} is gone or broken; delete it and prepare again") from error
    return guidance, features, target
