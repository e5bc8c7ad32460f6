"""What a training run depends on, and what it leaves. Imports no torch."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from upbench.errors import UpbenchError, named, shown
from upbench.results.cell import plain_mapping
from upbench.values import choice, flag, number, text, user_path, whole

RECIPES = ("guidance", "crop")
PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("cosine", "constant")
DTYPES = ("auto", "fp32", "bf16")
# settings that may differ when a run is resumed; the photos themselves are in the pool's fingerprint
_FREE = (
    "images",
    "out",
    "val_images",
    "log_every",
    "save_every",
    "save_minutes",
    "resume",
    "force",
    "device",
)


_LARGEST_VIEW = 10_000
_LARGEST_BATCH = 100_000
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class ViewConfig:
    """How views are drawn from photos, and at which sizes they are seen.

    Attributes:
        recipe: "guidance" or "crop" (see the module).
        view_size: Side in pixels at which the backbone sees a view for its target; rounded to the stride.
        guidance_size: Side in pixels of the image that guides the upsampler.
        ratio: Smallest and largest side of the low-resolution features, as a share of the high-resolution
            ones.
        crops_per_image: Views of each photo.
        scales_per_view: Low-resolution sizes kept of each view.
        min_crop: Smallest side of a view, as a share of the photo's shorter side.
        precision: "fp32", or "bf16" for products in bfloat16 when the backbone is run: features change by
            half a percent, and a CPU with AMX is seven times as fast.
        view_seed: Of all of this; apart from the seed of training, so that another one finds its features
            in the cache.
    """

    recipe: str = "guidance"
    view_size: int = 448
    guidance_size: int = 224
    ratio: tuple[float, float] = (0.25, 0.5)
    crops_per_image: int = 4
    scales_per_view: int = 3
    min_crop: float = 0.5
    precision: str = "bf16"
    view_seed: int = 0

    def __post_init__(self) -> None:
        choice("recipe", self.recipe, RECIPES)
        choice("precision", self.precision, PRECISIONS)
        for name, most in (
            *(("view_size", _LARGEST_VIEW), ("guidance_size", _LARGEST_VIEW)),
            *(("crops_per_image", 100_000), ("scales_per_view", 1000)),
        ):
            whole(_flag(name), getattr(self, name), most=most)
        if not isinstance(self.ratio, (tuple, list)) or len(self.ratio) != 2:
            raise UpbenchError(f"ratio must be two fractions, the smaller first, got {shown(self.ratio)}")
        for value in self.ratio:
            number("ratio", value, 0, 1, above=True)
        if self.ratio[0] > self.ratio[1]:
            raise UpbenchError(f"ratio must be two fractions, the smaller first, got {shown(self.ratio)}")
        number(_flag("min_crop"), self.min_crop, 0, 1, above=True)
        whole(_flag("view_seed"), self.view_seed, 0, _LARGEST_SEED)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    Attributes:
        method: Name of a trainable method.
        images: Folders with photos, searched with their subfolders.
        out: File for the weights, ending in .safetensors.
        backbone: Names of the frozen backbones. With several, steps take them in turn; that is for methods
            whose parameters do not depend on C.
        steps: Optimiser steps.
        batch: Views per step.
        guidance_sizes: Sides in pixels to which the guidance is shrunk, one of them drawn for each step;
            none for the size that it has. Small ones cost less, and teach queries of few pixels each.
        views: How views are drawn from photos; its `recipe` is the `--recipe` of the command line.
        val_images: Folders with photos that the curve's cosine similarity is measured on; none for no
            measurement.
        val_views: How many of their photos are used, one view each.
        val_every: Steps between measurements.
        lr: Peak learning rate of AdamW.
        weight_decay: Of AdamW.
        warmup: Steps over which the learning rate rises linearly.
        schedule: "cosine" (down to zero at the last step) or "constant", after the warm-up.
        clip: Largest norm of the gradient; 0 for no limit.
        seed: Of initial weights, batches and views.
        init: Weights to start from, as for `load_method`; their images count in what the file says of itself.
        options: Options of the method's constructor.
        device: "auto", "cpu", "cuda" or what torch knows.
        dtype: "bf16" runs the method under autocast; "auto" does so on a GPU only.
        micro_batch: Views per forward pass (gradients are summed); None for the batch on a GPU and 1 on a
            CPU, whose caches it suits.
        log_every: Steps between lines of the curve.
        save_every: Steps between checkpoints.
        save_minutes: Minutes after which a checkpoint is written at the latest.
        resume: Go on from a checkpoint beside `out`, if there is one.
        force: Replace an existing `out` and forget a checkpoint.
    """

    method: str
    images: tuple[str, ...]
    out: str
    backbone: tuple[str, ...] = ("dinov2_vits14_focus",)
    steps: int = 2000
    batch: int = 4
    guidance_sizes: tuple[int, ...] = ()
    views: ViewConfig = field(default_factory=ViewConfig)
    val_images: tuple[str, ...] = ()
    val_views: int = 32
    val_every: int = 250
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: int = 50
    schedule: str = "cosine"
    clip: float = 1.0
    seed: int = 0
    init: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    micro_batch: int | None = None
    log_every: int = 10
    save_every: int = 500
    save_minutes: float = 5.0
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        choice("schedule", self.schedule, SCHEDULES)
        choice("dtype", self.dtype, DTYPES)
        for name in ("method", "init", "device"):
            text(name, getattr(self, name))
        for name in ("steps", "val_views", "val_every", "log_every", "save_every"):
            whole(_flag(name), getattr(self, name))
        whole("batch", self.batch, most=_LARGEST_BATCH)
        if self.micro_batch is not None:
            whole(_flag("micro_batch"), self.micro_batch, most=_LARGEST_BATCH)
        whole("warmup", self.warmup, 0)
        whole("seed", self.seed, 0, _LARGEST_SEED)
        number("lr", self.lr, 0, 1000, above=True)
        for name in ("weight_decay", "clip"):
            number(_flag(name), getattr(self, name), 0)
        number(_flag("save_minutes"), self.save_minutes, 0, above=True)
        for name in ("resume", "force"):
            flag(name, getattr(self, name))
        self._check_names()
        for size in self.guidance_sizes:
            whole(_flag("guidance_sizes"), size, most=self.views.guidance_size)
        object.__setattr__(self, "options", plain_mapping("options", self.options))
        if user_path(self.out).suffix != ".safetensors":
            raise UpbenchError(f"out must end in .safetensors, got {named(self.out)}")

    def _check_names(self) -> None:
        for name in ("images", "val_images", "backbone", "guidance_sizes"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise UpbenchError(f"{_flag(name)} must be a list, got {shown(getattr(self, name))}")
        for name in (*self.images, *self.val_images):
            user_path(name)
        if not self.images:
            raise UpbenchError("no folder of images was given")
        if not self.backbone:
            raise UpbenchError("no backbone was given")
        for name in self.backbone:
            text("backbone", name)
        if len(set(self.backbone)) < len(self.backbone):
            raise UpbenchError(f"a backbone is named twice: {', '.join(self.backbone)}")

    def paths(self) -> TrainPaths:
        """The files that the run leaves."""
        out = user_path(self.out)
        return TrainPaths(out, *(out.with_suffix(s) for s in (".resume.pt", ".curve.jsonl", ".md")))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint: all that changes the result."""
        return {k: v for k, v in json.loads(json.dumps(asdict(self))).items() if k not in _FREE}

    def command(self, published: bool = False) -> str:
        """The command line that repeats the run (defaults left out).

        Args:
            published: Whether files and folders are named without where they lie, for those who read the
                weights' card and metadata: a path tells of a machine and its user.
        """
        if published:
            return replace(self, **{name: _names(getattr(self, name)) for name in _PLACES}).command()
        words = ["upbench", "train", self.method]
        words += [w for name in self.backbone for w in ("--backbone", name)]
        words += [w for folder in self.images for w in ("--images", folder)]
        words += ["--steps", str(self.steps), "--batch", str(self.batch), "--out", self.out]
        mine, default = asdict(self), asdict(TrainConfig(self.method, self.images, self.out))
        flat = {**mine.pop("views"), **mine}
        plain = {**default.pop("views"), **default}
        told = ("method", "images", "out", "backbone", "steps", "batch", "resume", "force")
        for name, value in flat.items():
            if name not in told and value != plain[name]:
                words += [w for v in _values(value) for w in (f"--{name.replace('_', '-')}", v)]
        return shlex.join(words)


_PLACES = ("images", "val_images", "out", "init")


def _names(places: str | tuple[str, ...]) -> Any:
    """The last part of paths."""
    if isinstance(places, str):
        return Path(places).name or places
    return tuple(Path(place).name or place for place in places)


@dataclass(frozen=True)
class TrainPaths:
    """Files of a run: weights, checkpoint, curve, card."""

    out: Path
    resume: Path
    curve: Path
    card: Path


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to.

    Attributes:
        out: The weights; written only when `finished`.
        sha256: Of that file, or None.
        steps: Steps done.
        images_seen: Views that went through the method.
        images_before: Images that the weights it began from (`init`) had been trained on; 0 where not told.
        loss: Smoothed training loss.
        val_cosine: Mean cosine similarity on the validation views (over backbones, too), or None.
        val_bilinear: The same of bilinear interpolation, or None.
        finished: False where the run was told to stop; `--resume` goes on.
        seconds: Time in the training loop, over all resumptions.
        curve: The loss curve.
        card: The model card.
        stopped_by: Number of the signal that told the run to stop; None where none did.
    """

    out: Path
    sha256: str | None
    steps: int
    images_seen: int
    images_before: int
    loss: float
    val_cosine: float | None
    val_bilinear: float | None
    finished: bool
    seconds: float
    curve: Path
    card: Path
    stopped_by: int | None = None


def _flag(name: str) -> str:
    """A field as the command line calls it, without its dashes."""
    return name.replace("_", "-")


def _values(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k}={v}" for k, v in value.items()]
    return [str(v) for v in value] if isinstance(value, (tuple, list)) else [str(value)]
