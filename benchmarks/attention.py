"""Window attention alone, beside a gather of every window and one dense product of as many operations.

    python benchmarks/attention.py [--sizes 224,448] [--threads 2] [--out FILE]

RaysUp's problem: features 384 x (size / 14)^2 to 384 x size^2 in float32, 4 heads of 64 channels, 6 x 6
windows; and AnyUp's: 4 heads of 32, windows of a tenth of the map to either side, weights averaged over
heads. The three take turns in one process, and ratios are between medians. "gather" is what people write
without a package: the keys and values of every pixel's window are gathered (by `unfold` for RaysUp, by index
and mask for AnyUp, whose windows are of unequal size), a row of the output at a time so that it fits into
memory. "dense" is one matrix product of n x n matrices with 2 n^3 operations, as many as the attention has
(2 x pixels x window x channels of keys and values).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.cost.measure import hardware
from upbench.errors import UpbenchError
from upbench.ops.window.attention import window_attention
from upbench.ops.window.tables import fraction_table, neighbourhood_table
from upbench.results.records import write_json
from upbench.system.environment import describe

PATCH, HEADS, KERNEL, RADIUS = 14, 4, 6, 0.1
KEYS = {"raysup": 256, "anyup": 128}


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="224,448", help="sides of the output, multiples of 14")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    try:
        for kind in KEYS:
            for size in map(int, arguments.sizes.split(",")):
                rows.append(measure(kind, size, arguments.channels, arguments.repeats))
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {"hardware": hardware(), "environment": describe(), "rows": rows}
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)
    return 0


@torch.inference_mode()
def measure(kind: str, size: int, channels: int, repeats: int) -> dict[str, Any]:
    """Medians and quartiles in milliseconds of the three, and their ratios."""
    if size % PATCH or size < PATCH * KERNEL:
        raise UpbenchError(f"size {size} is not a multiple of {PATCH} from {PATCH * KERNEL} on")
    cells, keys = size // PATCH, KEYS[kind]
    q, k, v = (torch.randn(1, c, n, n) for c, n in ((keys, size), (keys, cells), (channels, cells)))
    average = kind == "anyup"
    table_ = fraction_table(size, cells, RADIUS) if average else neighbourhood_table(size, cells, KERNEL)
    seen = (table_ >= 0).sum(1)
    flops = 2 * int(seen.sum()) ** 2 * (keys + channels)
    side = round((flops / 2) ** (1 / 3))
    a, b = torch.randn(2, side, side)

    def attend() -> Tensor:
        return window_attention(q, k, v, table_, table_, heads=HEADS, average_heads=average)

    def gather() -> Tensor:
        return (gathered_by_table if average else gathered_by_unfold)(q, k, v, table_)

    runs: dict[str, Callable[[], Tensor]] = {"attention": attend, "gather": gather, "dense": lambda: a @ b}
    error = float((attend() - gather()).abs().max())
    if error > 1e-4:
        raise UpbenchError(f"{kind} at {size}: the gather gives another result, {error:.1e} away")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if name == "gather" and turn > max(2, repeats // 3):
                continue  # slow, and steady enough
            started = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - started) * 1e3)
    quartiles = {name: statistics.quantiles(t, n=4, method="inclusive") for name, t in times.items()}
    medians = {name: q[1] for name, q in quartiles.items()}
    return {
        "method": kind,
        "size": size,
        "gflop": flops / 1e9,
        "dense_side": side,
        "ms": quartiles,
        "faster_than_gather": medians["gather"] / medians["attention"],
        "times_dense": medians["attention"] / medians["dense"],
        "max_error": error,
    }


def gathered_by_unfold(q: Tensor, k: Tensor, v: Tensor, table_: Tensor) -> Tensor:
    """RaysUp's windows: unfolded on the low-resolution map, repeated for every pixel, a row at a time."""
    _, _, height, width = q.shape
    cells = int(k.shape[2])
    ratio = height // cells
    first = torch.arange(cells).sub(KERNEL // 2).clamp(0, cells - KERNEL)
    windows = [F.unfold(x, KERNEL).view(1, x.shape[1], KERNEL**2, cells - KERNEL + 1, -1) for x in (k, v)]
    columns = first.repeat_interleave(ratio)
    out = q.new_empty(1, v.shape[1], height, width)
    for row in range(height):
        keys, values = (x[:, :, :, first[row // ratio]].index_select(3, columns) for x in windows)
        out[:, :, row] = _softmax_average(q[:, :, row], keys, values, HEADS)
    return out


def gathered_by_table(q: Tensor, k: Tensor, v: Tensor, table_: Tensor) -> Tensor:
    """AnyUp's windows: every pixel's cells, a row at a time; a mask leaves out what is none."""
    _, _, height, width = q.shape
    out = q.new_empty(1, v.shape[1], height, width)
    cols = table_.clamp(min=0)
    for row in range(height):
        rows = table_[row][table_[row] >= 0]
        keys, values = (x[:, :, rows][:, :, :, cols].permute(0, 1, 2, 4, 3).flatten(2, 3) for x in (k, v))
        allowed = (table_ >= 0).T.repeat(len(rows), 1)
        out[:, :, row] = _softmax_average(q[:, :, row], keys, values, 1, HEADS, allowed)
    return out


def _softmax_average(
    q: Tensor, k: Tensor, v: Tensor, groups: int, heads: int = HEADS, allowed: Tensor | None = None
) -> Tensor:
    """`[1, C, W]` queries and windows `[1, C, cells, W]`; weights are averaged where there is one group."""
    depth = q.shape[1] // heads
    logits = (q.view(heads, depth, 1, -1) * k.view(heads, depth, -1, q.shape[2])).sum(1) * depth**-0.5
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    weights = logits.softmax(1)
    if groups == 1:
        weights = weights.mean(0, keepdim=True)
    dense = (weights.unsqueeze(1) * v.view(groups, -1, *weights.shape[1:])).sum(2)
    return dense.view(1, -1, q.shape[2])


def table(result: dict[str, Any]) -> str:
    """The ratios in Markdown."""
    lines = [
        result["hardware"],
        "",
        "| problem | output | GFLOP | ours (ms) | gather (ms) | dense (ms) | gather / ours | ours / dense |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        times = (f"{low:.0f}-{high:.0f}" for low, _, high in row["ms"].values())
        lines.append(
            f"| {row['method']} | {row['size']} | {row['gflop']:.1f} | {' | '.join(times)} "
            f"| {row['faster_than_gather']:.1f} | {row['times_dense']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
