"""How a method is called: the one place that knows about normalisation, cameras, backbones and precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from upbench.contracts.backbone import Backbone
from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD, normalize_image
from upbench.contracts.operator import FunctionOperator, Operator, SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler, extras
from upbench.dense.camera import CameraChoice
from upbench.dense.untouched import Untouched
from upbench.errors import UpbenchError

Size = tuple[int, int]

OPERATOR = "the method's operator"
"""What messages call an operator whose method is not at hand."""


class MethodCall:
    """A method, ready to be applied to images in 0..1 and float32 features; its results are float32.

    What it gives is checked to be what was asked for, and what it was given to be unchanged, wherever it is
    called from: here, or by an operator that it made.

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
            UpbenchError: An output of another shape, of numbers that are not real, or on another device; or
                an input that was changed in place.
        """
        with torch.no_grad():
            given = extras(self.method, camera=camera, backbone=self._backbone)
            image, features = self.guidance(image01), features.to(self.dtype)
            inputs = self._untouched(image, features, camera)
            out: Tensor = self.method(image, features, output_size, **given)
            inputs.check()
        shape = (int(features.shape[0]), int(features.shape[1]), *output_size)
        return sound(out, features, shape, self._who).float()

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

        Raises:
            UpbenchError: Something that is no operator, or an input that was changed in place.
        """
        name = "operator" if memory_budget is None else "tile_operator"
        given = extras(self.method, name, camera=camera, backbone=self._backbone)
        if memory_budget is not None:
            given["memory_budget"] = memory_budget
        with torch.no_grad():
            image, features = self.guidance(image01), features.to(self.dtype)
            inputs = self._untouched(image, features, camera)
            made: Operator | None = getattr(self.method, name)(image, features, output_size, **given)
            inputs.check()
        if made is None:
            return None
        if not isinstance(made, Operator):
            raise UpbenchError(f"{self._who}: its {name}() returns a {type(made).__name__}, not an Operator")
        made = self._checked(made, inputs)
        return made if self.dtype == torch.float32 else made.to(torch.float32)

    @property
    def _who(self) -> str:
        return f"method '{getattr(self.method, 'name', type(self.method).__name__)}'"

    def _untouched(self, image: Tensor, features: Tensor, camera: Camera | None) -> Untouched:
        intrinsics, pose = (None, None) if camera is None else (camera.intrinsics, camera.pose)
        return Untouched(self._who, image=image, features=features, camera=intrinsics, camera_pose=pose)

    def _checked(self, made: Operator, inputs: Untouched) -> Operator:
        """An operator that looks, each time that it calls the method, at what this was given and gives."""
        if isinstance(made, SourcedOperator):
            return SourcedOperator(made.sources, self._checked(made.operator, inputs))
        if not isinstance(made, FunctionOperator):
            return made  # it calls no method; its results are looked at where they are used
        function, size, who = made.function, made.full_size, self._who

        def checked(values: Tensor) -> Tensor:
            own = Untouched(who, features=values)
            out = function(values)
            own.check()
            inputs.check()
            return sound(out, values, (*values.shape[:2], *size), who)

        return FunctionOperator(checked, size, made.window, made.held)

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
        return self.camera.apply(camera.to(self.device, copy=True))

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


def sound(out: Tensor, given: Tensor, shape: Sequence[int], who: str) -> Tensor:
    """An output, if it is what it has to be: real numbers of a shape, on the device of what was given.

    Args:
        out: Whatever was returned.
        given: What it was made from.
        shape: Of the output.
        who: Returned it, for messages.

    Raises:
        UpbenchError: It is something else.
    """
    if not isinstance(out, Tensor):
        raise UpbenchError(f"{who} returns a {type(out).__name__} where a tensor was asked for")
    if type(out) not in (Tensor, Parameter, type(given)):  # what it means beyond its numbers would be lost
        raise UpbenchError(
            f"{who} returns a {type(out).__name__} where a plain tensor was asked for; "
            "as_subclass(torch.Tensor) makes one"
        )
    if not out.is_floating_point() or out.layout != torch.strided:
        kind = out.dtype if out.layout == torch.strided else out.layout
        raise UpbenchError(f"{who} returns {kind} where floating-point numbers were asked for")
    if out.shape != tuple(shape):
        raise UpbenchError(f"{who} returns {list(out.shape)} where {list(shape)} was asked for")
    if out.device != given.device:
        raise UpbenchError(f"{who} returns a tensor on {out.device}, its features are on {given.device}")
    return out


def resized_guidance(image01: Tensor, size: Size) -> Tensor:
    """`[B, 3, h, w]` at another size: bilinear without antialiasing, as AnyUp's and NAF's loaders do."""
    if tuple(image01.shape[-2:]) == size:
        return image01
    return F.interpolate(image01, size, mode="bilinear", align_corners=False)
