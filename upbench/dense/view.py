"""A method's view of one split: per-pixel outputs of any linear probe, at the least cost the method
allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upbench.contracts.operator import FunctionOperator, Operator
from upbench.contracts.sample import Camera, Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense.camera import CameraChoice
from upbench.dense.spill import Store
from upbench.errors import UpbenchError
from upbench.ops.operator import project
from upbench.system.progress import track

DEFAULT_BUDGET = 3_000_000_000
"""Bytes that one split's kept operators or dense maps may take."""

_STRIPS = 16

Crop = tuple[slice, slice]


class Upsampled:
    """The upsampled features of a split's images, never all in memory at once.

    Where the method has a linear `Operator` for an image, a probe is applied to the low-resolution
    features first
    and its K outputs are upsampled instead of the C channels: the same result (see
    `upbench.ops.operator`), K / C of the cost. Otherwise the dense features are computed and the probe is
    applied to them.

    Operators (dense maps) are computed when first asked for, and kept (see `upbench.dense.spill`): as they
    are where the whole split fits `budget`, else in float16. One object serves every task and every seed of a
    method on a split.

    Attributes:
        features: `[N, C, h, w]` float32 low-resolution features, on `device`.
        output_size: (H, W).
        device: Where everything is computed.
    """

    def __init__(
        self,
        method: Upsampler,
        samples: Sequence[Sample],
        features: Tensor,
        output_size: tuple[int, int],
        *,
        camera: str | None = None,
        device: torch.device | str = "cpu",
        budget: int = DEFAULT_BUDGET,
    ) -> None:
        """Takes a method and what it is applied to.

        Args:
            method: In eval mode, on `device`.
            samples: N samples, whose images (and cameras) guide the method.
            features: `[N, C, h, w]`, of the same images in the same order.
            output_size: (H, W).
            camera: What methods that use a camera are given, as `CameraChoice.parse` reads it; None for none.
            device: Where to compute.
            budget: Bytes of memory to keep operators and dense maps in.

        Raises:
            UpbenchError: Counts that do not match, features that are not finite, or an unknown `camera`.
        """
        if features.ndim != 4 or len(samples) != features.shape[0]:
            raise UpbenchError(f"{len(samples)} images do not go with features {list(features.shape)}")
        choice = CameraChoice.parse(camera or "")
        if not bool(features.isfinite().all()):
            bad = int((~features.isfinite().flatten(1).all(1)).nonzero()[0])
            raise UpbenchError(f"features of image '{samples[bad].name}' are not finite")
        self.method = method
        self.samples = samples
        self.device = torch.device(device)
        self.features = features.to(self.device, torch.float32)
        self.output_size = output_size
        self.camera = choice if method.uses_camera else CameraChoice()
        self._store = Store(budget, len(samples), spill=self.device.type == "cpu")

    def __len__(self) -> int:
        return len(self.samples)

    def logits(self, index: int, weight: Tensor, bias: Tensor, crop: Crop | None = None) -> Tensor:
        """A linear probe's outputs for an image; differentiable with respect to weight and bias.

        Args:
            index: Of the image.
            weight: `[K, C]` float32.
            bias: `[K]`.
            crop: Slices of rows and columns of the output, with step 1; all of it by default.

        Returns:
            `[K, H, W]`, or as large as the crop.

        Raises:
            UpbenchError: The method's output is not finite.
        """
        kept = self._view(index)
        features, groups = self.features[index : index + 1], 1
        if isinstance(kept, Operator):
            features, groups = kept.takes(features), kept.groups
        low = project(weight, features, groups)

        def part(rows: slice, cols: slice) -> Tensor:
            if isinstance(kept, Operator):
                out = kept.crop(rows, cols).to(torch.float32)(low)[0]
            else:
                dense = kept[:, rows, cols].to(weight.dtype)
                out = (weight @ dense.flatten(1)).reshape(-1, *dense.shape[1:])
            out = out + bias[:, None, None]
            if not bool(out.detach().sum().isfinite()):
                self._explain(out, index, weight, bias)
            return out

        height, width = self.output_size
        if crop or isinstance(kept, FunctionOperator) or (torch.is_grad_enabled() and weight.requires_grad):
            return part(*(crop or (slice(0, height), slice(0, width))))
        whole = weight.new_empty(len(weight), height, width)
        step = max(1, height // _STRIPS)
        for top in range(0, height, step):  # strips stay in a processor's cache; the whole does not
            rows = slice(top, min(top + step, height))
            whole[:, rows] = part(rows, slice(0, width))
        return whole

    def dense(self, index: int) -> Tensor:
        """`[C, H, W]` the upsampled features themselves, computed anew."""
        image, features, camera = self._inputs(index)
        with torch.no_grad():
            if self.method.uses_camera:
                out = self.method(image, features, self.output_size, camera=camera)
            else:
                out = self.method(image, features, self.output_size)
        expected = (1, int(features.shape[1]), *self.output_size)
        if tuple(out.shape) != expected:
            raise UpbenchError(
                f"method '{self.method.name}' returns {list(out.shape)} where {list(expected)} was asked for"
            )
        first: Tensor = out[0]
        return first

    def prepare(self, description: str) -> None:
        """Computes what is kept of each image now, with a progress bar, instead of when it is first needed.

        Ends at the first image for which there is no room. Args: description: Of the progress bar.
        """
        missing = [index for index in range(len(self)) if index not in self._store]
        for index in track(missing, description):
            self._view(index)
            if index not in self._store:
                break

    def nbytes(self) -> int:
        """Bytes that are kept at the moment."""
        return self._store.used

    def _view(self, index: int) -> Operator | Tensor:
        """The image's operator, else its dense features; from memory where it is kept."""
        kept = self._store.get(index)
        if kept is None:
            image, features, camera = self._inputs(index)
            with torch.no_grad():
                kept = self.method.operator(image, features, self.output_size, camera)
                if kept is None:
                    kept = self._finite(self.dense(index), index)
            kept = self._store.offer(index, kept)
        return kept

    def _inputs(self, index: int) -> tuple[Tensor, Tensor, Camera | None]:
        sample = self.samples[index]
        image = self.method.normalize(sample.image[None].to(self.device))
        return image, self.features[index : index + 1], self._camera(sample)

    def _camera(self, sample: Sample) -> Camera | None:
        if not self.camera.dataset:
            return None
        if sample.camera is None:
            raise UpbenchError(f"image '{sample.name}' has no camera")
        return self.camera.apply(sample.camera.to(self.device))

    def _finite(self, dense: Tensor, index: int) -> Tensor:
        if not bool(dense.isfinite().all()):
            raise UpbenchError(
                f"method '{self.method.name}' gives features that are not finite for image "
                f"'{self.samples[index].name}'"
            )
        return dense

    def _explain(self, out: Tensor, index: int, weight: Tensor, bias: Tensor) -> None:
        """Raises where outputs are not finite, and names who is to blame: the probe or the method."""
        if bool(out.isfinite().all()):  # only their sum is too large
            return
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise UpbenchError("the probe's weights are not finite: its training diverged")
        self._finite(self.dense(index), index)
        raise UpbenchError(
            f"method '{self.method.name}': its operator gives values that are not finite for image "
            f"'{self.samples[index].name}'"
        )
