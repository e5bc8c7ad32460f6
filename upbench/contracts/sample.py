"""What datasets give: images as they are stored, with their ground truth and their cameras."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upbench.errors import UpbenchError

IGNORE = 255
"""Label of pixels that count nowhere."""
LENGTH_ERROR = 0.02
"""By how much a normal's length may differ from 1: twice what a byte for each coordinate costs."""


@dataclass(frozen=True)
class Camera:
    """Pinhole cameras of a batch of images.

    Attributes:
        intrinsics: `[B, 4]` fx, fy, cx, cy in pixels of the image; pixel (i, j) has its centre at
            (i + 0.5, j + 0.5).
        pose: `[B, 4, 4]` camera-to-world, or None for the identity.

    Raises:
        UpbenchError: Another shape, a number that is not finite, or a focal length that is not positive.
    """

    intrinsics: Tensor
    pose: Tensor | None = None

    def __post_init__(self) -> None:
        if self.intrinsics.ndim != 2 or self.intrinsics.shape[1] != 4:
            raise UpbenchError(f"camera intrinsics must be [B, 4], got {list(self.intrinsics.shape)}")
        expected = (self.intrinsics.shape[0], 4, 4)
        if self.pose is not None and tuple(self.pose.shape) != expected:
            raise UpbenchError(f"camera pose must be {list(expected)}, got {list(self.pose.shape)}")
        self._check_values()

    def _check_values(self) -> None:
        """Looks at the numbers where that is free; on another device they came from here (`to`)."""
        if self.intrinsics.device.type != "cpu":
            return
        good = self.intrinsics.isfinite().all(1) & (self.intrinsics[:, :2] > 0).all(1)
        if not good.all():
            first = ", ".join(f"{value:g}" for value in self.intrinsics[~good][0].tolist())
            raise UpbenchError(
                "camera intrinsics must be finite numbers with positive focal lengths, got "
                f"fx, fy, cx, cy = {first}"
            )
        if self.pose is not None and not self.pose.isfinite().all():
            raise UpbenchError("camera pose must have finite numbers")

    def to(self, *args: Any, **kwargs: Any) -> Camera:
        """The same cameras on another device or in another dtype (arguments as `Tensor.to`)."""
        pose = None if self.pose is None else self.pose.to(*args, **kwargs)
        return Camera(self.intrinsics.to(*args, **kwargs), pose)


@dataclass(frozen=True)
class Sample:
    """One image as it is stored, with its ground truth; what a dataset does not have is None.

    Nothing is resized: a protocol's `Geometry` makes of it what a backbone sees and what is scored.

    Attributes:
        name: Identifies the image within its split.
        image: `[3, H, W]` uint8 RGB, upright.
        valid: `[H, W]` bool; pixels outside it count nowhere. None where all count.
        label: `[H, W]` class index of any integer dtype, 255 ignored.
        depth: `[H, W]` float32, metres along the optical axis; 0 where unknown.
        normal: `[3, H, W]` float32 unit vectors in camera space (x right, y down, z forward), facing the
            viewer.
        camera: In pixels of `image`, batch of one.
    """

    name: str
    image: Tensor
    valid: Tensor | None = None
    label: Tensor | None = None
    depth: Tensor | None = None
    normal: Tensor | None = None
    camera: Camera | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])

    def check(self) -> None:
        """Looks at every field once: what is wrong here would be a wrong number later.

        Raises:
            UpbenchError: A shape or type other than the above, depth that is negative or not finite, normals
                that are not finite or neither of length 1 nor 0, several cameras. It names the sample.
        """
        if fault := self._fault():
            raise UpbenchError(f"image '{self.name}': {fault}")

    def _fault(self) -> str:
        """What is wrong with it, in words; "" if nothing is."""
        if self.image.ndim != 3 or self.image.shape[0] != 3 or self.image.dtype != torch.uint8:
            return f"its pixels must be uint8 [3, H, W], got {_told(self.image)}"
        if not self.image.numel():
            return "it has no pixels"
        for name, lead in (("valid", 0), ("label", 0), ("depth", 0), ("normal", 1)):
            values: Tensor | None = getattr(self, name)
            if values is None:
                continue
            floats = name in ("depth", "normal")
            fits = values.dtype == torch.bool if name == "valid" else values.is_floating_point() == floats
            shape = (*(3,) * lead, *self.size)
            if tuple(values.shape) != shape or not fits or values.is_complex():
                kind = "bool" if name == "valid" else "floats" if floats else "integers"
                return f"its {name} must be {kind} {list(shape)}, got {_told(values)}"
        if self.camera is not None and len(self.camera.intrinsics) != 1:
            return f"it must have one camera, got {len(self.camera.intrinsics)}"
        return self._depth_fault() or self._normal_fault()

    def _depth_fault(self) -> str:
        if self.depth is None:
            return ""
        least, most = (float(value) for value in self.depth.aminmax())
        if least >= 0 and most < math.inf:  # neither holds for NaN
            return ""
        return f"its depth goes from {least:g} to {most:g}: it must be finite, and 0 where it is unknown"

    def _normal_fault(self) -> str:
        if self.normal is None:
            return ""
        x, y, z = self.normal.float().unbind()
        squares = x * x + y * y + z * z
        least, most = (float(value) for value in squares.masked_fill_(squares == 0, 1).aminmax())
        if abs(least - 1) <= 2 * LENGTH_ERROR and abs(most - 1) <= 2 * LENGTH_ERROR:  # neither holds for NaN
            return ""
        lengths = f"from {math.sqrt(least):g} to {math.sqrt(most):g}"
        return f"its normals have lengths {lengths}: they must be 1, and 0 where they are unknown"


def _told(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


@dataclass(frozen=True)
class Framed:
    """What a `Geometry` makes of a `Sample`: the image that is seen, and the ground truth that is scored.

    The two may differ in size: a protocol can score at the size of the output, of the features, or of the
    original.

    Attributes:
        name: As the sample's; of one of several windows, with its number.
        image: `[3, h, w]` float32 RGB in 0..1.
        valid: `[H, W]` bool; pixels outside it count nowhere.
        label: `[H, W]` int64 class index, 255 ignored.
        depth: `[H, W]` float32 metres; 0 where unknown.
        normal: `[3, H, W]` float32 unit vectors in camera space.
        camera: In pixels of `image`, batch of one.
    """

    name: str
    image: Tensor
    valid: Tensor
    label: Tensor | None = None
    depth: Tensor | None = None
    normal: Tensor | None = None
    camera: Camera | None = None
