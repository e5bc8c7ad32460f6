"""A toy world for tests of the run: small images, a backbone that learned nothing, methods that misbehave.

Loaded as a plugin file, so that worker processes get it like anybody's plugin. Besides registering plugins,
a protocol of 32 pixels among them, it adds a backbone ("tiny"), and measures costs in no time.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from upbench import Dataset, Metric, Protocol, Recipe, Sample, Scores, SquareCrop, Task, Upsampler, Weights
from upbench.contracts.sample import Camera
from upbench.cost import measure as cost
from upbench.features import backbones
from upbench.system.cache import digest

if not isinstance(cost.measure, functools.partial):
    cost.measure = functools.partial(cost.measure, seconds=0.01, memory=False)


class TinyProtocol(Protocol):
    """Takes a second."""

    name = "tiny"
    version = 3
    geometry = SquareCrop(32)
    recipe = Recipe(epochs=2, batch_size=2)
    task_recipes = False  # they would take a hundred epochs


class Tiny(torch.nn.Module):
    """Mean colours of 8x8 patches, and their squares."""

    channels, stride, patch_size, name = 6, 8, None, "tiny"

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.fingerprint = "tiny-1"

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        return height // 8 * 8, width // 8 * 8

    def fit(self, image01: torch.Tensor) -> torch.Tensor:
        return image01

    def forward(self, image01: torch.Tensor) -> torch.Tensor:
        mean = F.avg_pool2d(image01, 8) * self.scale
        return torch.cat([mean, mean.square()], dim=1)


class NaN(Tiny):
    """A broken backbone."""

    name = "broken"

    def __init__(self) -> None:
        super().__init__()
        self.scale.fill_(torch.nan)
        self.fingerprint = "broken"


_load_backbone = getattr(backbones.load_backbone, "original", backbones.load_backbone)


def _load(name, device="cpu", pretrained=True):
    """`load_backbone` with the two toy backbones."""
    if name in ("tiny", "broken"):
        return (Tiny() if name == "tiny" else NaN()).to(device)
    return _load_backbone(name, device, pretrained)


_load.original = _load_backbone
backbones.load_backbone = _load


class Toy(Dataset):
    """Noise, brighter where the label is 1, deeper to the right; larger than the protocol shows."""

    name = "toy"
    targets = frozenset({"label", "depth"})
    classes = ("dark", "bright")
    eval_splits = ("val", "other")
    images = {"train": 6, "val": 4, "other": 3}
    height, width = 40, 56

    def names(self, split: str) -> list[str]:
        if split not in self.images:
            raise self.unknown_split(split, tuple(self.images))
        return [f"{split}{i}" for i in range(self.images[split])]

    def read(self, split: str, index: int) -> Sample:
        height, width = self.height, self.width
        generator = torch.Generator().manual_seed(100 * list(self.images).index(split) + index)
        label = torch.zeros(height, width, dtype=torch.uint8)
        label[:, 3 * width // 8 : 5 * width // 8] = 1
        light = 0.4 * torch.rand(3, height, width, generator=generator) + 0.5 * label
        depth = torch.linspace(1, 3, width).expand(height, width).contiguous()
        camera = Camera(torch.tensor([[float(width), width, width / 2, height / 2]]))
        return Sample(f"{split}{index}", (light * 255).byte(), label=label, depth=depth, camera=camera)

    def fingerprint(self, split: str) -> str:
        return digest(self.name, split, os.environ.get("TOY_DATA", "1"))


class Noted(Task):
    """Trains nothing: the mean of the features, after a line of `TOY_NOTES` that says who did it.

    With `TOY_MEETING`, a folder, a process that comes to its first cell waits there for another one.
    """

    name = "toy_noted"
    title = "Noted"
    metrics = (Metric("brightness", "Brightness", higher_is_better=True),)
    primary = "brightness"
    datasets = ("toy",)

    def evaluate(self, context):
        if folder := os.environ.get("TOY_MEETING"):
            meet(Path(folder))
        scores, method = Scores(), context.dense("val").call.method.name
        if notes := os.environ.get("TOY_NOTES"):
            with Path(notes).open("a") as file:
                file.write(f"{os.getpid()} {method}\n")
        for split in context.dataset.eval_splits:
            dense = context.dense(split)
            own = [float(dense.batch([index]).dense().mean()) for index in range(len(dense))]
            scores.add(split, {"brightness": sum(own) / len(own)}, context.samples(split).names, own)
        return scores


def meet(folder: Path) -> None:
    """Waits for a second process to come here, too."""
    (folder / str(os.getpid())).touch()
    patience = time.monotonic() + 300
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > patience:
            raise TimeoutError("nobody came")
        time.sleep(0.02)


class Smooth(Upsampler):
    """Bilinear."""

    name = "toy_smooth"
    title = "Smooth"
    linear = True
    calls = 0

    def __init__(self, channels: int = 6, mode: str = "bilinear") -> None:
        super().__init__(channels)
        self.mode = mode

    def forward(self, image, features, output_size):
        type(self).calls += 1
        return F.interpolate(features, output_size, mode=self.mode)


class Trained(Upsampler):
    """A method with a checkpoint, tied to C."""

    name = "toy_trained"
    year = 2025
    paper = "Nobody et al., 2025"
    trainable = True
    weights = {
        "good": Weights(source=os.environ.get("TOY_WEIGHTS", "/nonexistent/toy.safetensors"), sha256="0" * 64)
    }

    def __init__(self, channels: int = 6) -> None:
        super().__init__(channels)
        self.gain = torch.nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, image, features, output_size):
        return F.interpolate(features * self.gain, output_size)


class Posed(Upsampler):
    """Uses a camera: the output is brighter with one."""

    name = "toy_posed"
    uses_camera = True

    def forward(self, image, features, output_size, camera=None):
        gain = 1.0 if camera is None else float(camera.intrinsics[0, 0]) / image.shape[-1] + 1
        return F.interpolate(features * gain, output_size)


class Fails(Upsampler):
    """Raises while `TOY_HEALED` is not set."""

    name = "toy_fails"

    def forward(self, image, features, output_size):
        if "TOY_HEALED" not in os.environ:
            raise ValueError("boom\nin two lines")
        return F.interpolate(features, output_size)


class NotFinite(Upsampler):
    """Gives nan."""

    name = "toy_nan"

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size) * torch.nan


class Skips(Upsampler):
    """Cannot do what it is asked."""

    name = "toy_skips"
    native_ratio = 16

    @classmethod
    def skip_reason(cls, setting):
        return f"only {cls.native_ratio}x, not {setting.output_size[0] // setting.feature_size[0]}x"

    def forward(self, image, features, output_size):
        raise AssertionError("a skipped method must not run")


class Dies(Upsampler):
    """Takes its process with it when it is probed (cost is measured before, with gradients off)."""

    name = "toy_dies"

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size)

    def operator(self, image, features, output_size, camera=None):
        os.kill(os.getpid(), signal.SIGKILL)


class Stops(Upsampler):
    """The user's Ctrl-C comes while it is probed; or, with `TOY_MARK`, it waits to be killed."""

    name = "toy_stops"

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size)

    def operator(self, image, features, output_size, camera=None):
        if "TOY_HEALED" in os.environ:
            return None
        if "TOY_MARK" not in os.environ:
            raise KeyboardInterrupt
        Path(os.environ["TOY_MARK"]).touch()
        time.sleep(600)
