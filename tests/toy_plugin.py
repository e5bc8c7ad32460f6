"""A toy world for tests of the run: small images, a backbone that learned nothing, methods that misbehave.

Loaded as a plugin file, so that worker processes get it like anybody's plugin. Besides registering plugins it
adds a preset of 32 pixels and a backbone ("tiny"), and measures costs in no time.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from upbench import Upsampler
from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Camera, Sample
from upbench.contracts.weights import Weights
from upbench.cost import measure as cost
from upbench.evaluate.protocol import PRESETS, Preset, ProbeConfig
from upbench.features import backbones
from upbench.system.cache import digest

PRESETS["tiny"] = Preset(
    "tiny", version=3, image_size=32, output_size=32, probe=ProbeConfig(epochs=2, batch_size=2)
)

if not isinstance(cost.measure, functools.partial):
    cost.measure = functools.partial(cost.measure, seconds=0.01, memory=False)


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
    """Noise, brighter where the label is 1, deeper to the right."""

    name = "toy"
    targets = frozenset({"label", "depth"})
    classes = ("dark", "bright")
    eval_splits = ("val", "other")
    counts = {"train": 6, "val": 4, "other": 3}

    def names(self, split: str) -> list[str]:
        if split not in self.counts:
            raise self.unknown_split(split, tuple(self.counts))
        return [f"{split}{i}" for i in range(self.counts[split])]

    def load(self, split: str, index: int, size: int) -> Sample:
        generator = torch.Generator().manual_seed(100 * list(self.counts).index(split) + index)
        label = torch.zeros(size, size, dtype=torch.int64)
        label[:, size // 4 : size // 4 + size // 2] = 1
        image = 0.4 * torch.rand(3, size, size, generator=generator) + 0.5 * label
        depth = torch.linspace(1, 3, size).expand(size, size).contiguous()
        camera = Camera(torch.tensor([[float(size), size, size / 2, size / 2]]))
        valid = torch.ones(size, size, dtype=torch.bool)
        return Sample(f"{split}{index}", image, valid, label=label, depth=depth, camera=camera)

    def fingerprint(self, split: str) -> str:
        return digest(self.name, split, os.environ.get("TOY_DATA", "1"))


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
