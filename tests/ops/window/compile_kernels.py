"""Compiles the Triton kernels for a GPU of compute capability 9.0 that need not be there; prints their names.

Run by test_backends.py in a process of its own: in the tests' process, Triton interprets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import Autotuner

from upbench.ops.window import triton_kernels, triton_window
from upbench.ops.window.tables import fraction_table, neighbourhood_table

KERNELS = ("forward", "backward_queries_keys", "backward_values", "collect")
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
VISIBLE = {torch.float32: "*fp32", torch.int32: "*i32"}


def main() -> None:
    """RaysUp's kind in bfloat16 at a ratio that is not whole, AnyUp's in float32."""
    compile_for(torch.bfloat16, False, neighbourhood_table(20, 3, 2), *KERNELS)
    compile_for(torch.float32, True, fraction_table(16, 4, 0.2), *KERNELS[:2])


def compile_for(dtype: torch.dtype, average: bool, table: torch.Tensor, *kernels: str) -> None:
    """Kernels for one kind of problem, two heads of 16 channels."""
    cells = int(table.max()) + 1
    row, col = triton_window._plan(table, table, (cells, cells), torch.device("cpu"))
    q = torch.empty(1, 32, 1, 1, dtype=dtype)
    axes = ((row.cells, row.visible), (col.cells, col.visible))
    tile = [row.size, row.before, col.size]
    constants = triton_window._sizes(q, q, *axes, tile, 2, average)
    constants |= {"PRECISION": "tf32x3", "PIXELS": col.size, "BLOCK": 16, "ROW_LISTS": 2, "COL_LISTS": 3}
    tensor, visible = NAMES[dtype], [VISIBLE[axis.visible.dtype] for axis in (row, col)]
    types: dict[str, Any] = dict.fromkeys(("q", "k", "v", "out", "grad", "grad_q"), tensor)
    types |= dict.fromkeys(("grad_k", "grad_v", "per_tile"), "*fp32")
    types |= dict.fromkeys(("row_slots", "col_slots"), "*i32")
    types |= {"rows": ("*i32", visible[0]), "cols": ("*i32", visible[1]), "scale": "fp32"}
    types |= dict.fromkeys(("q_stride", "grad_stride"), ("i64",) * 4) | dict.fromkeys(
        ("size", "low"), ("i32",) * 2
    )
    for kernel in kernels:
        function = getattr(triton_kernels, kernel)
        function = function.fn if isinstance(function, Autotuner) else function
        known = {n: constants[n] for n in function.arg_names if n in constants}
        signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in function.arg_names}
        if kernel == "collect":
            signature["out"] = "*fp32"
        values = {(function.arg_names.index(n),): value for n, value in known.items()}
        source = ASTSource(function, signature, values)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
        print(kernel)


if __name__ == "__main__":
    main()
