"""What a record is of: the `Cell`, one crossing, with the `MethodSpec` that is its row. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from upbench.dense.camera import CameraChoice
from upbench.errors import UpbenchError
from upbench.errors import shown as shown
from upbench.values import label as checked_label
from upbench.values import number, text, whole

_PLAIN = (str, int, float, bool, type(None))
_LARGEST = 2**63  # what records hold


@dataclass(frozen=True)
class MethodSpec:
    """A row of a table: a method, its weights and its options.

    Attributes:
        name: Name of the method; `*` and `?` are wildcards, "all" is every method.
        weights: "default", "none", a name from `upbench list weights`, or a path.
        options: Options of the method's constructor.
        camera: "dataset" gives the method each sample's camera, "dataset*2" the same with doubled focal
            lengths (see `upbench.dense.camera`), "" none. For methods that use one.
        label: Name of the row; `name` and what differs from the defaults where empty.
    """

    name: str
    weights: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    camera: str = ""
    label: str = ""

    @classmethod
    def parse(cls, entry: Any) -> MethodSpec:
        """The spec that `NAME`, `NAME:WEIGHTS` or a mapping stands for.

        In a mapping, keys other than `name`, `weights`, `options`, `camera` and `label` are options of the
        method.

        Raises:
            UpbenchError: Neither of these, no name, an option that is not a plain value, or text that no
                record can hold and no line can show.
        """
        if isinstance(entry, MethodSpec):
            entry = {field.name: getattr(entry, field.name) for field in fields(entry)}
        if isinstance(entry, str):
            name, colon, weights = entry.strip().partition(":")
            if not name or (colon and not weights):
                raise UpbenchError(f"methods: expected NAME or NAME:WEIGHTS, got {shown(entry)}")
            return cls(text("methods: name", name), text("methods: weights", weights or "default"))
        if not isinstance(entry, Mapping):
            raise UpbenchError(f"methods: expected a name or a mapping with 'name', got {shown(entry)}")
        rest = {str(key): value for key, value in entry.items()}
        name, weights = rest.pop("name", ""), rest.pop("weights", "default")
        camera, label, nested = rest.pop("camera", ""), rest.pop("label", ""), rest.pop("options", {})
        for key, value in (("name", name), ("weights", weights), ("camera", camera)):
            text(f"methods: '{key}'", value, empty=True)
        checked_label(f"methods: 'label' of {shown(name)}", label)
        camera = str(CameraChoice.parse(camera))
        if not name or not weights:
            raise UpbenchError(
                f"methods: {shown(dict(entry))} needs a 'name', and 'weights' must not be empty"
            )
        if twice := set(rest) & set(plain_mapping("methods: 'options'", nested)):
            raise UpbenchError(f"methods: option {shown(min(twice))} of '{name}' is given twice")
        options = {**rest, **nested}
        return cls(name, weights, plain_mapping(f"methods: options of '{name}'", options), camera, label)

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @property
    def title(self) -> str:
        """The label, else what the command line calls it: the name with what differs from the defaults."""
        return self.named(self.name)

    def named(self, title: str) -> str:
        """What a row is called: the label as it is, else a title of the method with what differs from the
        defaults.
        """
        if self.label:
            return self.label
        weights = "" if self.weights == "default" else f":{self.weights}"
        extras = [f"{key}={value}" for key, value in sorted(self.options.items())]
        extras += [f"camera={self.camera}"] if self.camera else []
        return f"{title}{weights}" + (f" ({', '.join(extras)})" if extras else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records."""
        return {
            "name": self.name,
            "weights": self.weights,
            "options": dict(sorted(self.options.items())),
            "camera": self.camera,
            "label": self.label,
        }


@dataclass(frozen=True)
class Cell:
    """One crossing: everything that decides what its numbers mean, and nothing else.

    Attributes:
        method: The row.
        task, backbone, dataset, protocol: Names. A dataset's folder is no part of its identity, its content
            is (`data`); a protocol's version is the record's business.
        data: Digest over the content of the splits; "" in records of the first edition.
        seeds: Seeds of whatever the task draws, one training each.
        limit: At most so many images of every split; None for all.
        device: "cpu" or "cuda".
        dtype: Arithmetic of the method.
        probe: Settings that replace the protocol's; empty in a run that keeps it.
    """

    method: MethodSpec
    task: str
    backbone: str
    dataset: str
    protocol: str
    seeds: tuple[int, ...]
    limit: int | None
    device: str
    dtype: str
    probe: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records."""
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **rest,
            "method": self.method.to_dict(),
            "seeds": list(self.seeds),
            "probe": dict(sorted(self.probe.items())),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`.

        Raises:
            KeyError: A field is missing.
            TypeError: A field is unknown.
        """
        return cls(**{**data, "method": MethodSpec(**data["method"]), "seeds": tuple(data["seeds"])})

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that name the cell; the order of mappings and the label do not count."""
        identity = self.to_dict()
        del identity["method"]["label"]
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def slug(self) -> str:
        """File name of its record without the suffix: readable, with the first eight digits of `key`.

        It never begins with a dot, holds no separator of folders, and fits where names have 255 bytes.
        """
        parts = (self.method.title, self.task, self.backbone, self.dataset, self.protocol)
        names = (re.sub(r"[^\w.]+", "_", part).strip("._").encode() for part in parts)
        words = (name[:40].decode(errors="ignore") or "x" for name in names)
        return f"{'-'.join(words)}-{self.key[:8]}"

    def __str__(self) -> str:
        return f"{self.method.title} · {self.task} · {self.dataset} · {self.backbone}"


def plain_mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of text to what JSON can hold, so that a cell has a stable key."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UpbenchError(f"{name}: expected a mapping, got {shown(value)}")
    for key, item in value.items():
        parts = item if isinstance(item, (list, tuple)) else [item]
        text(f"{name}: a key", key)
        if not all(isinstance(part, _PLAIN) for part in parts):
            raise UpbenchError(f"{name}: '{key}' must be a plain value or a list of them, got {shown(item)}")
        for part in parts:
            if isinstance(part, str):
                text(f"{name}: '{key}'", part, empty=True)
            elif isinstance(part, float):
                number(f"{name}: '{key}'", part)
            elif isinstance(part, int) and not isinstance(part, bool):
                whole(f"{name}: '{key}'", part, -_LARGEST, _LARGEST)
    return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
