"""What the methods of a run cost: measurements that cells share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from upbench.cost import measure as cost
from upbench.features import backbones
from upbench.registry import load_plugin_files
from upbench.run.build import build_method
from upbench.run.describe import describe_error
from upbench.run.plan import PlannedCell


@dataclass(frozen=True)
class CostJob:
    """A measurement of a method's cost, for all cells that share it.

    Attributes:
        planned: One of these cells.
        device: "cpu" or "cuda".
        key: Name of the measurement.
        plugins: Files to load first.
    """

    planned: PlannedCell
    device: str
    key: str
    plugins: Sequence[str] = ()


def cost_key(planned: PlannedCell, device: str) -> str:
    """Name of the measurement of a cell's method on a device."""
    cell, options = planned.cell, dict(planned.cell.method.options)
    options["weights"] = planned.inputs["weights"]["sha256"]  # a checkpoint decides on sizes, too
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
    load_plugin_files(job.plugins)
    cell = job.planned.cell
    try:
        method = build_method(
            cell.method,
            job.planned.setting.channels,
            backbone=lambda: backbones.load_backbone(cell.backbone, job.device),
        )
        yield cost.measure(method, **_sizes(job.planned), device=job.device, dtype=cell.dtype).to_dict()
    except Exception as error:
        yield {"error": describe_error(error)}


def _sizes(planned: PlannedCell) -> dict[str, Any]:
    setting = planned.setting
    return {
        "channels": setting.channels,
        "image_size": setting.image_size,
        "feature_size": setting.feature_size,
        "output_size": setting.output_size,
    }
