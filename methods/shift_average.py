"""Shift average: the backbone itself on copies of the image that are shifted by parts of a patch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.operator import SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError, unknown
from upbench.layers.convolutions import grid_of
from upbench.ops.placement import placement_matrix
from upbench.ops.separable import SeparableOperator

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone

MODES = ("average", "interleave")


class ShiftAverage(Upsampler):
    """Runs the backbone on `shifts` x `shifts` copies of the image, shifted by parts of its stride.

    Along each axis copy k is shifted by d_k = (k - (n - 1) / 2) s / n pixels, rounded, with n shifts and
    stride s; what comes in at the border is the image, mirrored. Its feature i describes the pixels from
    i s + d_k to (i + 1) s + d_k and is put at their centre.

    * "average": the maps are interpolated bilinearly, each from where its features stand, and averaged.
      Docherty et al. do this with nearest-neighbour interpolation and with flips besides.
    * "interleave": the features of all copies are one grid, n times as fine, interpolated bilinearly:
      sharper, and noisier.

    At `shifts=1` these are the backbone's features, interpolated.
    """

    name = "shift_average"
    title = "Shift average"
    paper = (
        "After Docherty et al., Upsampling DINOv2 Features for Unsupervised Vision Tasks and Weakly "
        "Supervised Materials Segmentation, 2024, arXiv 2410.19836"
    )
    year = 2024
    uses_backbone = True
    precise_image = True

    def __init__(self, channels: int = 384, *, shifts: int = 2, mode: str = "average") -> None:
        """Args: channels: C; shifts: Copies along each axis; mode: "average" or "interleave".

        Raises:
            UpbenchError: No shift, or an unknown mode.
        """
        super().__init__(channels)
        if shifts < 1:
            raise UpbenchError(f"shift_average: shifts {shifts} is below 1")
        if mode not in MODES:
            raise unknown("mode of method 'shift_average'", mode, MODES)
        self.shifts = shifts
        self.mode = mode

    def forward(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        backbone: Backbone | None = None,
    ) -> Tensor:
        """See `Upsampler.forward`; of `features` only the grid counts."""
        operator = self.operator(image, features, output_size, backbone=backbone)
        return operator(operator.takes(features).unsqueeze(1))

    def operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
    ) -> SourcedOperator:
        """See `Upsampler.operator`: the features of all copies, interleaved, and their average."""
        backbone = self.given(backbone)
        stride = backbone.stride
        h, w = grid_of(features)
        image01 = backbone.resized(self.denormalize(image), (h * stride, w * stride))
        offsets = self.offsets(stride)
        margin = max(map(abs, offsets))
        padded = F.pad(image01, (margin,) * 4, mode="reflect")
        dense: Tensor | None = None
        for k, down in enumerate(offsets):
            for m, right in enumerate(offsets):
                top, left = margin + down, margin + right
                shifted = backbone(padded[..., top : top + h * stride, left : left + w * stride])
                if dense is None:
                    dense = shifted.new_empty(*shifted.shape[:2], h * self.shifts, w * self.shifts)
                dense[..., k :: self.shifts, m :: self.shifts] = shifted
        assert dense is not None
        rows, cols = (
            self._weights(n, stride, out, image.device) for n, out in zip((h, w), output_size, strict=True)
        )
        return SourcedOperator(dense, SeparableOperator(rows, cols))

    def offsets(self, stride: int) -> list[int]:
        """d_k: by how many pixels the crop of each copy lies further down (or right), ascending."""
        n = self.shifts
        return [math.floor((k - (n - 1) / 2) * stride / n + 0.5) for k in range(n)]

    def _weights(self, count: int, stride: int, output_size: int, device: torch.device) -> Tensor:
        """`[output_size, count * shifts]`: one axis of the operator, on interleaved features."""
        length = count * stride
        centres = [(i + 0.5) * stride + offset for i in range(count) for offset in self.offsets(stride)]
        if self.mode == "interleave":
            return placement_matrix(centres, length, output_size, device)
        weights = torch.zeros(output_size, len(centres), device=device)
        for k in range(self.shifts):
            weights[:, k :: self.shifts] = placement_matrix(
                centres[k :: self.shifts], length, output_size, device
            )
        return weights / self.shifts
