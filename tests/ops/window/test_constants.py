"""Marked as `torch.compiler.assume_constant_result` does it, without the compiler's being imported; of
sizes that a trace takes for fixed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from upbench.ops.window.constants import constant
from upbench.ops.window.tables import neighbourhood_table, tiling


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


def test_sizes_are_fixed_as_torch_marks_them():
    expected = torch.zeros(4, 3)
    torch._dynamo.mark_static(expected)

    @dataclass(frozen=True)
    class Axis:
        length: int
        cells: torch.Tensor

    @constant
    def axes() -> tuple[Axis, torch.Tensor]:
        return Axis(4, torch.zeros(4, 3)), torch.zeros(4, 3)

    axis, table = axes()
    for tensor in (axis.cells, table):
        assert tensor._dynamo_static_indices == expected._dynamo_static_indices == {0, 1}


@pytest.mark.filterwarnings("ignore")
def test_results_of_other_sizes_are_constants_of_their_own():
    """Tables of rows and columns come from one function, under one name."""

    def lengths(x: torch.Tensor) -> torch.Tensor:
        tables = [neighbourhood_table(size, cells, 3) for size, cells in ((20, 5), (31, 9))]
        tilings = [tiling(table, 9, x.device) for table in tables]
        return x + torch.tensor([*(t.shape[0] for t in tables), *(t.cells.shape[0] for t in tilings)])

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph.code)
        return graph.forward

    torch.compiler.reset()
    x = torch.zeros(4, dtype=torch.int64)
    compiled = torch.compile(lengths, fullgraph=True, backend=backend)(x)
    torch.compiler.reset()
    assert torch.equal(compiled, lengths(x))
    assert compiled.tolist()[:2] == [20, 31]
    assert "torch.tensor([20, 31, " in graphs[0]
