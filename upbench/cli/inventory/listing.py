"""What there is: methods, tasks, datasets, protocols, backbones and weights, as rows for `upbench list`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from upbench.errors import printable, unknown
from upbench.registry import plugins

if TYPE_CHECKING:
    from upbench.contracts.geometry import Geometry
    from upbench.contracts.protocol import Output

Row = Mapping[str, Any]


def rows(what: str) -> list[Row]:
    """The rows of a list.

    Args:
        what: "methods", "tasks", "datasets", "protocols", "backbones" or "weights".

    Raises:
        UpbenchError: There is no such list.
    """
    lists = {
        "methods": _methods,
        "tasks": _tasks,
        "datasets": _datasets,
        "protocols": _protocols,
        "backbones": _backbones,
        "weights": _weights,
    }
    if what not in lists:
        raise unknown("list", what, lists)
    return list(lists[what]())


def as_json(found: Any) -> str:
    """Rows, or the facts of one thing, as JSON with every field. What a terminal would obey is escaped."""
    text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def as_text(found: Iterable[Row]) -> str:
    """Rows as aligned columns; columns that are empty everywhere, or hold mappings, are left out."""
    found = list(found)
    if not found:
        return "none"
    flat = [name for name, value in found[0].items() if not isinstance(value, Mapping)]
    names = [name for name in flat if any(text_of(row[name]) for row in found)]
    lines = [names, *([text_of(row[name]) for name in names] for row in found)]
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
            "license": cls.license,
            "paper": cls.paper,
        }


def _tasks() -> Iterable[Row]:
    for name, cls in plugins("task").items():
        yield {
            "name": name,
            "title": cls.title,
            "needs": needs(cls),
            "primary": cls.primary,
            "metrics": [metric.name for metric in cls.metrics],
            "datasets": list(cls.datasets),
        }


_PLACES = {
    "folder": "a folder (NAME:FOLDER or UPBENCH_DATA)",
    "file": "a file (NAME:FILE)",
    "name": "a name (NAME:NAME, NAME:FOLDER or NAME:FILE)",
}
"""What stands behind the colon, by `Dataset.place`."""


def _datasets() -> Iterable[Row]:
    for name, cls in plugins("dataset").items():
        yield {
            "name": name,
            "title": cls.title,
            "targets": sorted(cls.targets),
            "classes": len(cls.classes) or None,
            "splits": list(dict.fromkeys((cls.train_split, *cls.eval_splits))),
            "images": [f"{split} {count}" for split, count in cls.counts.items()],
            "counts": dict(cls.counts),
            "data": _PLACES[cls.place] if cls.needs_root else "in the package",
            "license": cls.license,
            "source": cls.source,
        }


def _protocols() -> Iterable[Row]:
    for name, cls in plugins("protocol").items():
        protocol = cls()
        yield {
            "name": name,
            "other_names": list(protocol.other_names),
            "version": protocol.version,
            "title": protocol.title,
            "for": summary(cls),
            "tasks": list(protocol.tasks) or ["any"],
            "image": _geometry(protocol.geometry),
            "output": _output(protocol.output),
            "exact": protocol.exact.partition(":")[0],
            "source": protocol.source,
            "parameters": protocol.to_dict()["parameters"],
        }


def _geometry(geometry: Geometry) -> str:
    """Its name, with the parameters that are not left to their defaults."""
    own = [f for f in fields(geometry) if getattr(geometry, f.name) != f.default]  # type: ignore[arg-type]
    return f"{type(geometry).__name__}({', '.join(f'{f.name}={getattr(geometry, f.name)}' for f in own)})"


def _output(output: Output) -> str:
    """As in "image x 0.5" or "448x448"."""
    if output.of == "fixed":
        return f"{output.side}x{output.side}"
    times = "" if output.factor == 1 else f" x {output.factor:g}"
    return f"{output.of}{times}"


def summary(cls: type) -> str:
    """The first paragraph of a class's own docstring."""
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    return " ".join(text.partition("\n\n")[0].split())


def needs(cls: Any) -> list[str]:
    """The ground truth that a task needs, be it a probe's target or what another task names."""
    return list(dict.fromkeys([*cls.needs, *([cls.target] if hasattr(cls, "target") else [])]))


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
            "checked": item.checked,
            "backbone": item.entry.backbone or "any",
            "channels": item.entry.channels,
            "license": item.entry.license,
            "notes": item.entry.notes,
            "source": item.entry.source,
            "sha256": item.entry.sha256,
        }


def text_of(value: Any) -> str:
    """A value in a few words: yes or nothing for a truth, items between commas."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, (list, tuple)):
        return printable(", ".join(map(str, value)))
    return "" if value is None else printable(value)
