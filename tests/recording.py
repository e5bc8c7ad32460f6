"""Records as runs leave them, for tests of what is made from records."""

from __future__ import annotations

from typing import Any

from upbench.results.cell import Cell, MethodSpec
from upbench.results.records import Record

SEG = [
    {"name": "miou", "title": "mIoU", "higher_is_better": True, "unit": "%", "main": True},
    {"name": "accuracy", "title": "Accuracy", "higher_is_better": True, "unit": "%", "main": False},
]
DEPTH = [{"name": "rmse", "title": "RMSE", "higher_is_better": False, "unit": "m", "main": True}]
COST = {
    "parameters": 103_000,
    "macs": 6_380_000_000,
    "latency_ms": 75.81,
    "latency_q25_ms": 73.7,
    "latency_q75_ms": 77.2,
    "peak_memory_bytes": 260_000_000,
    "hardware": "Some CPU, 2 threads",
    "dtype": "float32",
    "batch": 1,
    "channels": 384,
    "feature_size": [16, 16],
    "output_size": [224, 224],
    "warnings": [],
}
_CELL = {
    "backbone": "vit",
    "dataset": "rooms",
    "protocol": "quick",
    "seeds": (0, 1),
    "limit": None,
    "device": "cpu",
    "dtype": "float32",
    "probe": {},
    "cell_data": "",
}


def record(method: str, task: str = "seg", values: Any = (50.0, 52.0), **more: Any) -> Record:
    """A finished cell, or what `more` makes of it: fields of the record or of its cell.

    Args:
        method: Name of the method; `spec` replaces the spec made from it.
        task: Name of the task.
        values: Of every metric, one per seed.
        more: Other fields. `cell_data` is the cell's digest, `data` what the record says of its splits.
    """
    cell = {name: more.pop(name, default) for name, default in _CELL.items()}
    cell["data"] = cell.pop("cell_data")
    spec = more.pop("spec", MethodSpec(method))
    columns = more.get("columns", SEG if task == "seg" else DEPTH)
    defaults: dict[str, Any] = {
        "metrics": {"val": {column["name"]: list(values) for column in columns}},
        "per_image": {"val": {"names": ["a", "b", "c"], "values": [[v, v + 1, v + 5] for v in values]}},
        "columns": columns,
        "about": {"title": method.title(), "year": {"raysup": 2026, "jbu": 2007}.get(method), "paper": ""},
        "cost": {"cpu": COST},
        "protocol": {
            "name": cell["protocol"],
            "version": 1,
            "exact": "exact",
            "departures": [],
            "image_size": [224, 224],
            "output_size": [224, 224],
            "parameters": {"output": "image"},
            "recipe": {"lr": 0.03},
        },
        "environment": {
            "cpu": "Some CPU",
            "cores": 2,
            "gpu": None,
            "packages": {"torch": "2"},
            "upbench": "1",
        },
        "inputs": {"weights": {"name": "w", "sha256": "0123456789abcdef"} if method == "raysup" else {}},
        "started": "2026-01-01T00:00:00",
    }
    status = more.pop("status", "ok")
    if status != "ok":
        defaults |= {"metrics": {}, "per_image": {}}
    return Record(Cell(spec, task, **cell), status, **{**defaults, **more})
