"""Presets: the sizes and the probe training that numbers are comparable under. Imports no torch.

A preset's `protocol` ("quick-v1") stands in every record. Any change here that can move a number raises
`version`. Why the values are what they are, and the measurement that the probe has converged, is in
docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from upbench.errors import UpbenchError, unknown


@dataclass(frozen=True)
class ProbeConfig:
    """How a linear probe is trained; the same for every method.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW, for features that were conditioned (see `shrinkage`).
        weight_decay: Decoupled weight decay of AdamW, on the weight and not on the bias.
        warmup: Share of all steps over which the learning rate rises linearly from 0.
        schedule: "cosine" (to 0 at the last step) or "constant", after the warm-up.
        crop: Side of the random crop of the output that a step sees, as a share of the output's side.
        shrinkage: How far features are decorrelated before the probe is fitted. Along a principal axis of
            variance v they are scaled by 1 / sqrt(v + shrinkage * m), with m the mean variance of the
            axes: 0 is whitening, a large value leaves the axes as they are. An affine reparametrisation of
            the same probe, folded into its weight and bias.
    """

    epochs: int = 60
    batch_size: int = 8
    lr: float = 0.01
    weight_decay: float = 0.3
    warmup: float = 0.05
    schedule: str = "cosine"
    crop: float = 0.25
    shrinkage: float = 1.0

    def __post_init__(self) -> None:
        _choice("probe schedule", self.schedule, ("cosine", "constant"))
        limits = {"crop": 1, "warmup": 1, "lr": 10, "weight_decay": 10, "shrinkage": 1000}
        for name, high in limits.items():
            low, value = 0, getattr(self, name)
            zero = name in ("warmup", "weight_decay", "shrinkage")
            if not low <= value <= high or (value == low and not zero):
                bracket = "[" if zero else "("
                raise UpbenchError(f"probe {name} must be in {bracket}{low}, {high}], got {value}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UpbenchError(f"probe {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Preset:
    """A named and versioned protocol.

    Attributes:
        name: As in `--preset quick`.
        version: Rises with every change that can move a number.
        image_size: Side in pixels of the image that the backbone and the guidance see.
        output_size: Side in pixels of the upsampled features, of the ground truth and of the evaluation.
        probe: Training of the linear probe; a task's own `probe` entries take precedence.
    """

    name: str
    version: int
    image_size: int
    output_size: int
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def protocol(self) -> str:
        """Name and version, as in "quick-v1"."""
        return f"{self.name}-v{self.version}"

    def probe_for(self, overrides: Mapping[str, Any] | None = None) -> ProbeConfig:
        """The preset's probe training with some fields replaced (a task's, a user's).

        Raises:
            UpbenchError: A field that `ProbeConfig` does not have, or a value out of range.
        """
        for name in overrides or {}:
            if name not in asdict(self.probe):
                raise unknown("probe setting", name, asdict(self.probe))
        return replace(self.probe, **(overrides or {}))


def _choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise unknown(what, value, choices)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("quick", version=1, image_size=224, output_size=224),
        Preset("standard", version=1, image_size=448, output_size=448),
    )
}
"""Presets by name."""


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UpbenchError: There is none; the nearest name is suggested.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
