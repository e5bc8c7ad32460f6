"""Where the renderer finds its assets, and one-line errors that say what to install when it does not.

* furniture: the `.sh3f` files of the Debian package `sweethome3d-furniture`
* light: the HDR environments of the npm package `@pmndrs/assets`
* LLVM: `libLLVM.so` of version 15 or later, but not the 14 of Debian 12, which aborts on Mitsuba's code
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path

from upbench.errors import UpbenchError

ENVIRONMENTS = (
    "apartment", "bridge", "city", "dawn", "esplanade", "forest", "lobby", "park", "sunset", "venice",
    "warehouse", "workshop",
)  # fmt: skip
"""Environments with enough light from above; `night`, `studio` and a few more make flat or black rooms."""

_SYSTEM_FURNITURE = Path("/usr/share/sweethome3d/furniture")
_LLVM_PATTERNS = ("libLLVM.so.*", "libLLVM-1[5-9].so*", "libLLVM-[2-9][0-9].so*")
_LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


@dataclass(frozen=True)
class Assets:
    """Folders of the furniture files, of the environments, and of what the renderer derives from them."""

    furniture: Path
    environments: Path
    cache: Path

    def environment(self, name: str) -> Path:
        """The OpenEXR file of an environment, unpacked from its JavaScript module where need be."""
        path = self.cache / "environments" / f"{name}.exr"
        if not path.is_file():
            text = (self.environments / f"{name}.exr.js").read_text()
            match = re.search(r"base64,([A-Za-z0-9+/=]+)", text)
            if match is None:
                raise UpbenchError(f"{name}.exr.js in {self.environments} holds no base64 data")
            write_atomic(path, base64.b64decode(match.group(1)))
        return path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is either whole or not there, also if two processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def default_folder() -> Path:
    """`$UPBENCH_RENDER_ASSETS`, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("UPBENCH_RENDER_ASSETS") or cache / "upbench" / "render")


def locate(folder: Path | None = None) -> Assets:
    """Finds the assets below `folder`, or where their packages put them.

    Args:
        folder: has `furniture/*.sh3f` (or the Debian package is installed) and `node_modules/@pmndrs/assets`,
            from `npm install --prefix FOLDER @pmndrs/assets`; converted models are kept in its `cache`.
            Default: `$UPBENCH_RENDER_ASSETS`, else `~/.cache/upbench/render`.

    Raises:
        UpbenchError: an asset is missing; names its package.
    """
    folder = folder or default_folder()
    furniture = next((f for f in (folder / "furniture", _SYSTEM_FURNITURE) if any(f.glob("*.sh3f"))), None)
    if furniture is None:
        raise UpbenchError(
            f"no furniture: install the Debian package sweethome3d-furniture, or put its .sh3f files into "
            f"{folder / 'furniture'}"
        )
    environments = folder / "node_modules" / "@pmndrs" / "assets" / "hdri"
    if not all((environments / f"{name}.exr.js").is_file() for name in ENVIRONMENTS):
        raise UpbenchError(f"no environments: run npm install --prefix {folder} @pmndrs/assets")
    return Assets(furniture, environments, folder / "cache")


def find_llvm() -> None:
    """Points Dr.Jit at an LLVM that works, unless `DRJIT_LIBLLVM_PATH` says where one is.

    Raises:
        UpbenchError: there is none.
    """
    if os.environ.get("DRJIT_LIBLLVM_PATH"):
        return
    found = [
        path for f in _LIBRARY_FOLDERS for pattern in _LLVM_PATTERNS for path in sorted(Path(f).glob(pattern))
    ]
    if not found:
        raise UpbenchError(
            "no LLVM 15 or later: install the Debian package libllvm19 or set DRJIT_LIBLLVM_PATH"
        )
    newest = max(found, key=lambda path: int((re.search(r"(\d\d)", path.name) or ["0"])[0]))
    os.environ["DRJIT_LIBLLVM_PATH"] = str(newest)
