"""What there is: methods, tasks, datasets, backbones and weights, as rows for `upbench list`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from upbench.errors import unknown
from upbench.registry import plugins

Row = Mapping[str, Any]


def rows(what: str) -> list[Row]:
    """The rows of a list.

    Args:
        what: "methods", "tasks", "datasets", "backbones" or "weights".

    Raises:
        UpbenchError: There is no such list.
    """
    lists = {
        "methods": _methods,
        "tasks": _tasks,
        "datasets": _datasets,
        "backbones": _backbones,
        "weights": _weights,
    }
    if what not in lists:
        raise unknown("list", what, lists)
    return list(lists[what]())


def as_json(found: Iterable[Row]) -> str:
    """Rows as JSON, with every field."""
    return json.dumps(list(found), indent=1, ensure_ascii=False)


def as_text(found: Iterable[Row]) -> str:
    """Rows as aligned columns; columns that are empty everywhere are left out."""
    found = list(found)
    if not found:
        return "none"
    names = [name for name in found[0] if any(_text(row[name]) for row in found)]
    lines = [names, *([_text(row[name]) for name in names] for row in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    padded = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)


def _methods() -> Iterable[Row]:
    for name, cls in plugins("method").items():
        yield {
            "name": name,
            "year": cls.year,
            "guided": cls.guided,
            "trainable": cls.trainable,
            "camera": cls.uses_camera,
            "backbone": cls.uses_backbone,
            "ratio": f"{cls.native_ratio}x" if cls.native_ratio else "any",
            "weights": list(cls.weights),
            "options": list(cls.option_names()),
            "licence": cls.licence,
            "paper": cls.paper,
        }


def _tasks() -> Iterable[Row]:
    for name, cls in plugins("task").items():
        yield {
            "name": name,
            "title": cls.title,
            "target": cls.target,
            "primary": cls.primary,
            "metrics": [metric.name for metric in cls.metrics],
            "datasets": list(cls.datasets),
        }


def _datasets() -> Iterable[Row]:
    for name, cls in plugins("dataset").items():
        yield {
            "name": name,
            "title": cls.title,
            "targets": sorted(cls.targets),
            "classes": len(cls.classes) or None,
            "splits": [cls.train_split, *cls.eval_splits],
            "data": "a folder (NAME:FOLDER or UPBENCH_DATA)" if cls.needs_root else "in the package",
            "licence": cls.licence,
            "source": cls.source,
        }


def _backbones() -> Iterable[Row]:
    from upbench.features.backbones import list_backbones

    return [asdict(info) for info in list_backbones()]


def _weights() -> Iterable[Row]:
    from upbench.weights.resolve import list_weights

    for item in list_weights():
        yield {
            "weights": f"{item.method}:{item.name}",
            "default": item.default,
            "place": item.place,
            "backbone": item.entry.backbone or "any",
            "channels": item.entry.channels,
            "licence": item.entry.licence,
            "notes": item.entry.notes,
            "source": item.entry.source,
            "sha256": item.entry.sha256,
        }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else " ".join(str(value).split())
