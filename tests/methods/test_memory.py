"""Peak memory of a forward stays far below that of keys and values on the output grid."""

from __future__ import annotations

import pytest
import torch

from upbench.contracts.upsampler import Sizes
from upbench.cost.peakmemory import LINUX, cpu_peak_memory
from upbench.weights.load import load_method


@pytest.mark.parametrize("name", ["raysup", "anyup"])
def test_448_to_448_with_384_channels_fits_in_1500_megabytes(name: str) -> None:
    sizes = Sizes(384, (448, 448), (32, 32), (448, 448))
    peak = cpu_peak_memory(load_method(name, weights="none"), sizes, torch.float32)
    if peak.how != LINUX or peak.bytes is None:
        pytest.skip(peak.how)
    output = 384 * 448 * 448 * 4
    assert output < peak.bytes < 1.5e9


def test_global_attention_never_holds_all_weights() -> None:
    """At 224 pixels those of JAFAR's four heads take 205 MB, and twice that while the softmax is taken."""
    peak = cpu_peak_memory(
        load_method("jafar", weights="none"), Sizes(384, (224, 224), (16, 16), (224, 224)), torch.float32
    )
    if peak.how != LINUX or peak.bytes is None:
        pytest.skip(peak.how)
    output = 384 * 224 * 224 * 4
    assert output < peak.bytes < output + 205e6
