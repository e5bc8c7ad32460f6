"""Checks that anybody can run on a plugin of their own, with or without pytest.

    from upbench.testing import check_method

    def test_contract():
        check_method(MyMethod)

The project's own tests run the same checks over everything that is registered.
"""

from upbench.testing.cases import MethodCase
from upbench.testing.checks import ContractError, NotApplicable
from upbench.testing.closeness import assert_close
from upbench.testing.datasets import DATASET_CHECKS, DatasetCase, check_dataset
from upbench.testing.methods import METHOD_CHECKS, check_method
from upbench.testing.protocols import PROTOCOL_CHECKS, ProtocolCase, check_protocol
from upbench.testing.tasks import TASK_CHECKS, TaskCase, check_task, toy_case
from upbench.testing.toys.backbone import tiny_backbone
from upbench.testing.toys.context import ToyContext

__all__ = [
    "DATASET_CHECKS",
    "METHOD_CHECKS",
    "PROTOCOL_CHECKS",
    "TASK_CHECKS",
    "ContractError",
    "DatasetCase",
    "MethodCase",
    "NotApplicable",
    "ProtocolCase",
    "TaskCase",
    "ToyContext",
    "assert_close",
    "check_dataset",
    "check_method",
    "check_protocol",
    "check_task",
    "tiny_backbone",
    "toy_case",
]
