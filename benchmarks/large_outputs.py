"""Peak memory of large outputs: streamed (`upbench.upsample_tiles`), each case in a fresh process.

The peak is that of the resident set above what the process held before, its inputs included; "whole" is the
output tensor alone, which streaming never holds.

    python benchmarks/large_outputs.py [--cases NAME,...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

CHANNELS = 384
CLASSES = 21
# Method, image side, feature side, output side, dtype, classes of a head that is applied on the fly.
CASES: dict[str, tuple[str, int, int, int, str, int | None]] = {
    "raysup-2048": ("raysup", 224, 16, 2048, "bfloat16", None),
    "raysup-1024-image": ("raysup", 1024, 64, 1024, "float32", None),
    "anyup-1024-image": ("anyup", 1024, 64, 1024, "float32", None),
    "raysup-2048-head": ("raysup", 224, 16, 2048, "float32", CLASSES),
    "raysup-4096-head": ("raysup", 224, 16, 4096, "float32", CLASSES),
    "anyup-2048-head": ("anyup", 224, 16, 2048, "float32", CLASSES),
}


def measure(case: str, budget: int) -> dict[str, Any]:
    """Runs one case in this process."""
    import torch

    from upbench import load_method, upsample_tiles
    from upbench.contracts.upsampler import Sizes
    from upbench.cost.peakmemory import _Meter

    name, image_side, feature_side, side, dtype, classes = CASES[case]
    kind = getattr(torch, dtype)
    method = load_method(name, channels=CHANNELS).to(kind)
    sizes = Sizes(CHANNELS, (image_side,) * 2, (feature_side,) * 2, (side, side))
    image, features = sizes.inputs(kind)
    head = None if classes is None else torch.randn(classes, CHANNELS, dtype=kind)

    def run(size: int) -> None:
        for tile in upsample_tiles(method, image, features, (size, size), memory_budget=budget, project=head):
            del tile

    method(image[..., :32, :32], features, (32, 32))  # libraries and threads
    meter, start = _Meter(), time.perf_counter()
    run(side)
    seconds = time.perf_counter() - start
    whole = CHANNELS * side * side * features.element_size()
    return {"case": case, "whole": whole, "peak": meter.peak(), "seconds": seconds, "how": meter.how}


def main() -> None:
    """Measures the cases and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES), help="which of them (default: all)")
    parser.add_argument("--budget", type=int, default=512, help="memory budget in MiB (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.cases, arguments.budget << 20)))
        return
    print("| case | whole output (MB) | peak (MB) | seconds |\n|---|---|---|---|")
    for case in arguments.cases.split(","):
        command = [sys.executable, __file__, "--here", "--cases", case, "--budget", str(arguments.budget)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        numbers = f"{found['whole'] / 1e6:.0f} | {found['peak'] / 1e6:.0f} | {found['seconds']:.0f}"
        print(f"| {case} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
