"""What the methods of a run cost: measurements that cells share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upbench.cost import measure as cost
from upbench.features import backbones
from upbench.run.describe import describe_error
from upbench.run.jobs import Job, PlannedCell, build_method, settings_kept


@dataclass(frozen=True)
class CostJob:
    """A measurement of a method's cost, for all cells that share it.

    Attributes:
        job: One of these cells, and the plugins that it needs.
        device: "cpu" or "cuda".
        key: Name of the measurement.
    """

    job: Job
    device: str
    key: str

    @property
    def planned(self) -> PlannedCell:
        """The cell."""
        return self.job.cells[0]


def cost_key(planned: PlannedCell, device: str) -> str:
    """Name of the measurement of a cell's method on a device."""
    cell, options = planned.cell, dict(planned.cell.method.options)
    options["weights"] = planned.weights.sha256  # a checkpoint decides on sizes, too
    return cost.cost_key(
        cell.method.name,
        options,
        **_sizes(planned),
        device=device,
        dtype=cell.dtype,
        backbone=cell.backbone,
    )


def measure_cost(job: CostJob) -> Iterator[dict[str, Any]]:
    """What a method costs, or {"error": why that cannot be told}."""
    yield _cost_of(job.planned, job.device)


def _cost_of(planned: PlannedCell, device: str) -> dict[str, Any]:
    place = planned.place if device != "cpu" else "cpu"
    try:
        with settings_kept():
            method = build_method(planned, device="cpu")
            runs_it = planned.method.uses_backbone
            backbone = backbones.load_backbone(planned.cell.backbone, place) if runs_it else None
            dtype, sizes = planned.cell.dtype, _sizes(planned)
            return cost.measure(method, **sizes, device=place, dtype=dtype, backbone=backbone).to_dict()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the method's own, `sys.exit` among them
        return {"error": describe_error(error)}


def _sizes(planned: PlannedCell) -> dict[str, Any]:
    setting = planned.setting
    return {
        "channels": setting.channels,
        "image_size": setting.image_size,
        "feature_size": setting.feature_size,
        "output_size": setting.output_size,
    }
