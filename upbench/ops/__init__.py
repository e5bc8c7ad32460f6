"""Operations that several methods share."""

from upbench.ops.operator import FunctionOperator, Operator, project
from upbench.ops.separable import SeparableOperator
from upbench.ops.window import WindowOperator, window_attention, window_operator

__all__ = [
    "FunctionOperator",
    "Operator",
    "SeparableOperator",
    "WindowOperator",
    "project",
    "window_attention",
    "window_operator",
]
