"""Operations that several methods share."""

from upbench.contracts.operator import FunctionOperator, Operator
from upbench.ops.attention import GlobalOperator, global_attention, global_operator
from upbench.ops.operator import project
from upbench.ops.separable import SeparableOperator
from upbench.ops.window.attention import WindowOperator, window_attention, window_operator
from upbench.ops.window.backends import use_backend

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
