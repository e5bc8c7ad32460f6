"""Problems of windowed attention for Hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from upbench.ops.window.tables import fraction_table, neighbourhood_table


@st.composite
def tables(draw: st.DrawFn, size: int, cells: int) -> Tensor:
    """A row or column table: of the methods, or any."""
    kind = draw(st.sampled_from(["neighbourhood", "fraction", "any"]))
    if kind == "neighbourhood":
        return neighbourhood_table(size, cells, draw(st.integers(1, 7)))
    if kind == "fraction":
        return fraction_table(size, cells, draw(st.sampled_from([0.05, 0.1, 0.34])))
    width = draw(st.integers(1, 4))
    entry = st.lists(st.integers(-1, cells - 1), min_size=width, max_size=width).filter(lambda e: max(e) >= 0)
    return torch.tensor(draw(st.lists(entry, min_size=size, max_size=size)))


@st.composite
def problems(draw: st.DrawFn, cells: int = 6, pixels: int = 17) -> dict[str, Any]:
    """Arguments of `window_attention` in float64, for maps of up to `cells` cells and `pixels` a side."""
    h, w, height, width = (draw(st.integers(1, n)) for n in (cells, cells, pixels, pixels))
    heads, batch = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    average = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels = draw(st.integers(1, 5)) if average else heads * draw(st.integers(1, 3))
    q, k = normal(batch, 2 * heads, height, width), normal(batch, 2 * heads, h, w)
    if draw(st.booleans()):
        q = q.contiguous(memory_format=torch.channels_last)
    return {
        "q": q,
        "k": 3 * k,
        "v": normal(batch, channels, h, w),
        "rows": draw(tables(height, h)),
        "cols": draw(tables(width, w)),
        "heads": heads,
        "average_heads": average,
    }
