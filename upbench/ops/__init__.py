"""Operations that several methods share."""

from upbench.ops.attention import GlobalOperator, global_attention, global_operator
from upbench.ops.backends import use_backend
from upbench.ops.operator import FunctionOperator, Operator, project
from upbench.ops.separable import SeparableOperator
from upbench.ops.window import WindowOperator, window_attention, window_operator

__all__ = [
    "FunctionOperator",
    "GlobalOperator",
    "Operator",
    "SeparableOperator",
    "WindowOperator",
    "global_attention",
    "global_operator",
    "project",
    "use_backend",
    "window_attention",
    "window_operator",
]
