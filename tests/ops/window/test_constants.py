"""Marked as `torch.compiler.assume_constant_result` does it, without the compiler's being imported."""

from __future__ import annotations

import subprocess
import sys

import torch

from upbench.ops.window.constants import constant


def test_the_mark_is_that_of_torch():
    def one() -> int:
        return 1

    def marks(function: object) -> dict[str, object]:
        return {name: value for name, value in vars(function).items() if name != "__wrapped__"}

    ours = marks(constant(one))
    assert ours == marks(torch.compiler.assume_constant_result(one)) != {}


def test_listing_methods_does_not_import_the_compiler():
    code = (
        "import sys; from upbench.cli.dispatch import main; main(['list', 'methods']); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
