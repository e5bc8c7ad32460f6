"""What datasets give: images as they are stored, with their ground truth and their cameras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upbench.errors import UpbenchError

IGNORE = 255
"""Label of pixels that count nowhere."""


@dataclass(frozen=True)
class Camera:
    """Pinhole cameras of a batch of images.

    Attributes:
        intrinsics: `[B, 4]` fx, fy, cx, cy in pixels of the image; pixel (i, j) has its centre at
            (i + 0.5, j + 0.5).
        pose: `[B, 4, 4]` camera-to-world, or None for the identity.
    """

    intrinsics: Tensor
    pose: Tensor | None = None

    def __post_init__(self) -> None:
        if self.intrinsics.ndim != 2 or self.intrinsics.shape[1] != 4:
            raise UpbenchError(f"camera intrinsics must be [B, 4], got {list(self.intrinsics.shape)}")
        expected = (self.intrinsics.shape[0], 4, 4)
        if self.pose is not None and tuple(self.pose.shape) != expected:
            raise UpbenchError(f"camera pose must be {list(expected)}, got {list(self.pose.shape)}")

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
