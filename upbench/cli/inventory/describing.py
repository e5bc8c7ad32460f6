"""One thing in all its parts: what `upbench describe` prints of a method, a task, a dataset, a protocol or a
backbone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from upbench.cli.inventory import listing
from upbench.contracts.registered import origin
from upbench.errors import UpbenchError
from upbench.registry import find, find_dataset, open_dataset, plugins

Facts = dict[str, Any]
"""Name -> a plain value, a list of words or sentences, or a list of rows (mappings with the same keys)."""

_SENTENCES = ("departures",)


def facts(kind: str, name: str) -> Facts:
    """What is known of a thing.

    Args:
        kind: "method", "task", "dataset", "protocol" or "backbone".
        name: Its name; of a dataset also `NAME:FOLDER`.

    Raises:
        UpbenchError: There is no such thing, or a folder that is no such dataset.
    """
    makers = {"method": _method, "task": _task, "protocol": _protocol}
    named = {"kind": kind, "name": name}
    if kind == "dataset":
        return {**named, "name": name.partition(":")[0], **_dataset(name)}
    if kind == "backbone":
        return {**named, **_backbone(name)}
    return {**named, **makers[kind](find(kind, name))}


def as_text(found: Facts) -> str:
    """Facts as aligned pairs, then sentences and tables under their names; what is empty is left out."""
    blocks = {name for name, value in found.items() if name in _SENTENCES or _is_table(value)}
    pairs = {_label(n): listing.text_of(value) for n, value in found.items() if n not in blocks}
    pairs = {name: text for name, text in pairs.items() if text}
    width = max(len(name) for name in pairs)
    parts = ["\n".join(f"{name.ljust(width)}  {text}" for name, text in pairs.items())]
    for name, value in found.items():
        if name not in blocks or not value:
            continue
        lines = _table(value) if _is_table(value) else [f"- {' '.join(text.split())}" for text in value]
        parts.append("\n".join([_label(name), *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _table(rows: list[Mapping[str, Any]]) -> list[str]:
    shown = ({_label(k): _value(v) if k == "value" else v for k, v in row.items()} for row in rows)
    return listing.as_text(shown).splitlines()


def _label(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> Any:
    """A setting: also nothing is something."""
    if value is None or value == "":
        return "none"
    return "no" if value is False else value


def _method(cls: Any) -> Facts:
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    return {
        "title": cls.title,
        "about": listing.summary(cls),
        "paper": cls.paper,
        "year": cls.year,
        "license": cls.license,
        "guided": cls.guided,
        "trainable": cls.trainable,
        "linear": cls.linear,
        "uses_camera": cls.uses_camera,
        "uses_backbone": cls.uses_backbone,
        "ratio": f"{cls.native_ratio}x" if cls.native_ratio else "any",
        "channels": f"multiples of {cls.channel_multiple}" if cls.channel_multiple > 1 else "any",
        "file": origin(cls),
        "options": [
            {
                "option": name,
                "value": "to be given" if defaults[name] is inspect.Parameter.empty else defaults[name],
            }
            for name in cls.option_names()
        ],
        "options_under_a_protocol": [
            {"protocol": protocol, "option": name, "value": value}
            for protocol, options in cls.preset_options.items()
            for name, value in options.items()
        ],
        "weights": [row for row in listing.rows("weights") if row["weights"].startswith(f"{cls.name}:")],
    }


def _task(cls: Any) -> Facts:
    own = cls().settings().get("probe", {})
    shown = cls.headline or [metric.name for metric in cls.metrics[:2]]
    return {
        "title": cls.title,
        "about": listing.summary(cls),
        "needs": listing.needs(cls),
        "content": cls.content,
        "datasets": list(cls.datasets),
        "primary": cls.primary,
        "file": origin(cls),
        "metrics": [
            {
                "metric": metric.name,
                "title": metric.title,
                "unit": metric.unit,
                "better": "higher" if metric.higher_is_better else "lower",
                "in_tables": "always" if metric.name in (cls.primary, *shown) else "--metrics all",
            }
            for metric in cls.metrics
        ],
        "settings_of_its_own": [{"setting": name, "value": value} for name, value in own.items()],
    }


def _dataset(spec: str) -> Facts:
    name, _, folder = spec.partition(":")
    cls = find_dataset(name)
    there: Any = None
    if folder or not cls.needs_root:
        there = open_dataset(spec)
    elif os.environ.get("UPBENCH_DATA"):
        try:
            there = open_dataset(spec)
        except UpbenchError:
            there = None  # it is somewhere else, or not on this machine
    shown: Any = there or cls
    splits = list(dict.fromkeys((shown.train_split, *shown.eval_splits, *shown.counts)))
    return {
        "title": cls.title,
        "about": listing.summary(cls),
        "content": cls.content,
        "targets": sorted(shown.targets),
        "license": cls.license,
        "source": cls.source,
        "citation": cls.citation,
        "data": _place(cls, there),
        "download": _download(cls),
        "file": origin(cls),
        "classes": list(shown.classes),
        "class_count": len(shown.classes) or None,
        "other_class": None if shown.other_class is None else shown.classes[shown.other_class],
        "splits": [
            {
                "split": split,
                "used_for": _use(shown, split),
                "official": shown.counts.get(split),
                "here": None if there is None else _count(there, split),
            }
            for split in splits
        ],
    }


def _place(cls: Any, there: Any) -> str:
    if there is not None:
        return str(there.root) if there.root else "in the package"
    if cls.place != "folder":
        return f"not given: write {cls.name}:{cls.place.upper()}"
    return f"not given: write {cls.name}:/path, or set UPBENCH_DATA"


def _download(cls: Any) -> str:
    command = f"upbench download {cls.name} --to DIR"
    if cls.archives:
        return command
    return f"by hand; `{command}` says the steps" if cls.by_hand else ""


def _use(dataset: Any, split: str) -> str:
    uses = ["training"] if split == dataset.train_split else []
    return ", ".join([*uses, *(["evaluation"] if split in dataset.eval_splits else [])])


def _count(dataset: Any, split: str) -> int | None:
    try:
        return len(dataset.names(split))
    except UpbenchError:
        return None  # an official split that this copy does not have


def _protocol(cls: Any) -> Facts:
    protocol = cls()
    return {
        "name": cls.name,
        "version": protocol.version,
        "title": protocol.title,
        "other_names": list(protocol.other_names),
        "about": listing.summary(cls),
        "source": protocol.source,
        "exact": protocol.exact,
        "tasks": list(protocol.tasks) or "any",
        "file": origin(cls),
        "departures": [*map(str, protocol.departures)],
        "parameters": [
            {"parameter": name, "value": list(value) if isinstance(value, tuple) else value, "read_in": fact}
            for name, value, fact in protocol.describe()
        ],
        "settings_that_tasks_bring": list(_task_settings(protocol)),
    }


def _task_settings(protocol: Any) -> Iterator[Mapping[str, Any]]:
    """What of the recipe tasks replace, where the protocol lets them."""
    for name, cls in plugins("task").items():
        own = cls().settings().get("probe", {})
        if protocol.task_recipes and own and (not protocol.tasks or name in protocol.tasks):
            yield {"task": name, "settings": ", ".join(f"{key}={value}" for key, value in own.items())}


def _backbone(name: str) -> Facts:
    import torch

    from upbench.features import backbones

    listed = {info.name: info for info in backbones.list_backbones()}
    with torch.device("meta"):  # its shape, without its weights
        backbone = backbones.load_backbone(name, "meta", pretrained=False)
    info = asdict(listed.get(name, backbone.info))
    if name not in listed:
        info["source"] = "timm"
    return {
        "about": info.pop("notes"),
        **{key: value for key, value in info.items() if key != "name"},
        "patch_size": backbone.patch_size,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "listed": name in listed,
    }
