"""Dense features of any size through bounded memory: tile by tile, or into a file.

384 channels at 2048 x 2048 are 3.2 GB in bfloat16 before anything was computed. Here a method is asked for
rectangles of its output, one at a time, which are used and dropped: shown, written to a file that
need not fit into memory, or projected to a few classes at once, so that the C channels never exist at full
size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.contracts.operator import FunctionOperator, Operator, SourcedOperator
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler, extras
from upbench.errors import UpbenchError
from upbench.ops.operator import project as project_low
from upbench.system.allocator import trim
from upbench.system.cache import replacing
from upbench.system.progress import track

DEFAULT_BUDGET = 1 << 30
"""Bytes of working memory that streaming stays near unless told otherwise."""

_QUERY_CHANNELS = 1024  # channels that computing a pixel takes beside its values, about
_LEAST = 32  # pixels of a tile's sides


class Tile(NamedTuple):
    """A rectangle of the output.

    Attributes:
        rows: Of the output that it covers.
        cols: Of the output that it covers.
        values: `[B, C, n, m]`, or `[B, K, n, m]` after a projection.
    """

    rows: slice
    cols: slice
    values: Tensor


def upsample_tiles(
    method: Upsampler,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int],
    *,
    tile: int | tuple[int, int] | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    project: Tensor | None = None,
    bias: Tensor | None = None,
    camera: Camera | None = None,
    backbone: Backbone | None = None,
) -> Iterator[Tile]:
    """The output of a method, tile by tile; equal to that of its `forward` but for rounding. No gradients.

    RaysUp, AnyUp and NAF compute nothing but the tile, whatever the sizes; the encoding of an image that is
    too large for the budget is computed anew for every tile, with exact normalisation over the whole image.
    Interpolations do the same. Methods that hold something for every pixel of the output (their `operator`)
    need memory for that beside the budget. The rest have their whole output computed at once, and are refused
    where it exceeds the budget.

    Args:
        method: In eval mode.
        image: `[B, 3, h_img, w_img]`, normalised, as for `Upsampler.forward`.
        features: `[B, C, h, w]`.
        output_size: (H, W).
        tile: Side of the tiles in pixels, or (rows, columns); full rows that suit the budget by default.
        memory_budget: Bytes of working memory to stay near, beside the inputs.
        project: `[K, C]`, a linear head that is applied to every pixel. Methods with a linear operator apply
            it at low resolution, at K / C of the cost and with the same result.
        bias: `[K]`, added after `project`.
        camera: For methods that use one.
        backbone: For methods that run it, on the device of `image`.

    Returns:
        An iterator over the tiles, row by row. Tiles are new tensors in the dtype of `features`.

    Raises:
        UpbenchError: Shapes that do not fit, or an output that the method cannot produce within the budget.
            Raised by the call, not by the first tile.
    """
    _check(method, image, features, output_size, project, bias, camera)
    channels = int(features.shape[1] if project is None else project.shape[0])
    grid = _tile_size(tile, memory_budget, features, channels, output_size)
    with torch.no_grad():
        compute = _source(method, image, features, output_size, memory_budget, project, camera, backbone)
    summand = None if bias is None else bias.to(features).view(-1, 1, 1)
    return _tiles(compute, output_size, grid, summand)


def upsample_to(
    target: str | os.PathLike[str] | np.ndarray | Tensor,
    method: Upsampler,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int],
    *,
    dtype: str | None = None,
    tile: int | tuple[int, int] | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    project: Tensor | None = None,
    bias: Tensor | None = None,
    camera: Camera | None = None,
    backbone: Backbone | None = None,
) -> None:
    """Writes the output of a method to a file or an array, tile by tile.

    A file is complete or not there. `numpy.load(path, mmap_mode="r")` opens it without reading it.

    Args:
        target: Path of a `.npy` file, or an array or tensor `[B, C, H, W]` (`[B, K, H, W]` with `project`).
        method: As for `upsample_tiles`, like all that follow.
        image: `[B, 3, h_img, w_img]`, normalised.
        features: `[B, C, h, w]`.
        output_size: (H, W).
        dtype: "float16" or "float32" of a file; by default float16 for float16 features, else float32 (NumPy
            knows no bfloat16).
        tile: Side of the tiles, or (rows, columns).
        memory_budget: Bytes of working memory to stay near, beside inputs and target.
        project: `[K, C]`, a linear head.
        bias: `[K]`.
        camera: For methods that use one.
        backbone: For methods that run it, on the device of `image`.

    Raises:
        UpbenchError: As `upsample_tiles`; a target of another shape; a file that cannot be written.
    """
    tiles = upsample_tiles(
        method,
        image,
        features,
        output_size,
        tile=tile,
        memory_budget=memory_budget,
        project=project,
        bias=bias,
        camera=camera,
        backbone=backbone,
    )
    channels = int(features.shape[1] if project is None else project.shape[0])
    grid = _tile_size(tile, memory_budget, features, channels, output_size)
    count = math.prod(-(-length // step) for length, step in zip(output_size, grid, strict=True))
    shape = (int(features.shape[0]), channels, *output_size)
    if isinstance(target, np.ndarray | Tensor):
        if tuple(target.shape) != shape:
            raise UpbenchError(f"target is {list(target.shape)}, the output {list(shape)}")
        for rows, cols, values in track(tiles, "upsample", count):
            here = values if isinstance(target, Tensor) else _numpy(values, target.dtype)
            target[:, :, rows, cols] = here  # type: ignore[index, assignment]
        return
    path = Path(target)
    if path.suffix != ".npy":
        raise UpbenchError(f"streamed features are written to .npy files, not to {path}")
    if dtype not in (None, "float16", "float32"):
        raise UpbenchError(f"dtype of a file of features is float16 or float32, not {dtype}")
    kind = np.dtype(dtype or ("float16" if features.dtype == torch.float16 else "float32"))
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + math.prod(shape) * kind.itemsize)
        for rows, cols, values in track(tiles, "upsample", count):
            _write(file, start, _numpy(values, kind), rows, cols, output_size)


def _check(
    method: Upsampler,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int],
    project: Tensor | None,
    bias: Tensor | None,
    camera: Camera | None,
) -> None:
    if image.ndim != 4 or features.ndim != 4 or image.shape[0] != features.shape[0] or image.shape[1] != 3:
        raise UpbenchError(
            f"image must be [B, 3, h, w] and features [B, C, h, w], "
            f"got {list(image.shape)} and {list(features.shape)}"
        )
    if len(output_size) != 2 or min(output_size) < 1:
        raise UpbenchError(f"output size must be (H, W), got {output_size}")
    c = int(features.shape[1])
    if project is not None and (project.ndim != 2 or project.shape[1] != c):
        raise UpbenchError(f"projection must be [K, {c}], got {list(project.shape)}")
    if bias is not None and (project is None or tuple(bias.shape) != (project.shape[0],)):
        raise UpbenchError(f"bias {list(bias.shape)} does not go with a projection [K, C]")
    if camera is not None and not method.uses_camera:
        raise UpbenchError(f"method '{method.name}' takes no camera")


def _tile_size(
    tile: int | tuple[int, int] | None,
    memory_budget: int,
    features: Tensor,
    channels: int,
    output_size: tuple[int, int],
) -> tuple[int, int]:
    """Rows and columns of a tile."""
    if tile is not None:
        rows, cols = (tile, tile) if isinstance(tile, int) else tile
        if min(rows, cols) < 1:
            raise UpbenchError(f"tile must be at least one pixel, got {tile}")
        return rows, cols
    pixel = int(features.shape[0]) * features.element_size() * (2 * channels + _QUERY_CHANNELS)
    area = memory_budget // (2 * pixel)
    width = output_size[1]
    if area >= _LEAST * width:
        return area // width, width
    side = max(_LEAST, math.isqrt(area))
    return side, side


def _tiles(
    compute: Callable[[slice, slice], Tensor],
    output_size: tuple[int, int],
    grid: tuple[int, int],
    bias: Tensor | None,
) -> Iterator[Tile]:
    starts = (range(0, length, step) for length, step in zip(output_size, grid, strict=True))
    for top, left in product(*starts):
        rows = slice(top, min(top + grid[0], output_size[0]))
        cols = slice(left, min(left + grid[1], output_size[1]))
        with torch.no_grad():
            values = compute(rows, cols)
            yielded = values if bias is None else values + bias
        del values
        trim()
        yield Tile(rows, cols, yielded)
        del yielded


def _source(
    method: Upsampler,
    image: Tensor,
    features: Tensor,
    output_size: tuple[int, int],
    memory_budget: int,
    weight: Tensor | None,
    camera: Camera | None,
    backbone: Backbone | None,
) -> Callable[[slice, slice], Tensor]:
    """What computes a rectangle of the output, projected where there is a weight."""
    weight = None if weight is None else weight.to(features)
    given = extras(method, "tile_operator", camera=camera, backbone=backbone)
    operator = method.tile_operator(image, features, output_size, **given, memory_budget=memory_budget)
    if operator is None:
        _refuse_large(method, features, int(features.shape[1]), output_size, memory_budget)
        dense = method(image, features, output_size, **extras(method, camera=camera, backbone=backbone))
        if weight is None:
            return lambda rows, cols: dense[:, :, rows, cols].contiguous()
        return lambda rows, cols: torch.einsum("kc,bcij->bkij", weight, dense[:, :, rows, cols])
    low = operator.takes(features)
    low = low if weight is None else project_low(weight, low, operator.groups)

    def apply(part: Operator) -> Tensor:
        return part.dense(low) if weight is None else part(low)

    inner = operator.operator if isinstance(operator, SourcedOperator) else operator
    if isinstance(inner, FunctionOperator):  # each of its crops would compute the whole
        channels = int(features.shape[1]) if weight is None else len(weight)
        _refuse_large(method, features, channels, output_size, memory_budget)
        whole = apply(operator)
        return lambda rows, cols: whole[:, :, rows, cols].contiguous()
    return lambda rows, cols: apply(operator.crop(rows, cols))


def _refuse_large(
    method: Upsampler, features: Tensor, channels: int, output_size: tuple[int, int], budget: int
) -> None:
    needed = int(features.shape[0]) * channels * math.prod(output_size) * features.element_size()
    if needed > budget:
        raise UpbenchError(
            f"method '{method.name}' computes its output as a whole, {needed / 1e9:.2f} GB for {channels} "
            f"channels at {output_size[0]}x{output_size[1]}: more than the memory budget of "
            f"{budget / 1e9:.2f} GB"
        )


def _numpy(values: Tensor, dtype: np.dtype) -> np.ndarray:
    wide = values.float() if values.dtype == torch.bfloat16 else values
    array: np.ndarray = np.ascontiguousarray(wide.cpu().numpy(), dtype=dtype)
    return array


def _write(
    file: IO[bytes], start: int, values: np.ndarray, rows: slice, cols: slice, output_size: tuple[int, int]
) -> None:
    """Writes a rectangle of every channel into the file of an array `[B, C, H, W]`.

    Written, not mapped: pages of a mapping count as the process's memory.
    """
    height, width = output_size
    whole_rows = cols.start == 0 and cols.stop == width
    for index, plane in enumerate(values.reshape(-1, *values.shape[2:])):
        runs = [plane] if whole_rows else list(plane)
        for row, run in enumerate(runs, rows.start):
            place = (index * height + row) * width + cols.start
            file.seek(start + place * values.itemsize)
            left = memoryview(run).cast("B")
            while left:
                left = left[file.write(left) or 0 :]
