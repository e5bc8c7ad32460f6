"""Methods in half precision, inside a world in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upbench.contracts.operator import Operator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler


class _InDtype(Upsampler):
    """A method that works in another dtype inside, and in float32 to the outside."""

    def __init__(self, method: Upsampler, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.method = method.to(dtype)
        self.dtype = dtype
        self.__dict__.update(name=method.name, uses_camera=method.uses_camera)

    def normalize(self, image01: Tensor) -> Tensor:
        return self.method.normalize(image01)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int], **camera: Any) -> Tensor:
        out: Tensor = self.method(self._image(image), features.to(self.dtype), output_size, **camera)
        return out.to(features.dtype)

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Operator | None:
        operator = self.method.operator(self._image(image), features.to(self.dtype), output_size, camera)
        return operator if operator is None else operator.to(torch.float32)

    def _image(self, image: Tensor) -> Tensor:
        return image if self.method.precise_image else image.to(self.dtype)


def in_dtype(method: Upsampler, dtype: torch.dtype) -> Upsampler:
    """The method itself for float32, else a module that runs it in `dtype` on float32 inputs and outputs."""
    return method if dtype == torch.float32 else _InDtype(method, dtype).eval()
