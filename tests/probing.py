"""Small methods, an in-memory dataset, a protocol and a probe, for tests of views and of probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.sample import Camera, Sample
from upbench.contracts.task import Crop
from upbench.contracts.upsampler import Upsampler
from upbench.dense.camera import CameraChoice
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate.probe import TrainingSet, View
from upbench.features.images import SplitImages
from upbench.features.moments import Moments
from upbench.ops.window.attention import window_operator
from upbench.ops.window.tables import neighbourhood_table
from upbench.protocols.geometry import SquareCrop
from upbench.system.cache import digest

SIZE, CELLS, CHANNELS = 24, 6, 8


# Methods without a name are not registered: these stay in this file.


class Resized(Upsampler):
    """Linear, with the operator that its `forward` implies."""

    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size, mode="bicubic")


class Attending(Upsampler):
    """Two heads that average different channels with different weights, from an operator."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        operator = self.operator(image, features, output_size)
        heads = features.unflatten(1, (2, -1))
        zero = torch.zeros_like(heads[:, :1])
        each = [
            operator(torch.cat([heads[:, :1], zero], 1)),
            operator(torch.cat([zero, heads[:, 1:]], 1)),
        ]
        return torch.cat(each, 1)

    def operator(self, image, features, output_size, camera=None):
        self.asked += 1
        scales = torch.arange(1, 7, device=image.device).view(1, 6, 1, 1)
        queries = F.interpolate(image, output_size).repeat(1, 2, 1, 1) * scales
        keys = F.adaptive_avg_pool2d(image, features.shape[-2:]).repeat(1, 2, 1, 1)
        tables = (neighbourhood_table(n, c, 3) for n, c in zip(output_size, features.shape[-2:], strict=True))
        return window_operator(queries, keys, *tables, heads=2)


class Bent(Upsampler):
    """Not linear: has no operator."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        self.asked += 1
        seen = F.interpolate(image.mean(1, keepdim=True), output_size, mode="bilinear")
        return F.interpolate(features, output_size, mode="bilinear").tanh() * seen


class Filming(Bent):
    """Notes the camera that it is given."""

    uses_camera = True
    cameras: list[Camera | None] = []

    def forward(self, image, features, output_size, camera=None):
        self.cameras.append(camera)
        return super().forward(image, features, output_size)


for _method in (Resized, Attending, Bent, Filming):  # named after the class body: known, and not registered
    _method.name = _method.__name__.lower()


class Gallery(Dataset):
    """Samples in memory, the same in every split.

    Attributes:
        samples: What there is.
        asked: How often each was read.
    """

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c", "d")

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Sequence[str] = ("a", "b", "c", "d"),
        other: int | None = None,
    ) -> None:
        super().__init__(None)
        self.samples = list(samples)
        self.classes, self.other_class = tuple(classes), other
        self.asked: Counter[int] = Counter()

    def names(self, split: str) -> list[str]:
        return [sample.name for sample in self.samples]

    def read(self, split: str, index: int) -> Sample:
        self.asked[index] += 1
        return self.samples[index]

    def size(self, split: str, index: int) -> tuple[int, int]:
        return self.samples[index].size

    def fingerprint(self, split: str) -> str:
        return digest(*(part for s in self.samples for part in (s.name, s.image.tolist())))


Gallery.name = "gallery"


class Maps:
    """Low-resolution features in memory, as a `FeatureStore` gives them."""

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.maps = list(maps)

    def __len__(self) -> int:
        return len(self.maps)

    def batch(self, indices: Sequence[int]) -> Tensor:
        chosen = [self.maps[index] for index in indices]
        if len({part.shape for part in chosen}) != 1:
            raise UpbenchError("no batch of features of several sizes")
        return torch.stack(chosen)

    def moments(self) -> Moments:
        vectors = torch.cat([part.double().flatten(1) for part in self.maps], 1)
        return Moments(int(vectors.shape[1]), vectors.sum(1), vectors @ vectors.T)


def protocol(**parameters: Any) -> Protocol:
    """A protocol with some parameters of its own; the toy's square as it is unless it says otherwise. Not
    registered."""
    made: Any = type("Toy", (Protocol,), {"geometry": SquareCrop(SIZE), **parameters})
    made.name = "toy"
    made._check()
    return made()


def samples(count: int = 5) -> tuple[list[Sample], Tensor]:
    """Images of noise and features `[count, C, 6, 6]`: four classes that can be told apart by the sign of the
    first two channels, depth and normals that are functions of the first three."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, CHANNELS, CELLS, CELLS, generator=generator)
    dense = F.interpolate(features, (SIZE, SIZE), mode="bicubic")
    found = [
        Sample(
            name=f"image{i}",
            image=torch.randint(256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
            label=(x[0] > 0).long() + 2 * (x[1] > 0).long(),
            depth=2 + x[0].tanh(),
            normal=F.normalize(x[:3], dim=0),
            camera=Camera(torch.tensor([[20.0 + i, 20.0, 12.0, 12.0]])),
        )
        for i, x in enumerate(dense)
    ]
    return found, features


def split(count: int = 5, rules: Protocol | None = None, **options: Any) -> tuple[SplitImages, Maps]:
    """`samples` as the frames of a split, with their features."""
    found, features = samples(count)
    return SplitImages(Gallery(found), "train", rules or protocol(), stride=4, **options), Maps(
        list(features)
    )


def view(
    method: Upsampler,
    count: int = 5,
    *,
    camera: str = "",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> UpsampledSplit:
    """A method's view of `split`."""
    images, features = split(count)
    call = MethodCall(method, camera=CameraChoice.parse(camera), dtype=dtype)
    return UpsampledSplit(call, images, features, **options)


def trained_on(up: UpsampledSplit) -> TrainingSet:
    """A view as what probes are trained on."""
    return TrainingSet(View(up.images, up), CHANNELS, up.low.moments)  # type: ignore[attr-defined]


def logits(
    up: UpsampledSplit, index: int, weight: Tensor, bias: Tensor | None = None, crop: Crop | None = None
) -> Tensor:
    """`[K, H, W]` a probe's outputs for a frame, or for a rectangle of it."""
    return up.batch([index], None if crop is None else [crop]).project(weight, bias)[0]


def dense_logits(
    up: UpsampledSplit, index: int, weight: Tensor, bias: Tensor, crop: Crop | None = None
) -> Tensor:
    """The same from the C channels of every pixel."""
    whole = torch.einsum("kc,chw->khw", weight, up.batch([index]).dense()[0]) + bias[:, None, None]
    return whole if crop is None else whole[:, crop[0], crop[1]]


def probe(outputs: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, CHANNELS, requires_grad=True), torch.randn(outputs, requires_grad=True)


CROPS = [None, (slice(0, 12), slice(12, 24)), (slice(5, 6), slice(0, 24)), (slice(3, 20), slice(7, 9))]
