"""Our methods beside their official code on one GPU, in a few minutes; writes one JSON file.

    python benchmarks/gpu.py --out results/gpu.json [--official-raysup DIR] [--official-anyup DIR]
    python benchmarks/gpu.py --device cpu --smoke --out /tmp/smoke.json     # does it run?

One image of 448 pixels (less where the output is smaller) and its features at a patch of 14, 384 channels,
packaged weights in all implementations. For each method, output size and data type: our forward with each
attention backend, as it is, under `torch.compile` and as a replayed CUDA graph; and the official code where
its checkout is given (https://github.com/MAP-RaysUp/RaysUp, https://github.com/wimmerth/anyup; both need
einops, RaysUp's also NATTEN). Latencies are medians and quartiles of single passes after warm-up, by CUDA's
events. `relative_error` is the norm of the difference to our float32 PyTorch result over its norm. The share
of the roofline is the time that a copy of as many bytes as image, features and output have would take on this
device, over the latency. Whatever fails leaves its error in its place, and the rest is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case

from upbench.cost.measure import DTYPES, hardware
from upbench.errors import UpbenchError, unknown
from upbench.ops.window.backends import NAMES
from upbench.results.records import write_json
from upbench.system.environment import describe
from upbench.system.progress import track

OFFICIAL = {
    "raysup": ("official-raysup",),
    "anyup": ("official-anyup", "official-anyup-chunked", "official-anyup-natten"),
}
MODES = ("eager", "compile", "graph")
WORKER = Path(__file__).with_name("gpu_cases.py")


def main() -> int:
    """Measures, writes the JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--methods", default="raysup,anyup")
    parser.add_argument("--backends", default="triton,torch,natten")
    parser.add_argument("--modes", default="eager,compile,graph")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sizes", default="224,448,896,2048", help="sides of the output")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--official-raysup", default="", metavar="DIR")
    parser.add_argument("--official-anyup", default="", metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=0.5, help="for the repeats of a case")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a case, compilation included")
    parser.add_argument("--smoke", action="store_true", help="a few tiny cases, to see that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.backends, arguments.modes, arguments.dtypes = "torch", "eager", "float32"
        arguments.sizes, arguments.channels, arguments.seconds = "56", 16, 0.0
    try:
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise UpbenchError(
                "device 'cuda' is not available on this machine; --device cpu --smoke tries it"
            )
        rows = measure(list(cases(arguments)), arguments.timeout)
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = {
        "command": sys.argv[1:],
        "hardware": hardware(arguments.device),
        "environment": describe(arguments.device),
        **with_roofline(rows),
    }
    write_json(arguments.out, result)
    print(table(result))
    return 0


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """All that is measured; neighbours share a process."""

    def case(
        code: str, method: str, backend: str, mode: str, dtype: str, size: int, checkout: str = ""
    ) -> Case:
        return Case(
            code, method, backend, mode, dtype, size, arguments.channels, arguments.device, checkout,
            arguments.seconds, stages=code == "ours" and mode == "eager" and backend != "natten",
        )  # fmt: skip

    methods, backends, modes, dtypes = (
        getattr(arguments, name).split(",") for name in ("methods", "backends", "modes", "dtypes")
    )
    for name, given, known in (
        ("dtype", dtypes, DTYPES),
        ("attention backend", backends, NAMES),
        ("mode", modes, MODES),
        ("method", methods, OFFICIAL),
    ):
        for wrong in set(given) - set(known):
            raise unknown(name, wrong, known)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    yield case("copy", "", "", "", "", 0)
    for method, backend, mode in itertools.product(methods, backends, modes):
        if mode != "eager" and (backend == "natten" or arguments.device == "cpu"):
            continue
        for dtype, size in itertools.product(dtypes, sizes):
            if mode == "eager" or (dtype == dtypes[0] and size in (224, 448)):  # compiling takes its time
                yield case("ours", method, backend, mode, dtype, size)
    for method in methods:
        checkout = getattr(arguments, f"official_{method}", "")
        for code in OFFICIAL.get(method, ()) if checkout else ():
            for dtype, size in itertools.product(dtypes, sizes):
                yield case(code, method, "", "eager", dtype, size, str(Path(checkout).resolve()))


def measure(todo: list[Case], timeout: float) -> list[dict[str, Any]]:
    """Every case with its result. A process serves the cases of one kind of code, until it dies of one."""
    rows = []
    worker: Worker | None = None
    serves = ("", "")
    for case in track(todo, "gpu"):
        kind = (case.code.replace("copy", "ours"), case.mode or "eager")
        if worker is None or worker.dead or kind != serves:
            if worker is not None:
                worker.end()
            worker, serves = Worker(), kind
        rows.append({**asdict(case), **worker.measure(case, timeout)})
    if worker is not None:
        worker.end()
    return rows


class Worker:
    """A process that measures cases one after the other."""

    def __init__(self) -> None:
        self.dead = False
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.complaints: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._hear_complaints, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # official code prints, too
                self.answers.put(line)
        self.answers.put(None)

    def _hear_complaints(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.complaints = [*self.complaints[-20:], line]

    def measure(self, case: Case, timeout: float) -> dict[str, Any]:
        """The result, or why there is none; then the worker may be dead."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asdict(case)) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.dead = True
            return {"error": f"no answer within {timeout:.0f} s"}
        except OSError:
            answer = None
        if answer is None:
            self.dead = True
            last = " ".join("".join(self.complaints[-3:]).split())[-400:]
            return {"error": f"the process ended with code {self.process.wait()}: {last}"}
        result: dict[str, Any] = json.loads(answer)
        if "error" in result and "CUDA error" in result["error"]:
            self.dead = True  # after some of them, nothing works in a process
        return result

    def end(self) -> None:
        """Lets it finish, or ends it where it hangs."""
        if self.dead:
            self.process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def with_roofline(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The device's bandwidth, and the rows with their share of it and their speed-up over official code."""
    copy, *rows = rows
    bandwidth = copy.get("copy_bytes_per_s")
    official = {
        (row["code"], row["dtype"], row["size"]): row["latency_ms"]
        for row in rows
        if row["code"] != "ours" and "latency_ms" in row
    }
    for row in rows:
        if "latency_ms" not in row:
            continue
        if bandwidth:
            row["roofline_ms"] = row["least_bytes"] / bandwidth * 1e3
            row["roofline_share"] = row["roofline_ms"] / row["latency_ms"]
        if row["code"] == "ours":
            theirs = {
                code: official.get((code, row["dtype"], row["size"])) for code in OFFICIAL[row["method"]]
            }
            row["faster_than"] = {c: ms / row["latency_ms"] for c, ms in theirs.items() if ms is not None}
        if row["peak_memory_bytes"] is not None:
            row["memory_per_output"] = row["peak_memory_bytes"] / row["output_bytes"]
    return {"copy_bytes_per_s": bandwidth, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The main numbers in Markdown."""
    lines = [
        f"{result['hardware']}; copy {(result['copy_bytes_per_s'] or 0) / 1e9:.0f} GB/s",
        "",
        "| method | code | mode | dtype | output | ms (quartiles) | peak / output | roofline | error |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        code = f"ours, {row['backend']}" if row["code"] == "ours" else row["code"]
        start = f"| {row['method']} | {code} | {row['mode']} | {row['dtype']} | {row['size']} |"
        if "error" in row:
            lines.append(f"{start} {row['error'][:60].replace('|', '/')} | | | |")
            continue
        median, low, high = (row[f"latency_{q}ms"] for q in ("", "q25_", "q75_"))
        memory = f"{row['memory_per_output']:.2f}" if "memory_per_output" in row else ""
        share = f"{100 * row.get('roofline_share', 0):.0f} %"
        times = f"{median:.3f} ({low:.3f}-{high:.3f})"
        lines.append(f"{start} {times} | {memory} | {share} | {row['relative_error']:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
