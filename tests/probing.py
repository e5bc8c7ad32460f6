"""Small methods, a split and a probe, for tests of views and of probes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Camera, Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense.view import Upsampled
from upbench.ops.window.attention import window_operator
from upbench.ops.window.tables import neighbourhood_table

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
        queries = F.interpolate(image, output_size).repeat(1, 2, 1, 1) * torch.arange(1, 7).view(1, 6, 1, 1)
        keys = F.adaptive_avg_pool2d(image, features.shape[-2:]).repeat(1, 2, 1, 1)
        tables = (neighbourhood_table(n, c, 3) for n, c in zip(output_size, features.shape[-2:], strict=True))
        return window_operator(queries, keys, *tables, heads=2)


class Bent(Upsampler):
    """Not linear: has no operator."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        self.asked += 1
        return F.interpolate(features, output_size, mode="bilinear").tanh() * image.mean(1, keepdim=True)


class Filming(Bent):
    """Notes the camera that it is given."""

    uses_camera = True
    cameras: list[Camera | None] = []

    def forward(self, image, features, output_size, camera=None):
        self.cameras.append(camera)
        return super().forward(image, features, output_size)


class Toy(Dataset):
    """Four classes that can be told apart by the sign of the first two channels."""

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c", "d")


def split(count: int = 5) -> tuple[list[Sample], Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, CHANNELS, CELLS, CELLS, generator=generator)
    dense = F.interpolate(features, (SIZE, SIZE), mode="bicubic")
    samples = [
        Sample(
            name=f"image{i}",
            image=torch.rand(3, SIZE, SIZE, generator=generator),
            valid=torch.ones(SIZE, SIZE, dtype=torch.bool),
            label=(x[0] > 0).long() + 2 * (x[1] > 0).long(),
            depth=2 + x[0].tanh(),
            normal=F.normalize(x[:3], dim=0),
            camera=Camera(torch.tensor([[20.0 + i, 20.0, 12.0, 12.0]])),
        )
        for i, x in enumerate(dense)
    ]
    return samples, features


def view(method: Upsampler, count: int = 5, **options) -> Upsampled:
    samples, features = split(count)
    return Upsampled(method.eval(), samples, features, (SIZE, SIZE), **options)


def probe(outputs: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, CHANNELS, requires_grad=True), torch.randn(outputs, requires_grad=True)


CROPS = [None, (slice(0, 12), slice(12, 24)), (slice(5, 6), slice(0, 24)), (slice(3, 20), slice(7, 9))]
