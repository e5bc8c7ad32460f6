"""Peak memory of one forward pass on the CPU, in a process of its own.

In a process that has run before, freed memory that the allocator kept is used again and does not show; a
fresh process has none. The method is sent there, runs once on a tiny input (libraries, thread pools), and the
resident set before and its high-water mark during the forward are read from the kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upbench.contracts.upsampler import Sizes, extras
from upbench.system.allocator import trim
from upbench.system.parent import end_with_parent

if TYPE_CHECKING:
    import torch

    from upbench.contracts.backbone import Backbone
    from upbench.contracts.upsampler import Upsampler

LINUX = "resident set above its value before the forward (VmHWM), fresh process"
UNIX = "growth of ru_maxrss, fresh process: a lower bound"
_PAYLOAD = "payload.pt"
_TIMEOUT = 600


@dataclass(frozen=True)
class PeakMemory:
    """What a measurement found.

    Attributes:
        bytes: Peak during the forward above what was held before it, the output included; None where it could
            not be had.
        how: How it was measured, or why it was not.
    """

    bytes: int | None
    how: str


def cpu_peak_memory(
    method: Upsampler, sizes: Sizes, dtype: torch.dtype, backbone: Backbone | None = None
) -> PeakMemory:
    """Peak memory of one forward pass on the CPU, with this process's number of threads.

    Args:
        method: On the CPU, in `dtype`. Its class must be importable by a new process, or lie in a file.
        sizes: Of the inputs.
        dtype: Of the inputs.
        backbone: For methods that run it, on the CPU.

    Returns:
        The peak, or the reason why there is none.
    """
    if sys.platform == "win32":
        return PeakMemory(None, "not measured on Windows")
    cls = type(method)
    if cls.__module__ == "__main__":
        return PeakMemory(None, f"not measured: {cls.__name__} is not in a module but in a script")
    try:
        payload = _pack(method, sizes, dtype, backbone)
    except Exception as error:
        return PeakMemory(None, f"not measured: {cls.__name__} cannot be sent to a process ({_line(error)})")
    with tempfile.TemporaryDirectory(prefix="upbench-") as folder:
        Path(folder, _PAYLOAD).write_bytes(payload)
        return _run(folder)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _pack(method: Upsampler, sizes: Sizes, dtype: torch.dtype, backbone: Backbone | None) -> bytes:
    """A JSON header, which says where the class is, and the pickled method and backbone."""
    import torch

    head = {
        "module": type(method).__module__,
        "file": inspect.getsourcefile(type(method)),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": asdict(sizes),
    }
    buffer = io.BytesIO()
    torch.save((method, backbone), buffer)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + buffer.getvalue()


def _run(folder: str) -> PeakMemory:
    # The child sees what this process sees, but not what happens to lie in the current folder.
    path = [str(Path(entry).resolve()) for entry in sys.path if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", "from upbench.cost.peakmemory import main; main()"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        return PeakMemory(None, f"not measured: {_line(error)}")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return PeakMemory(None, f"not measured: the process failed ({reason})")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return PeakMemory(answer["bytes"], answer["how"])


def main() -> None:
    """Measures the payload in the current folder and prints the answer as JSON; runs in the fresh process."""
    end_with_parent()
    import torch

    raw = Path(_PAYLOAD).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:start])
    _import(head["module"], head["file"])
    torch.set_num_threads(head["threads"])
    method: Upsampler
    method, backbone = torch.load(io.BytesIO(raw[start:]), weights_only=False)
    given = extras(method.eval(), backbone=backbone)
    del raw
    sizes = Sizes(**head["sizes"])
    image, features = sizes.inputs(getattr(torch, head["dtype"]))
    h, w = sizes.feature_size
    with torch.inference_mode():
        # The same grid, so that methods with windows accept it, but few pixels.
        method(image[..., : 2 * h, : 2 * w].contiguous(), features, (h, w), **given)
        meter = _Meter()
        output = method(image, features, (sizes.output_size[0], sizes.output_size[1]), **given)
        peak = meter.peak()
    del output
    print(json.dumps({"bytes": peak, "how": meter.how}))


def _import(module: str, file: str | None) -> None:
    """Imports the method's module, from its file where no import path leads to it (a plugin file)."""
    try:
        importlib.import_module(module)
    except ImportError:
        if file is None:
            raise
        spec = importlib.util.spec_from_file_location(module, file)
        if spec is None or spec.loader is None:
            raise
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)


class _Meter:
    """Peak resident memory from now on, above what is resident now."""

    def __init__(self) -> None:
        trim()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.how, self.before = LINUX, _status("VmRSS")
        except OSError:
            self.how, self.before = UNIX, _maxrss()

    def peak(self) -> int:
        """Bytes."""
        now = _status("VmHWM") if self.how == LINUX else _maxrss()
        return max(0, now - self.before)


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _maxrss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
