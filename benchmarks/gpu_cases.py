"""Measures cases for `gpu.py`, in a process of its own: reads them from standard input, answers line by line.

A case that fails, by running out of memory for one, answers with its error, and the next one is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

from upbench.contracts.upsampler import Upsampler
from upbench.cost.measure import DTYPES
from upbench.ops import use_backend
from upbench.weights.load import load_method

PATCH = 14
MOST_IMAGE = 448  # larger outputs are made of an image of this size
WARM_UP, MOST_REPEATS = 3, 50
# What a method's file calls, and the stage it belongs to; modules belong to "encoder" unless named here.
STAGES = {
    "window_attention": "attention",
    "pool": "pooling",
    "rotate": "positions",
    "rotation": "positions",
    "axial_rotation": "positions",
    "ray_directions": "positions",
    "ray_angles": "positions",
}
MODULE_STAGES = {"position": "positions", "attention": "projections"}


@dataclass(frozen=True)
class Case:
    """What is measured once.

    Attributes:
        code: "ours", or a kind of `official.official_forward`; "copy" measures the device's bandwidth.
        method: "raysup" or "anyup".
        backend: Of our attention; "" for official code.
        mode: "eager", "compile" (`torch.compile`) or "graph" (a captured CUDA graph, replayed).
        dtype: Of parameters, inputs and output.
        size: Side of the output in pixels; the image is as large, up to 448.
        channels: Of the features.
        device: "cuda" or "cpu".
        checkout: Folder of official code.
        seconds: Time for the repeats.
        stages: Whether to time the stages of an eager pass, too.
    """

    code: str
    method: str
    backend: str
    mode: str
    dtype: str
    size: int
    channels: int
    device: str
    checkout: str = ""
    seconds: float = 1.0
    stages: bool = False


def main() -> None:
    """Measures the cases of standard input, a JSON object a line, until it ends."""
    for line in sys.stdin:
        case = Case(**json.loads(line))
        try:
            with torch.inference_mode():
                result = copy_bandwidth(case) if case.code == "copy" else measure(case)
        except Exception as error:  # whatever it is, it is this case's answer
            text = " ".join(str(error).split())[:400]
            result = {"error": f"{type(error).__name__}: {text}"}
        if case.device == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()
        print(json.dumps(result), flush=True)


def measure(case: Case) -> dict[str, Any]:
    """Latency, memory, error against float32 PyTorch, bytes that must be moved, and stages."""
    image, features = inputs(case)
    dtype, size = DTYPES[case.dtype], (case.size, case.size)
    exact = load_method(case.method, channels=case.channels).eval().to(case.device)
    method = load_method(case.method, channels=case.channels).eval().to(case.device, dtype)
    forward = prepare(case, method, exact)
    low = (image.to(dtype), features.to(dtype))

    def run() -> Tensor:
        with use_backend(case.backend or "auto"):
            return forward(*low, size)

    counters: Any = torch._dynamo.utils.counters if case.mode == "compile" else None
    if counters is not None:
        counters.clear()
    started = time.perf_counter()
    output = run()
    _wait(case.device)
    result: dict[str, Any] = {"first_s": time.perf_counter() - started}
    if counters is not None:
        result["graph_breaks"] = sum(counters["graph_break"].values())
    with use_backend("torch"):
        expected = exact(image, features, size)
    result |= difference(output, expected)
    result["output_bytes"] = output.numel() * output.element_size()
    result["least_bytes"] = result["output_bytes"] + sum(x.numel() * x.element_size() for x in low)
    del output, expected
    if case.mode == "graph":
        run = captured(run)
    result |= latency(run, case)
    if case.stages:
        result["stages_ms"] = stages(run, method, case)
    return result


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """An image and features, float32, the same for every case of a size."""
    side = min(case.size, MOST_IMAGE)
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=draw)
    features = torch.randn(1, case.channels, side // PATCH, side // PATCH, generator=draw)
    return image.to(case.device), features.to(case.device)


def prepare(case: Case, method: Upsampler, exact: Upsampler) -> Callable[..., Tensor]:
    """The forward that a case asks for."""
    if case.code != "ours":
        from official import official_forward

        kind = case.code.removeprefix("official-")
        return official_forward(kind, Path(case.checkout), exact, case.device, DTYPES[case.dtype])
    if case.mode == "compile":
        compiled: Callable[..., Tensor] = torch.compile(method, dynamic=False)
        return compiled
    return method


def difference(output: Tensor, expected: Tensor) -> dict[str, Any]:
    """Largest error, and the error's norm over the norm; a channel at a time, as outputs are large."""
    largest = square = norm = 0.0
    for mine, other in zip(output.unbind(1), expected.unbind(1), strict=True):
        error = mine.float() - other
        largest = max(largest, float(error.abs().max()))
        square += float(error.double().square().sum())
        norm += float(other.double().square().sum())
    return {"max_error": largest, "relative_error": (square / norm) ** 0.5}


def latency(run: Callable[[], Tensor], case: Case) -> dict[str, Any]:
    """Median and quartiles of single passes in milliseconds, and the peak of memory above the inputs."""
    for _ in range(WARM_UP):
        run()
    _wait(case.device)
    cuda = case.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < MOST_REPEATS and time.perf_counter() - started < case.seconds):
        with _Clock(case.device) as clock:
            run()
        times.append(clock.milliseconds())
    q25, median, q75 = statistics.quantiles(times, n=4, method="inclusive")
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    return {
        "latency_ms": median,
        "latency_q25_ms": q25,
        "latency_q75_ms": q75,
        "repeats": len(times),
        # Of a replayed graph, whose memory was taken when it was captured, nothing is to be seen.
        "peak_memory_bytes": None if case.mode == "graph" else peak,
    }


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The kernels of a pass as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def stages(run: Callable[[], Tensor], method: Upsampler, case: Case) -> dict[str, float]:
    """Median milliseconds of a pass by stage, and what is left as "other"; stages are waited for."""
    clocks: dict[str, list[_Clock]] = defaultdict(list)
    depth = [0]

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inner(*arguments: Any, **options: Any) -> Any:
            if depth[0]:
                return function(*arguments, **options)
            depth[0] += 1
            try:
                with _Clock(case.device) as clock:
                    return function(*arguments, **options)
            finally:
                depth[0] -= 1
                clocks[stage].append(clock)

        return inner

    file = vars(sys.modules[type(method).__module__])
    plain = {name: file[name] for name in STAGES if name in file}
    children = {
        name: child for name, child in method.named_children() if any(True for _ in child.parameters())
    }
    if len(children) == 1:  # an encoder whose branches are called one by one
        children = dict(next(iter(children.values())).named_children())
    rows: list[dict[str, float]] = []
    try:
        file.update({name: timed(STAGES[name], function) for name, function in plain.items()})
        for name, child in children.items():
            child.forward = timed(MODULE_STAGES.get(name, "encoder"), child.forward)
        for _ in range(5):
            clocks.clear()
            with _Clock(case.device) as whole:
                run()
            row = {stage: sum(clock.milliseconds() for clock in some) for stage, some in clocks.items()}
            rows.append({**row, "other": whole.milliseconds() - sum(row.values())})
    finally:
        file.update(plain)
        for child in children.values():
            del child.forward
    return {stage: statistics.median(row.get(stage, 0.0) for row in rows) for stage in rows[-1]}


def copy_bandwidth(case: Case) -> dict[str, Any]:
    """Bytes read and written per second by a large copy on the device: what a roofline is made of."""
    count = (1 << 30) if case.device == "cuda" else 1 << 25
    source = torch.randint(255, (count,), dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    timing = latency(lambda: target.copy_(source), case)
    return {"copy_bytes_per_s": 2 * count / timing["latency_ms"] * 1e3}


class _Clock:
    """Time of a block: CUDA's events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else []
        self.times = [0.0, 0.0]

    def __enter__(self) -> _Clock:
        self._mark(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self.events:
            self.events[which].record()
        self.times[which] = time.perf_counter()

    def milliseconds(self) -> float:
        """Waits for the block's end."""
        if not self.events:
            return 1e3 * (self.times[1] - self.times[0])
        self.events[1].synchronize()
        return float(self.events[0].elapsed_time(self.events[1]))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
