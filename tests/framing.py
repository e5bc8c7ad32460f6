"""Frames of every geometry, and what Pillow makes of an image step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from upbench.contracts.geometry import FILTERS, Frame, Geometry
from upbench.contracts.sample import Camera, Sample
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Squash, Windows

STRIDE = 14
SOURCES = [(61, 83), (90, 47), (56, 56)]

GEOMETRIES: dict[str, Geometry] = {
    "square": SquareCrop(42),
    "torchvision": SquareCrop(42, filter="bilinear", long_side="floor", centre="round"),
    "square, floor and floor": SquareCrop(43, filter="lanczos", long_side="floor"),
    "square, enlarged": SquareCrop(112, centre="round"),
    "squash": Squash(40, 56),
    "squash, nearest": Squash(97, 33, filter="nearest"),
    "native": NativeAspect(),
    "native, cut": NativeAspect(fit="crop"),
    "native, short": NativeAspect(short=45, multiple=7, filter="bilinear"),
    "native, short and cut": NativeAspect(short=45, multiple=8, fit="crop"),
    "padded": PaddedSquare(56),
    "padded in a corner": PaddedSquare(70, place="corner", fill=(255, 250, 3), filter="bicubic"),
    "windows": Windows(28, 20),
    "windows of a larger image": Windows(28, 17, short=45, filter="bilinear"),
}


def frames() -> Iterator[Any]:
    """Names and frames of every geometry and source, mirrored and not; of windows, the first and the last."""
    for name, geometry in GEOMETRIES.items():
        for source in SOURCES:
            every = geometry.frames(source, STRIDE)
            for which, frame in {0: every[0], len(every) - 1: every[-1]}.items():
                title = f"{name} of {source[0]}x{source[1]}" + (f" #{which}" if which else "")
                yield title, frame
                yield f"{title}, mirrored", frame.mirror()


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """`[3, H, W]` uint8 of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def pillow(image: Tensor, frame: Frame) -> Tensor:
    """The frame by Pillow alone: padded, resized, cropped, flipped; `[3, h, w]` uint8."""
    made = Image.fromarray(image.permute(1, 2, 0).numpy())
    top, left, bottom, right = frame.pad
    canvas = Image.new("RGB", (left + made.width + right, top + made.height + bottom), frame.fill)
    canvas.paste(made, (left, top))
    return _finished(canvas.resize(frame.resized[::-1], FILTERS[frame.filter]), frame).permute(2, 0, 1)


def pillow_map(values: Tensor, frame: Frame, fill: int) -> Tensor:
    """A map (`[H, W]` int32) by Pillow's NEAREST."""
    made = Image.fromarray(values.to(torch.int32).numpy())
    top, left, bottom, right = frame.pad
    canvas = Image.new("I", (left + made.width + right, top + made.height + bottom), fill)
    canvas.paste(made, (left, top))
    return _finished(canvas.resize(frame.resized[::-1], Image.Resampling.NEAREST), frame)


def _finished(resized: Image.Image, frame: Frame) -> Tensor:
    (h, w), (top, left) = frame.size, frame.offset
    made = resized.crop((left, top, left + w, top + h))
    made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if frame.mirrored else made
    return torch.from_numpy(np.array(made))


def numbered(height: int, width: int) -> Tensor:
    """`[H, W]` int32, every pixel its own number."""
    return torch.arange(height * width, dtype=torch.int32).view(height, width)


def posed(batch: int = 1, dtype: torch.dtype = torch.float64) -> Camera:
    """A camera that looks somewhere from somewhere."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=dtype)).Q
    rotation = rotation * torch.linalg.det(rotation)
    pose = torch.eye(4, dtype=dtype)
    pose[:3, :3], pose[:3, 3] = rotation, torch.randn(3, dtype=dtype)
    return Camera(
        torch.tensor([[70.0, 64.0, 40.5, 29.0]], dtype=dtype).repeat(batch, 1), pose.repeat(batch, 1, 1)
    )


def plane(height: int, width: int, name: str = "plane") -> Sample:
    """A tilted plane with its exact depth and normals, in float64."""
    camera = Camera(torch.tensor([[70.0, 64.0, width / 2 - 3, height / 2 + 2]], dtype=torch.float64))
    normal = torch.tensor([0.3, -0.5, -1.0], dtype=torch.float64)
    normal = normal / normal.norm()
    depth = -2 / (rays(camera, height, width) * normal[:, None, None]).sum(0)
    return Sample(
        name,
        picture(height, width),
        depth=depth,
        normal=normal[:, None, None].repeat(1, height, width),
        camera=camera,
    )


def rays(camera: Camera, height: int, width: int) -> Tensor:
    """`[3, H, W]` directions through pixels, of depth 1."""
    fx, fy, cx, cy = camera.intrinsics[0].double()
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    return torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x)])
