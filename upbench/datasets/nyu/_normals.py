"""Surface normals as FAIR hands them on (`all_normals.pklz`), and which way their axes point."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upbench.errors import UpbenchError
from upbench.system.cache import cache_dir, digest, replacing

_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""What a pickle of arrays is made of."""


class _Arrays(pickle.Unpickler):
    """Reads arrays, lists and mappings, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in _PARTS:
            raise UpbenchError(f"it holds '{module}.{name}', and arrays are expected")
        return super().find_class(module, name)


def load_normals(file: Path, shape: Sequence[int]) -> Any:
    """`[N, H, W, 3]` float32, mapped into memory.

    The pickle is read as a whole, once (some ten gigabytes of memory for the official one), and kept in the
    cache as an array that can be read in parts.

    Args:
        file: A gzipped pickle of a mapping with "all_normals".
        shape: That it must have.

    Raises:
        UpbenchError: It is damaged, holds something else, or does not fit.
    """
    stamp = file.stat()
    kept = cache_dir("datasets") / f"normals-{digest(file.absolute(), stamp.st_size, stamp.st_mtime_ns)}.npy"
    if not kept.is_file():
        with replacing(kept) as temporary, temporary.open("wb") as stream:
            np.save(stream, _unpickled(file))
    found = np.load(kept, mmap_mode="r")
    if tuple(found.shape) != tuple(shape):
        raise UpbenchError(f"{file} has normals {list(found.shape)}, the images are {list(shape)}")
    return found


def _unpickled(file: Path) -> Any:
    try:
        with gzip.open(file, "rb") as stream:
            # written by Python 2: bytes of arrays are texts to it
            return np.asarray(_Arrays(stream, encoding="latin1").load()["all_normals"], dtype=np.float32)
    except UpbenchError as error:
        raise UpbenchError(f"cannot read {file}: {error}") from error
    except Exception as error:  # of a damaged file it raises anything
        text = " ".join(str(error).split())
        raise UpbenchError(
            f"cannot read {file}: it is damaged, or no mapping with 'all_normals' ({text})"
        ) from error


def axis_signs(pairs: Sequence[tuple[Any, Any]], intrinsics: Sequence[float], what: str) -> Tensor:
    """`[3]` of 1 and -1: what brings normals into a camera's axes (x right, y down, z forward).

    Published normals come with axes in several directions, and nothing in the files says which. Depth does:
    its own normals, by differences, have to agree.

    Args:
        pairs: Normals `[H, W, 3]` and depth `[H, W]` (metres, 0 unknown) of some images.
        intrinsics: fx, fy, cx, cy.
        what: What they are called in the error.

    Raises:
        UpbenchError: They agree in no direction of some axis.
    """
    total, weight = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for normal, depth in pairs:
        own, known = _from_depth(torch.as_tensor(depth).double(), intrinsics)
        given = torch.as_tensor(normal).double()[1:-1, 1:-1]
        total += (own * given)[known].sum(0)
        weight += (own * given)[known].abs().sum(0)
    agreement = total / weight.clamp(min=1e-12)
    if float(weight.min()) > 0 and float(agreement.abs().min()) < 0.2:
        shown = ", ".join(f"{value:+.2f}" for value in agreement.tolist())
        raise UpbenchError(f"{what}: normals do not fit the depth (agreement along x, y, z: {shown})")
    return torch.where(agreement < 0, -1.0, 1.0).float()


def _from_depth(depth: Tensor, intrinsics: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`[H-2, W-2, 3]` unit normals facing the viewer, and `[H-2, W-2]` where they are known."""
    fx, fy, cx, cy = intrinsics
    height, width = depth.shape
    x = (torch.arange(width, dtype=depth.dtype) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=depth.dtype) + 0.5 - cy) / fy
    points = torch.stack([x[None, :] * depth, y[:, None] * depth, depth], dim=-1)
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normal = torch.linalg.cross(down, across)
    length = normal.norm(dim=-1, keepdim=True)
    near = [depth[1:-1, 2:], depth[1:-1, :-2], depth[2:, 1:-1], depth[:-2, 1:-1]]
    whole = torch.stack(near).amin(0) > 0
    smooth = torch.stack(near).amax(0) < 1.05 * torch.stack(near).amin(0)  # not across the edge of an object
    return normal / length.clamp(min=1e-12), whole & smooth & (length[..., 0] > 0)
