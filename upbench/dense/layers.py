"""A method's features of several of the backbone's blocks, each block's map upsampled by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upbench.contracts.task import Crop, DenseBatch, DenseFeatures
from upbench.dense.view import Batch, LowResolution, UpsampledSplit
from upbench.errors import UpbenchError


class LayerOf:
    """One block's part of features of several blocks (`Backbone.with_layers`)."""

    def __init__(self, features: LowResolution, place: int, count: int) -> None:
        """Args: features: Of all blocks; place: Which of them, from 0; count: How many there are."""
        self.features, self.place, self.count = features, place, count

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """`[B, C, h, w]` float32 on the device."""
        return self.features.batch(indices).chunk(self.count, 1)[self.place]


class LayeredSplit(DenseFeatures):
    """The features of L blocks: `[B, L * C, H, W]`, the earliest block's first.

    Attributes:
        layers: The method's view of each.
    """

    def __init__(self, layers: Sequence[UpsampledSplit]) -> None:
        self.layers = list(layers)

    def __len__(self) -> int:
        return len(self.layers[0])

    def output_size(self, index: int) -> tuple[int, int]:
        """See `DenseFeatures`."""
        return self.layers[0].output_size(index)

    def batch(self, indices: Sequence[int], crops: Sequence[Crop] | None = None) -> LayeredBatch:
        """See `DenseFeatures`."""
        return LayeredBatch([layer.batch(indices, crops) for layer in self.layers])

    def explain(self, indices: Sequence[int]) -> UpbenchError | None:
        """Why outputs for these frames are not finite, if it is the method's doing."""
        found = (layer.explain(indices) for layer in self.layers)
        return next((error for error in found if error is not None), None)


class LayeredBatch(DenseBatch):
    """See `DenseBatch`."""

    def __init__(self, layers: Sequence[Batch]) -> None:
        self.layers = list(layers)

    def __len__(self) -> int:
        return len(self.layers[0])

    def project(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `DenseBatch`: the sum of what each block's channels give."""
        first, *rest = zip(self.layers, weight.chunk(len(self.layers), -1), strict=True)
        made = first[0].project(first[1], bias)
        for layer, part in rest:
            made = made + layer.project(part)
        return made

    def dense(self) -> Tensor:
        """See `DenseBatch`."""
        return torch.cat([layer.dense() for layer in self.layers], 1)

    def at(self, points: Tensor) -> Tensor:
        """See `DenseBatch`."""
        return torch.cat([layer.at(points) for layer in self.layers], 1)
