"""What a method costs: parameters, MACs, latency, peak memory.

Each number is that of the method alone: one forward pass in inference mode, without the backbone and the
probe, on inputs of noise. It is measured once per method and configuration (`cost_key`), not per task. Where
a method runs the backbone itself (`uses_backbone`), these passes are in its MACs, latency and peak memory,
and a warning says so; the backbone's parameters are in none of the numbers.

* parameters: elements of `method.parameters()`, frozen ones included; buffers are not.
* MACs: see `upbench.cost.macs`; one multiply-add is one MAC. Papers differ in what they print as FLOPs at
  448: RaysUp's 40.67 G are 2 x (MACs + biases) of its encoder's convolutions alone; AnyUp's 82.4 G agree with
  fvcore's MACs without those of the attention (82.3 G here); NAF's are 2 x MACs. Only numbers from one
  counter can be compared.
* latency: median and quartiles of the wall time of single passes, after warm-up, with the device synchronised
  before and after each. Nothing but the pass is inside the timed region.
* peak memory: what the pass needs beside the method and its inputs, its output included. On a GPU the
  allocator's maximum; on a CPU the resident set of a fresh process (`upbench.cost.peakmemory`).
"""

from __future__ import annotations

import copy
import gc
import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upbench._version import __version__
from upbench.contracts.backbone import Backbone
from upbench.contracts.upsampler import MacCount, Sizes, Upsampler, extras
from upbench.cost.macs import count_macs
from upbench.cost.peakmemory import PeakMemory, cpu_peak_memory
from upbench.errors import UpbenchError, unknown
from upbench.system.environment import cpu_name
from upbench.system.sources import source_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 3
MIN_REPEATS = 3
MAX_REPEATS = 50
_CORE = ("contracts/upsampler", "contracts/image", "cost/measure", "cost/macs", "cost/peakmemory")


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass.

    Attributes:
        parameters: Elements of the method's parameters, frozen ones included.
        macs: Multiply-accumulates; None where the method could not be traced (see `warnings`).
        latency_ms: Median wall time of a pass in milliseconds; of the whole batch.
        latency_q25_ms, latency_q75_ms: Its quartiles.
        repeats: Passes that were timed.
        peak_memory_bytes: Peak during a pass above what was held before it; None where it could not be had.
        memory_method: How that was measured, or why it was not.
        output_bytes: Size of the output, which the peak includes.
        device: "cpu" or "cuda".
        hardware: Name of the processor and its threads, or of the GPU.
        dtype: Of parameters and inputs.
        batch, channels, image_size, feature_size, output_size: Of the inputs and the output.
        uncounted: Operations that no rule counts, by name; empty for a complete count of MACs.
        warnings: What a reader of the numbers must know.
    """

    parameters: int
    macs: int | None
    latency_ms: float
    latency_q25_ms: float
    latency_q75_ms: float
    repeats: int
    peak_memory_bytes: int | None
    memory_method: str
    output_bytes: int
    device: str
    hardware: str
    dtype: str
    batch: int
    channels: int
    image_size: tuple[int, int]
    feature_size: tuple[int, int]
    output_size: tuple[int, int]
    uncounted: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def measure(
    method: Upsampler,
    *,
    channels: int,
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    output_size: tuple[int, int],
    batch: int = 1,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    seconds: float = 2.0,
    macs: bool = True,
    memory: bool = True,
    backbone: Backbone | None = None,
) -> Cost:
    """Measures one forward pass of a method. The method itself is left as it is: a copy is measured.

    Args:
        method: The method, on any device; weights do not matter.
        channels: C of the features.
        image_size: (h_img, w_img) of the guidance image.
        feature_size: (h, w) of the features.
        output_size: (H, W).
        batch: Images at a time; MACs, latency and memory are those of the whole batch.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16", for parameters and inputs.
        seconds: Time that timed passes may take together; at least 3 are made, at most 50.
        macs: Whether to count them (one more pass, traced).
        memory: Whether to measure the peak (on a CPU a new process, some seconds for its start).
        backbone: For methods that run it, on `device`.

    Raises:
        UpbenchError: A device or dtype that is not there, or that the method has no kernel for.
    """
    kind = _device(device)
    name, torch_dtype = _dtype(dtype)
    sizes = Sizes(channels, _pair(image_size), _pair(feature_size), _pair(output_size), batch)
    ready = copy.deepcopy(method).eval().requires_grad_(False).to(device, torch_dtype)
    inputs = sizes.inputs(torch_dtype, device)
    try:
        given = extras(ready, backbone=backbone)
        times, output_bytes = _time(_Bound(ready, sizes.output_size, given), inputs, seconds)
    except RuntimeError as error:
        if "not implemented for" in str(error):
            text = " ".join(str(error).split())
            raise UpbenchError(f"method '{method.name}' cannot run in {name} on {device}: {text}") from error
        if "allocate" in str(error):
            raise UpbenchError(
                f"method '{method.name}' does not fit into the memory of {device} at an output of "
                f"{sizes.output_size[0]}x{sizes.output_size[1]} with {channels} channels"
            ) from error
        raise
    counted, notes = _macs(ready, inputs, sizes.output_size, backbone) if macs else (None, [])
    if ready.uses_backbone:
        ran = ready.backbone if backbone is None else backbone
        notes.insert(0, f"MACs, time and memory include passes through the backbone {ran.name}")
    peak = PeakMemory(None, "not measured")
    if memory:
        if kind == "cuda":
            peak = _cuda_peak(_Bound(ready, sizes.output_size, given), inputs)
        else:
            peak = _cpu_peak(ready, sizes, torch_dtype, backbone)
    if len(times) < 2 * MIN_REPEATS:
        notes.append(f"latency from {len(times)} passes only")
    q25, median, q75 = statistics.quantiles(times, n=4, method="inclusive")
    return Cost(
        parameters=sum(p.numel() for p in method.parameters()),
        macs=None if counted is None else counted.total,
        latency_ms=median,
        latency_q25_ms=q25,
        latency_q75_ms=q75,
        repeats=len(times),
        peak_memory_bytes=peak.bytes,
        memory_method=peak.how,
        output_bytes=output_bytes,
        device=kind,
        hardware=hardware(device),
        dtype=name,
        batch=batch,
        channels=channels,
        image_size=sizes.image_size,
        feature_size=sizes.feature_size,
        output_size=sizes.output_size,
        uncounted=() if counted is None else counted.uncounted,
        warnings=tuple(notes),
    )


def cost_key(
    method: type[Upsampler] | str,
    options: Mapping[str, Any] | None = None,
    *,
    channels: int,
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    output_size: tuple[int, int],
    batch: int = 1,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    backbone: str = "",
) -> str:
    """A name for a measurement: equal for equal configurations on equal hardware and software, usable as a
    file name.

    Args:
        method: The method's class or name.
        options: Its constructor's options.
        channels: As for `measure`, like all that follow.
        image_size: (h_img, w_img).
        feature_size: (h, w).
        output_size: (H, W).
        batch: Images at a time.
        device: "cpu", "cuda" or "cuda:N".
        dtype: Of parameters and inputs.
        backbone: Name of the backbone; it only matters to methods that run it.
    """
    if isinstance(method, str):
        from upbench.registry import find_method

        method = find_method(method)
    sizes = Sizes(channels, _pair(image_size), _pair(feature_size), _pair(output_size), batch)
    kind, precision = _device(device), _dtype(dtype)[0]
    parts = (
        method.name,
        sorted((str(k), repr(v)) for k, v in (options or {}).items()),
        sizes,
        hardware(device),
        precision,
        torch.__version__,
        __version__,
        _source(source_files(method)),
        *([backbone] if method.uses_backbone else []),
    )
    digest = hashlib.sha256("\x1f".join(str(p) for p in parts).encode()).hexdigest()[:12]
    h, w = sizes.output_size
    return f"{method.name}-c{channels}-{h}x{w}-{precision}-{kind}-{digest}"


def hardware(device: str = "cpu") -> str:
    """The processor and the threads that PyTorch uses, or the GPU."""
    if _device(device) == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads != 1 else ''}"


def _device(device: str) -> str:
    kind = str(device).partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise unknown("device", str(device), ("cpu", "cuda"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise UpbenchError("device 'cuda' is not available on this machine")
    return kind


def _dtype(dtype: str | torch.dtype) -> tuple[str, torch.dtype]:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name, DTYPES[name]


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


@cache
def _source(files: tuple[Path, ...]) -> str:
    """Hash of the code that a measurement depends on: the method's files and those that measure."""
    digest = hashlib.sha256()
    core = Path(__file__).parents[1]
    for source in (*files, *(core / f"{name}.py" for name in _CORE)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(method: _Bound, inputs: tuple[Tensor, Tensor], seconds: float) -> tuple[list[float], int]:
    """Milliseconds of single passes, and bytes of the output."""
    image, features = inputs
    times: list[float] = []
    output_bytes = 0
    collecting = gc.isenabled()
    gc.disable()  # as `timeit` does: a collection that happens to fall into a pass is not the method's
    try:
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(WARM_UP):
                output = method(image, features)
                _synchronize(image.device)
                output_bytes = output.numel() * output.element_size()
                del output
                if time.perf_counter() - started > seconds / 4:
                    break
            started = time.perf_counter()
            while len(times) < MIN_REPEATS or (
                len(times) < MAX_REPEATS and time.perf_counter() - started < seconds
            ):
                _synchronize(image.device)
                before = time.perf_counter()
                output = method(image, features)
                _synchronize(image.device)
                times.append((time.perf_counter() - before) * 1e3)
                del output  # its release is not part of the next pass
    finally:
        if collecting:
            gc.enable()
    return times, output_bytes


class _Bound(nn.Module):
    """A method with all filled in but image and features, so that its inputs are tensors only."""

    def __init__(
        self, method: Upsampler, size: tuple[int, int], given: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.method = method
        self.size = size
        self.given = dict(given or {})  # a dictionary hides a backbone from `nn.Module`

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        """See `Upsampler.forward`."""
        output: Tensor = self.method(image, features, self.size, **self.given)
        return output


def _macs(
    method: Upsampler, inputs: tuple[Tensor, Tensor], size: tuple[int, int], backbone: Backbone | None
) -> tuple[MacCount | None, list[str]]:
    """The count, and what is to be said about it."""
    try:
        counted = method.macs(*inputs, size, **extras(method, "macs", backbone=backbone))
        if counted is None:
            counted = count_macs(_Bound(method, size, extras(method, backbone=backbone)), *inputs)
    except (
        Exception
    ) as error:  # a plugin may do what no trace can follow; its other costs are still worth having
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return None, [f"MACs not counted: {text[:200]}"]
    notes = [counted.note] if counted.note else []
    if counted.uncounted:
        notes.append(f"MACs leave out {', '.join(counted.uncounted)}")
    return counted, notes


def _cpu_peak(method: Upsampler, sizes: Sizes, dtype: torch.dtype, backbone: Backbone | None) -> PeakMemory:
    return cpu_peak_memory(method, sizes, dtype, backbone)


def _cuda_peak(method: _Bound, inputs: tuple[Tensor, Tensor]) -> PeakMemory:
    image, features = inputs
    with torch.inference_mode():
        _synchronize(image.device)
        torch.cuda.reset_peak_memory_stats(image.device)
        before = torch.cuda.memory_allocated(image.device)
        output = method(image, features)
        _synchronize(image.device)
        peak = torch.cuda.max_memory_allocated(image.device) - before
    del output
    return PeakMemory(peak, "allocated above the value before the forward (torch.cuda.max_memory_allocated)")
