"""Lanczos-3 resampling: a windowed sinc."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import lanczos_operator
from upbench.ops.separable import SeparableOperator


class Lanczos(Upsampler):
    """Lanczos-3 resampling, separable; the image is not looked at.

    Output row i is the sum over rows j of L(t_ij) f_j / sum_k L(t_ik), with s = h / H,
    t_ij = (j + 0.5 - (i + 0.5) s) / max(s, 1) and L(t) = sinc(t) sinc(t / 3) for |t| < 3, else 0. Rows beyond
    the border are left out; columns likewise. Where an axis shrinks (s > 1), the kernel is s times as wide,
    which antialiases. In floating point this is Pillow's LANCZOS filter.

    The two matrices are applied dense, and their MACs are counted as they are done.
    """

    name = "lanczos"
    title = "Lanczos-3"
    paper = "Duchon, Lanczos filtering in one and two dimensions, J. Appl. Meteorol. 18(8), 1979"
    year = 1979
    guided = False
    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """See `Upsampler.forward`."""
        return lanczos_operator(features, output_size)(features.unsqueeze(1))

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> SeparableOperator:
        """See `Upsampler.operator`: a matrix for rows and one for columns."""
        return lanczos_operator(features, output_size)
