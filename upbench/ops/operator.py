"""What a linear probe is before an operator: applied at low resolution (see `upbench.contracts.operator`)."""

from __future__ import annotations

from torch import Tensor

from upbench.contracts.operator import FunctionOperator, Operator, SourcedOperator

__all__ = ["FunctionOperator", "Operator", "SourcedOperator", "project"]


def project(weight: Tensor, features: Tensor, groups: int) -> Tensor:
    """The probe applied at low resolution, group by group.

    Args:
        weight: `[K, C]`.
        features: `[B, C, h, w]`; groups must divide C.
        groups: As the operator's.

    Returns:
        `[B, groups, K, h, w]`, what `Operator.__call__` takes.
    """
    b, c, h, w = features.shape
    k = weight.shape[0]
    grouped = features.reshape(b, groups, c // groups, h * w)
    split = weight.reshape(k, groups, c // groups).transpose(0, 1)
    return (split.unsqueeze(0) @ grouped).reshape(b, groups, k, h, w)
