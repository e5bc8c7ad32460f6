"""Columns of cost. A GPU's numbers come from a GPU or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from upbench.results.records import Record
from upbench.results.report.model import Column, Value

_COLUMNS = (
    Column("cost/parameters", "Params", "M", higher_is_better=False),
    Column("cost/macs", "MACs", "G", higher_is_better=False),
    Column("cost/cpu_latency", "CPU", "ms", higher_is_better=False),
    Column("cost/gpu_latency", "GPU", "ms", higher_is_better=False),
    Column("cost/cpu_memory", "CPU peak", "MB", higher_is_better=False),
)
_GPU_MEMORY = Column("cost/gpu_memory", "GPU peak", "MB", higher_is_better=False)


def cost_columns(records: Sequence[Record]) -> list[Column]:
    """The columns of cost: none where nothing was measured, the GPU's memory only where there is a GPU."""
    if not any(record.cost for record in records):
        return []
    return [*_COLUMNS, *([_GPU_MEMORY] if any("cuda" in record.cost for record in records) else [])]


def cost_values(records: Iterable[Record]) -> dict[str, Value]:
    """A method's cost; from its latest record, where there are several."""
    values: dict[str, Value] = {}
    for record in records:
        for device, short in (("cpu", "cpu"), ("cuda", "gpu")):
            cost = record.cost.get(device)
            if not cost:
                continue
            quartiles = (cost["latency_q25_ms"], cost["latency_q75_ms"])
            values |= {
                "cost/parameters": Value(cost["parameters"] / 1e6),
                "cost/macs": Value(_scaled(cost["macs"], 1e-9)),
                f"cost/{short}_latency": Value(cost["latency_ms"], spread=quartiles),
                f"cost/{short}_memory": Value(_scaled(cost["peak_memory_bytes"], 1e-6)),
            }
    return values


def cost_notes(records: Sequence[Record]) -> Iterable[str]:
    """What was measured, and where."""
    found: dict[str, None] = {}
    for record in records:
        for device, cost in record.cost.items():
            (h, w), (height, width) = cost["feature_size"], cost["output_size"]
            name = {"cpu": "CPU", "cuda": "GPU"}.get(device, device)
            found[
                f"{name}: {cost['hardware']}; {cost['dtype']}, batch {cost['batch']}, "
                f"{cost['channels']} channels, {h}x{w} to {height}x{width}"
            ] = None
    if found:
        yield (
            "Cost is that of the upsampler alone: latency is the median (and quartiles) of single passes, "
            f"peak memory what a pass needs beside weights and inputs. {'. '.join(found)}"
        )
    told = dict.fromkeys(
        f"{record.about.get('title') or record.cell.method.name}: {text}"
        for record in records
        for cost in record.cost.values()
        for text in cost["warnings"]
    )
    yield from told


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
