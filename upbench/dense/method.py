"""How a method is called: the one place that knows about normalisation, cameras, backbones and precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD, normalize_image
from upbench.contracts.operator import Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler, extras
from upbench.dense.camera import CameraChoice
from upbench.errors import UpbenchError

Size = tuple[int, int]


class MethodCall:
    """A method, ready to be applied to images in 0..1 and float32 features; its results are float32.

    Attributes:
        method: In eval mode, on `device`, in `dtype`.
        device: Where it is.
        dtype: What it computes in.
        camera: Which cameras it is given; none to methods that use none.
    """

    def __init__(
        self,
        method: Upsampler,
        *,
        backbone: Backbone | None = None,
        camera: CameraChoice | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        statistics: str = "method",
    ) -> None:
        """Takes a method and what it is to be called with.

        Args:
            method: On `device`; it is cast to `dtype`.
            backbone: For methods that run it themselves; stays in float32.
            camera: Which cameras methods that use one are given; none by default.
            device: Where to compute.
            dtype: Of the method's arithmetic.
            statistics: How the image is normalised: "method" (its own), "backbone", "imagenet" or "none".

        Raises:
            UpbenchError: A method that runs the backbone and is given none.
        """
        if method.uses_backbone and backbone is None:
            raise UpbenchError(f"method '{method.name}' runs the backbone itself and is given none")
        self.device = torch.device(device)
        self.dtype = dtype
        self.method = method.to(dtype).eval()
        self.camera = camera if camera is not None and method.uses_camera else CameraChoice()
        self._backbone = backbone if method.uses_backbone else None
        self._mean, self._std = self._statistics(statistics, backbone)

    def forward(
        self, image01: Tensor, features: Tensor, output_size: Size, camera: Camera | None = None
    ) -> Tensor:
        """`[B, 3, h_img, w_img]` in 0..1 and `[B, C, h, w]` to `[B, C, H, W]` float32, without gradients.

        Raises:
            UpbenchError: An output of another shape.
        """
        with torch.no_grad():
            given = extras(self.method, camera=camera, backbone=self._backbone)
            out: Tensor = self.method(self.guidance(image01), features.to(self.dtype), output_size, **given)
        expected = (int(features.shape[0]), int(features.shape[1]), *output_size)
        if tuple(out.shape) != expected:
            raise UpbenchError(
                f"method '{self.method.name}' returns {list(out.shape)} where {list(expected)} was asked for"
            )
        return out.float()

    def operator(
        self,
        image01: Tensor,
        features: Tensor,
        output_size: Size,
        camera: Camera | None = None,
        memory_budget: int | None = None,
    ) -> Operator | None:
        """The same as a linear operator in float32, or None where the method has none.

        Args: as `forward`; memory_budget: bytes that it may hold, for one whose crops are what is computed.
        """
        name = "operator" if memory_budget is None else "tile_operator"
        given = extras(self.method, name, camera=camera, backbone=self._backbone)
        if memory_budget is not None:
            given["memory_budget"] = memory_budget
        with torch.no_grad():
            function = getattr(self.method, name)
            made: Operator | None = function(
                self.guidance(image01), features.to(self.dtype), output_size, **given
            )
        return made if made is None or self.dtype == torch.float32 else made.to(torch.float32)

    def guidance(self, image01: Tensor) -> Tensor:
        """The image as the method wants it."""
        if self._mean is None or self._std is None:
            image = self.method.normalize(image01)
        else:
            image = normalize_image(image01, self._mean, self._std)
        return image if self.method.precise_image else image.to(self.dtype)

    def given_camera(self, name: str, camera: Camera | None) -> Camera | None:
        """What the method is given where a frame has this camera.

        Raises:
            UpbenchError: The frame has none, and the dataset's was asked for.
        """
        if not self.camera.dataset:
            return None
        if camera is None:
            raise UpbenchError(f"image '{name}' has no camera")
        return self.camera.apply(camera.to(self.device))

    def _statistics(self, choice: str, backbone: Backbone | None) -> tuple[Any, Any]:
        if choice == "imagenet":
            return IMAGENET_MEAN, IMAGENET_STD
        if choice == "none":
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if choice == "backbone":
            if backbone is None:
                raise UpbenchError("the protocol normalises the guidance as the backbone does: give one")
            return backbone.mean, backbone.std
        return None, None


def resized_guidance(image01: Tensor, size: Size) -> Tensor:
    """`[B, 3, h, w]` at another size: bilinear without antialiasing, as AnyUp's and NAF's loaders do."""
    if tuple(image01.shape[-2:]) == size:
        return image01
    return F.interpolate(image01, size, mode="bilinear", align_corners=False)
