"""Attention of every output pixel to a small window of features: what is seen, and how it is computed."""

from upbench.ops.window.attention import QueryRows, WindowOperator, window_attention, window_operator
from upbench.ops.window.backends import use_backend
from upbench.ops.window.tables import (
    Tiling,
    fraction_table,
    neighbourhood_table,
    neighbourhood_tables,
    radius_table,
    tiling,
)

__all__ = [
    "QueryRows",
    "Tiling",
    "WindowOperator",
    "fraction_table",
    "neighbourhood_table",
    "neighbourhood_tables",
    "radius_table",
    "tiling",
    "use_backend",
    "window_attention",
    "window_operator",
]
