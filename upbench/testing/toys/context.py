"""A context that any task can be evaluated in, in seconds: nothing is read, downloaded or cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.sample import Camera
from upbench.contracts.task import Context
from upbench.contracts.upsampler import Upsampler
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.features.images import SplitImages
from upbench.features.moments import Moments
from upbench.ops.resample import interpolation_operator, resize
from upbench.ops.separable import SeparableOperator
from upbench.protocols.geometry import NativeAspect
from upbench.system.progress import Bar
from upbench.testing.toys.samples import TOYS

CHANNELS = 8
STRIDE = 4

T = TypeVar("T")


class ToyProtocol(Protocol):
    """Images as they are, cut to whole patches; a short training, the same for all tasks. Not registered."""

    geometry = NativeAspect()
    recipe = Recipe(epochs=6, batch_size=2, lr=0.03)
    task_recipes = False


ToyProtocol.name = "toy"  # after the class body, so that the registry does not see it


class ToyUpsampler(Upsampler):
    """Bilinear interpolation, with an operator. Not registered."""

    linear = True
    guided = False

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return resize(features, output_size, "bilinear")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`."""
        return interpolation_operator(features, output_size, "bilinear")


ToyUpsampler.name = "toy"


def toy_features(image: Tensor) -> Tensor:
    """A frozen backbone of a kind: `[B, 3, h, w]` in 0..1 to `[B, 8, h / 4, w / 4]`, colour and place of each
    patch, mixed."""
    patches = F.avg_pool2d(image, STRIDE, ceil_mode=True)
    height, width = patches.shape[-2:]
    y, x = (torch.linspace(-1, 1, n, device=image.device) for n in (height, width))
    place = torch.stack([y[:, None].expand(height, width), x.expand(height, width)])
    inputs = torch.cat([patches - 0.5, place.expand(len(image), -1, -1, -1)], 1)
    mix = torch.randn(CHANNELS, 5, generator=torch.Generator().manual_seed(0)).to(image.device)
    return torch.tanh(torch.einsum("kc,bchw->bkhw", mix, inputs))


class ToyFeatures:
    """`toy_features` of a split, as a store of features gives them."""

    def __init__(self, images: SplitImages, device: torch.device) -> None:
        """Takes the frames.

        Args:
            images: Of the split.
            device: Where the features are wanted.
        """
        self.names = images.names
        self._of_each = [toy_features(images.image(i)[None]).to(device) for i in range(len(images))]

    def __len__(self) -> int:
        return len(self._of_each)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """`[B, 8, h, w]` float32.

        Raises:
            UpbenchError: Frames whose features differ in size.
        """
        chosen = [self._of_each[i] for i in indices]
        if len({one.shape for one in chosen}) > 1:
            raise UpbenchError("features of these frames differ in size")
        return torch.cat(chosen)

    def moments(self) -> Moments:
        """Sums over all positions of the split."""
        rows = torch.cat([one[0].flatten(1).T for one in self._of_each]).double()
        return Moments(len(rows), rows.sum(0), rows.T @ rows)


class ToyContext(Context):
    """Toy images, toy features, and a method; the real engines between them.

    Attributes: as `Context`; call: the method, ready to be applied.
    """

    def __init__(
        self,
        dataset: Dataset | None = None,
        protocol: Protocol | None = None,
        *,
        method: Upsampler | None = None,
        content: str = "images",
        seeds: tuple[int, ...] = (0, 1),
        device: torch.device | str = "cpu",
    ) -> None:
        """Takes what differs from the toys.

        Args:
            dataset: Any of small images; a toy of `content` by default.
            protocol: `ToyProtocol` by default.
            method: For 8 channels; bilinear interpolation by default.
            content: Of the toy dataset: "images", "video" or "pairs".
            seeds: Of whatever is drawn at random.
            device: Where to compute.
        """
        self.dataset = TOYS[content]() if dataset is None else dataset
        self.protocol = ToyProtocol() if protocol is None else protocol
        self.seeds = seeds
        self.device = torch.device(device)
        self.channels = CHANNELS
        method = ToyUpsampler(CHANNELS) if method is None else method
        statistics = self.protocol.guidance_statistics
        self.call = MethodCall(method.to(self.device), device=self.device, statistics=statistics)
        self._held: dict[object, Any] = {}

    def samples(self, split: str, mirrored: bool = False) -> SplitImages:
        """See `Context`."""
        return self._once(
            ("samples", split, mirrored),
            lambda: SplitImages(self.dataset, split, self.protocol, stride=STRIDE, mirrored=mirrored),
        )

    def features(self, split: str, mirrored: bool = False, token: bool = False) -> ToyFeatures:
        """See `Context`."""
        return self._once(
            ("features", split, mirrored),
            lambda: ToyFeatures(self.samples(split, mirrored), self.device),
        )

    def dense(self, split: str, mirrored: bool = False) -> UpsampledSplit:
        """See `Context`."""
        return self._once(
            ("dense", split, mirrored),
            lambda: UpsampledSplit(
                self.call,
                self.samples(split, mirrored),
                self.features(split, mirrored),
                guidance_size=self.protocol.guidance_size,
                title=split,
            ),
        )

    def upsample(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Context`."""
        return self.call.forward(image, features, output_size)

    def encode(self, image: Tensor) -> Tensor:
        """See `Context`."""
        return toy_features(image)

    def recipe(self, settings: Mapping[str, Any] | None = None) -> Recipe:
        """See `Context`."""
        return self.protocol.recipe_for(settings, dataset=self.dataset.name)

    def shared(self, key: object, make: Callable[[], T]) -> T:
        """See `Context`."""
        return self._once(("shared", key), make)

    def of_method(self, key: object, make: Callable[[], T]) -> T:
        """See `Context`."""
        return self._once(("method", key), make)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """See `Context`; shows nothing."""
        yield Bar(title, total)

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._held:
            self._held[key] = make()
        return cast(T, self._held[key])
