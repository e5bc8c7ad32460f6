"""Which camera a method that uses one is given: `camera:` of a row in a run's YAML. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upbench.errors import UpbenchError, unknown

if TYPE_CHECKING:
    from upbench.contracts.sample import Camera

SOURCES = ("identity", "dataset")
_FORM = re.compile(r"(?P<source>[^\s*]*)\s*(?:\*\s*(?P<focal>\S+))?(?:\s+at\s+(?P<place>.+))?")


@dataclass(frozen=True)
class CameraChoice:
    """The dataset's cameras, true or made wrong on purpose; or none.

    As text: "" or "identity" (no camera: the method's own stand-in), "dataset" (that of each sample),
    "dataset*2" (its focal lengths times 2, as if the field of view were narrower), "dataset at 0,-1.4,0" (at
    this place in the world), or both: "dataset*2 at 0,-1.4,0".

    Attributes:
        dataset: Whether samples' cameras are given to the method.
        focal: Factor on both focal lengths.
        place: World coordinates of the camera's centre in metres (x right, y down, z forward for the identity
            pose); None for where the dataset has it.
    """

    dataset: bool = False
    focal: float = 1.0
    place: tuple[float, float, float] | None = None

    @classmethod
    def parse(cls, text: str) -> CameraChoice:
        """The choice that a text stands for.

        Raises:
            UpbenchError: It stands for none.
        """
        found = _FORM.fullmatch(text.strip())
        source = found["source"] if found else text.strip()
        if found is None or (source and source not in SOURCES):
            raise unknown("camera", source, SOURCES)
        if source != "dataset":
            if found["focal"] or found["place"]:
                raise UpbenchError(f"camera '{text}': only the camera 'dataset' can be changed")
            return cls()
        focal = _number(found["focal"] or "1", text)
        if focal <= 0:
            raise UpbenchError(f"camera '{text}': focal lengths need a positive factor")
        place = None
        if found["place"]:
            numbers = [_number(part, text) for part in found["place"].split(",")]
            if len(numbers) != 3:
                raise UpbenchError(f"camera '{text}': a place is three numbers, as in 'dataset at 0,-1.4,0'")
            place = (numbers[0], numbers[1], numbers[2])
        return cls(True, focal, place)

    def __str__(self) -> str:
        if not self.dataset:
            return ""
        focal = "" if self.focal == 1 else f"*{self.focal:g}"
        place = "" if self.place is None else f" at {','.join(f'{value:g}' for value in self.place)}"
        return f"dataset{focal}{place}"

    def apply(self, camera: Camera) -> Camera | None:
        """What the method is given where a sample has this camera; None for its stand-in."""
        if not self.dataset:
            return None
        import torch

        from upbench.contracts.sample import Camera

        intrinsics, pose = camera.intrinsics, camera.pose
        if self.focal != 1:
            intrinsics = intrinsics * intrinsics.new_tensor([self.focal, self.focal, 1, 1])
        if self.place is not None:
            pose = torch.eye(4).to(intrinsics).repeat(len(intrinsics), 1, 1) if pose is None else pose.clone()
            pose[:, :3, 3] = pose.new_tensor(self.place)
        return Camera(intrinsics, pose)


def _number(text: str, camera: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UpbenchError(f"camera '{camera}': expected a number, got '{text.strip()}'")
    return value
