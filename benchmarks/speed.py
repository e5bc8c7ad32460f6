"""Forward passes on this machine's CPU, side by side: ours, the official AnyUp code, one dense product.

    python benchmarks/speed.py [--sizes 224,448] [--official-anyup DIR] [--rounds 7] [--json FILE]

Every round runs each contender once, in turn, so that whatever else the machine does meets all of them; the
table has medians with quartiles and the median of the rounds' ratios to RaysUp. "Dense product" is one matrix
product of as many FLOPs as RaysUp's forward (2 x MACs). The official code (a checkout of
https://github.com/wimmerth/anyup) runs as it is, with random weights and its own chunks of queries. Peak
memory of a forward, output included, comes from fresh processes. docs/performance.md shows what this printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from upbench.contracts.upsampler import Sizes
from upbench.cost.macs import count_macs
from upbench.cost.measure import hardware
from upbench.cost.peakmemory import cpu_peak_memory
from upbench.weights.load import load_method

CHANNELS, STRIDE = 384, 14
CHUNK = 1024  # queries at a time in the official code
METHODS = ("bilinear", "raysup", "anyup")


def main() -> int:
    """Prints one table per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="224,448", help="sides of image and output")
    parser.add_argument("--official-anyup", type=Path, metavar="DIR", help="a checkout of the official code")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = []
    for side in map(int, arguments.sizes.split(",")):
        results.append(measure(side, arguments.rounds, arguments.official_anyup))
        print(table(results[-1]), flush=True)
    if arguments.json:
        about = {"hardware": hardware(), "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    return 0


def measure(side: int, rounds: int, official: Path | None) -> dict[str, object]:
    """Milliseconds of each contender in each round, and peak memory of ours."""
    grid = 32 if side == 448 else max(1, round(side / STRIDE))
    image, features = torch.randn(1, 3, side, side), torch.randn(1, CHANNELS, grid, grid)
    size = (side, side)
    methods = {name: load_method(name, weights="none", channels=CHANNELS) for name in METHODS}
    macs = count_macs(_At(methods["raysup"], size), image, features).total
    n = round(macs ** (1 / 3))
    a, b = torch.randn(n, n), torch.randn(n, n)
    contenders: dict[str, Callable[[], object]] = {
        name: (lambda m=method: m(image, features, size)) for name, method in methods.items()
    }
    contenders["dense product"] = lambda: a @ b
    if official is not None:
        model = official_anyup(official)
        contenders["official AnyUp"] = lambda: model(image, features, size, q_chunk_size=CHUNK)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for round_ in range(rounds + 1):  # the first one warms up
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if round_:
                    times[name].append((time.perf_counter() - start) * 1e3)
    sizes = Sizes(CHANNELS, size, (grid, grid), size)
    memory = {name: cpu_peak_memory(method, sizes, torch.float32).bytes for name, method in methods.items()}
    output = CHANNELS * side * side * 4
    return {
        "side": side,
        "macs": macs,
        "milliseconds": times,
        "peak_bytes": memory,
        "output_bytes": output,
    }


class _At(torch.nn.Module):
    def __init__(self, method: torch.nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.method = method
        self.size = size

    def forward(self, image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """See `Upsampler.forward`."""
        out: torch.Tensor = self.method(image, features, self.size)
        return out


def official_anyup(folder: Path) -> torch.nn.Module:
    """The model of a checkout, with random weights."""
    sys.path.insert(0, str(folder))
    try:
        from anyup.model import AnyUp  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit(f"no AnyUp in {folder}: {error}") from error
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    model: torch.nn.Module = AnyUp().eval()
    return model


def table(result: dict[str, object]) -> str:
    """One size as Markdown."""
    times: dict[str, list[float]] = result["milliseconds"]  # type: ignore[assignment]
    peak: dict[str, int | None] = result["peak_bytes"]  # type: ignore[assignment]
    output: int = result["output_bytes"]  # type: ignore[assignment]
    side, macs = result["side"], result["macs"]
    lines = [
        f"### {side} pixels to {side} x {side}, {CHANNELS} channels, float32; {hardware()}; "
        f"RaysUp {macs / 1e9:.1f} GMACs",  # type: ignore[operator]
        "",
        "| | ms (quartiles) | x RaysUp | peak memory / output |",
        "|---|--:|--:|--:|",
    ]
    for name, values in times.items():
        q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
        ratio = statistics.median(v / r for v, r in zip(values, times["raysup"], strict=True))
        bytes_ = peak.get(name)
        memory = f"{bytes_ / output:.2f}" if bytes_ else "–"
        lines.append(f"| {name} | {middle:.0f} ({q1:.0f}–{q3:.0f}) | {ratio:.2f} | {memory} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
