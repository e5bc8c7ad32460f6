"""A method under test with inputs for it: what the checks of `upbench.testing.methods` are called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upbench.contracts.operator import Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Setting, Upsampler, extras
from upbench.testing.checks import NotApplicable
from upbench.testing.toys.backbone import tiny_backbone

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

Size = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call: (height, width) of the image, the features and the output."""

    image: Size
    features: Size
    output: Size


GEOMETRIES: dict[str, Geometry] = {
    "square": Geometry((32, 32), (8, 8), (32, 32)),
    "not square": Geometry((24, 40), (6, 10), (24, 40)),
    "ratio not an integer": Geometry((30, 44), (7, 9), (29, 41)),
    "larger than the image": Geometry((24, 32), (6, 8), (40, 56)),
    "smaller than the image": Geometry((32, 40), (8, 10), (16, 12)),
    "smaller than the features": Geometry((32, 40), (8, 10), (5, 7)),
    "few features": Geometry((12, 16), (3, 4), (12, 16)),
    "size of the features": Geometry((24, 40), (6, 10), (6, 10)),
    "larger and smaller": Geometry((24, 40), (6, 10), (20, 4)),
    "one column": Geometry((24, 40), (6, 10), (9, 1)),
    "one pixel": Geometry((24, 40), (6, 10), (1, 1)),
    "native ratio": Geometry((20, 16), (5, 4), (0, 0)),  # the output is the method's
}


@dataclass
class MethodCase:
    """A method under test, and inputs for it.

    Attributes:
        cls: Its class.
        options: Options of its constructor, beside those that it declares for contract tests
            (`preset_options`).
        channels: C of the features.
        device: Where the checks run.
        rounding: Error that low precision may have, relative to the norm of the float32 output.
    """

    cls: type[Upsampler]
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: int = 16
    device: str = "cpu"
    rounding: float = 0.1

    def __post_init__(self) -> None:
        self.options = {**self.cls.preset_options.get("contract", {}), **self.options}

    @cached_property
    def method(self) -> Upsampler:
        """With random weights from a fixed seed, in eval mode. Checks must not change it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.cls.build(channels=self.channels, **self.options).eval().to(self.device)

    @cached_property
    def backbone(self) -> Backbone | None:
        """A tiny one, for a method that runs the backbone."""
        return self.new_backbone() if self.cls.uses_backbone else None

    def new_backbone(self) -> Backbone:
        """An equal of `backbone` that no check has seen; its stride is that of most geometries."""
        return tiny_backbone(self.channels, 4).to(self.device)

    def call(
        self,
        image: Tensor,
        features: Tensor,
        output_size: Size,
        *,
        method: Upsampler | None = None,
        camera: Camera | None = None,
        backbone: Backbone | None = None,
    ) -> Tensor:
        """`forward` of the method (or of a copy of it), with what else it takes.

        Args:
            image: As for `Upsampler.forward`, like the two that follow.
            features: See there.
            output_size: See there.
            method: `self.method` where None.
            camera: For methods that use one.
            backbone: For methods that run it; `self.backbone` where None.
        """
        method = self.method if method is None else method
        given = extras(method, camera=camera, backbone=self.backbone if backbone is None else backbone)
        out: Tensor = method(image, features, output_size, **given)
        return out

    def operator(
        self, image: Tensor, features: Tensor, output_size: Size, *, camera: Camera | None = None
    ) -> Operator | None:
        """The method's operator; arguments as for `call`."""
        given = extras(self.method, "operator", camera=camera, backbone=self.backbone)
        return self.method.operator(image, features, output_size, **given)

    def geometry(self, name: str) -> Geometry:
        """A geometry that the method can do.

        Raises:
            NotApplicable: It says that it cannot do this one.
        """
        geometry = GEOMETRIES[name]
        if name == "native ratio":
            ratio = self.cls.native_ratio
            if ratio is None:
                raise NotApplicable("has no ratio of its own")
            h, w = geometry.features
            geometry = Geometry(geometry.image, (h, w), (ratio * h, ratio * w))
        if reason := self.reason(geometry):
            raise NotApplicable(reason)
        return geometry

    def reason(self, geometry: Geometry) -> str | None:
        """Why the method cannot do this, by its own words; None where it can."""
        return self.cls.skip_reason(
            Setting(
                backbone="noise",
                channels=self.channels,
                stride=max(1, geometry.image[0] // geometry.features[0]),
                image_size=geometry.image,
                feature_size=geometry.features,
                output_size=geometry.output,
                weights="none",
                device=self.device,
                patch_size=None if self.backbone is None else self.backbone.patch_size,
            )
        )

    def inputs(self, geometry: Geometry, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A smooth image, normalised for the method, and features of noise."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, 3, 4, 4, generator=generator)
        image01 = torch.nn.functional.interpolate(coarse, geometry.image, mode="bicubic").clamp(0, 1)
        features = torch.randn(batch, self.channels, *geometry.features, generator=generator)
        return self.method.normalize(image01).to(self.device), features.to(self.device)

    def each(self) -> Iterator[tuple[str, Geometry]]:
        """The geometries that the method can do."""
        for name in GEOMETRIES:
            try:
                yield name, self.geometry(name)
            except NotApplicable:
                continue
