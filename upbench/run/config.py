"""What a run is: `RunConfig`, command line over YAML over defaults.

Imports no torch: the command line parses with this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from upbench.contracts.weights import DEFAULT_BACKBONE
from upbench.errors import UpbenchError, named, shown, unknown
from upbench.registry import match_names
from upbench.results.cell import MethodSpec, plain_mapping
from upbench.system.yaml_text import read_mapping
from upbench.values import LARGEST_SEEDS, flag, number, text, user_path, whole

DEVICES = ("auto", "cpu", "cuda")
"""Also "cuda:N", for one of several GPUs."""
DTYPES = ("float32", "bfloat16")
EXECUTORS = ("inline", "process", "ray")
_LONGEST_WAIT = 604800
_MOST_WORKERS = 1024
_PART = ("methods", "tasks", "backbones", "datasets", "protocol", "probe")
"""What a part of a run may have of its own."""


@dataclass(frozen=True)
class RunConfig:
    """A run: methods x tasks x backbones x datasets under a protocol. Flags of `upbench run` are its fields.

    Attributes:
        methods: `NAME`, `NAME:WEIGHTS` or mappings (see `MethodSpec`); wildcards and "all" are allowed.
        tasks: Names; wildcards and "all" are allowed.
        backbones: Names, from `upbench list backbones` or of any timm model.
        datasets: Names or `NAME:FOLDER`; empty for each task's own.
        protocol: Name, from `upbench list protocols`. `preset`, its name in the first edition, still works.
        seeds: How many times the probe is trained, with seeds 0, 1, ...
        limit: At most so many images of every split; for trying things out, never for reporting.
        device: "auto" is a GPU where there is one; "cuda:N" is one of several.
        dtype: Arithmetic of the method; backbone and probe always run in float32.
        out: Folder of the records.
        plugins: Python files with methods, tasks or datasets.
        force: Redo cells that are finished.
        executor: Where cells run: "inline" (this process), "process" (worker processes) or "ray".
        workers: How many at a time, for "process" and "ray".
        lost_after: Seconds after which a worker that gives no sign of life is given up, for "process".
        shard: "i/n" runs the i-th of n parts of the cells, as on n machines; "" for all.
        probe: Settings of `upbench.Recipe` that replace the protocol's. The protocol is then not kept, and
            tables say so.
        parts: A run of several protocols, or of other methods on another backbone: for each part a mapping
            with what it has of its own (methods, tasks, backbones, datasets, protocol, probe); all else is as
            above. Empty for a run in one part.
        preset: The same as `protocol`.

    Raises:
        UpbenchError: A value of the wrong type or out of range.
    """

    methods: Sequence[Any] = ("all",)
    tasks: Sequence[str] = ("seg",)
    backbones: Sequence[str] = (DEFAULT_BACKBONE,)
    datasets: Sequence[str] = ()
    protocol: str = "quick"
    seeds: int = 3
    limit: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    out: str = "runs/default"
    plugins: Sequence[str] = ()
    force: bool = False
    executor: str = "inline"
    workers: int = 2
    lost_after: float = 120.0
    shard: str = ""
    probe: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Mapping[str, Any]] = ()
    preset: InitVar[str | None] = None

    def __post_init__(self, preset: str | None) -> None:
        put = object.__setattr__
        if preset is not None:
            if self.protocol not in ("quick", preset):
                raise UpbenchError(
                    f"protocol '{self.protocol}' and preset '{preset}' are two names for one thing"
                )
            put(self, "protocol", preset)
        methods = self.methods
        if isinstance(methods, (str, Mapping, MethodSpec)):
            methods = methods.split(",") if isinstance(methods, str) else [methods]
        if not isinstance(methods, Sequence) or not methods:
            raise UpbenchError(f"methods: expected a list of names, got {shown(self.methods)}")
        put(self, "methods", tuple(MethodSpec.parse(entry) for entry in methods))
        for name in ("tasks", "backbones", "datasets", "plugins"):
            put(self, name, _texts(name, getattr(self, name), may_be_empty=name in ("datasets", "plugins")))
        for name in ("protocol", "device", "dtype", "executor", "out"):
            put(self, name, _text(name, getattr(self, name)))
        user_path(self.out)
        for name, choices in (("device", DEVICES), ("dtype", DTYPES), ("executor", EXECUTORS)):
            value = getattr(self, name)
            if value not in choices and not (name == "device" and re.fullmatch(r"cuda:[0-9]{1,3}", value)):
                raise unknown(name, value, choices)
        put(self, "probe", plain_mapping("probe", self.probe))
        put(self, "parts", self._checked_parts())
        self.part()
        whole("seeds", self.seeds, most=LARGEST_SEEDS)
        whole("workers", self.workers, most=_MOST_WORKERS)
        if self.limit is not None:
            whole("limit", self.limit)
        put(self, "lost_after", float(number("lost_after in seconds", self.lost_after, 1, _LONGEST_WAIT)))
        flag("force", self.force)

    @classmethod
    def load(cls, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Defaults, then the YAML file's values, then `overrides` (those that are not None).

        Raises:
            UpbenchError: The file is missing or is not a YAML mapping, a key is unknown, or a value is wrong.
        """
        values = read_mapping("config file", file) if file is not None else {}
        known = [*(f.name for f in fields(cls)), "preset"]
        for key in values:
            if key not in known:
                raise unknown("key", key, known, f"in {named(file)}")
        given = {key: value for key, value in (overrides or {}).items() if value is not None}
        if isinstance(parts := values.get("parts"), list):  # what is given wins over parts, too
            won = {"protocol" if key == "preset" else key for key in given}
            values = {**values, "parts": [_without(part, won) for part in parts]}
        if {"protocol", "preset"} & set(given):
            values = {key: value for key, value in values.items() if key not in ("protocol", "preset")}
        try:
            return cls(**{**values, **given})
        except UpbenchError as error:
            where = f" (in {named(file)})" if file is not None and set(values) - set(given) else ""
            raise UpbenchError(f"{error}{where}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `RunConfig(**config.to_dict())` equals `config`."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: list(data[name]) for name in ("tasks", "backbones", "datasets", "plugins")}
        methods = [method.to_dict() for method in self.methods]
        parts = [dict(part) for part in self.parts]
        return {**data, **lists, "methods": methods, "probe": dict(self.probe), "parts": parts}

    def each(self) -> list[RunConfig]:
        """The parts as runs of their own; the run itself where it has none."""
        return [replace(self, **{"parts": (), **part}) for part in self.parts] or [self]

    def _checked_parts(self) -> tuple[dict[str, Any], ...]:
        """The parts, their values in the form in which `to_dict` has them."""
        if isinstance(self.parts, (str, Mapping)) or not isinstance(self.parts, Sequence):
            raise UpbenchError(f"parts: expected a list of mappings, got {shown(self.parts)}")
        found = []
        for place, part in enumerate(self.parts, 1):
            if not isinstance(part, Mapping):
                raise UpbenchError(f"part {place}: expected a mapping, got {shown(part)}")
            for key in part:
                if key not in _PART:
                    raise unknown("key", str(key), _PART, f"in part {place}")
            try:
                whole = replace(self, **{"parts": (), **part}).to_dict()
            except UpbenchError as error:
                raise UpbenchError(f"part {place}: {error}") from None
            found.append({key: whole[key] for key in part})
        return tuple(found)

    def select(self, methods: Iterable[str], tasks: Iterable[str], datasets: Iterable[str]) -> RunConfig:
        """The same run with wildcards replaced by the names that they match.

        Args:
            methods: The names that there are.
            tasks: The names that there are.
            datasets: The names that there are.

        Raises:
            UpbenchError: A name that there is not; the nearest one is suggested.
        """
        specs: list[MethodSpec] = []
        for spec in self.methods:
            for name in match_names("method", spec.name, methods):
                if (found := replace(spec, name=name)) not in specs:
                    specs.append(found)
        chosen = _unique(name for pattern in self.tasks for name in match_names("task", pattern, tasks))
        places: list[str] = []
        for entry in self.datasets:
            name, colon, folder = entry.partition(":")
            places += [found + colon + folder for found in match_names("dataset", name, datasets)]
        return replace(self, methods=specs, tasks=chosen, datasets=_unique(places))

    def part(self) -> tuple[int, int]:
        """(i, n) of `shard`, from (1, 1).

        Raises:
            UpbenchError: It does not read "i/n" with 1 <= i <= n.
        """
        if self.shard == "":
            return 1, 1
        found = (
            re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.shard) if isinstance(self.shard, str) else None
        )
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= index <= count:
            raise UpbenchError(f"shard: expected I/N with 1 <= I <= N, as in 2/4, got {shown(self.shard)}")
        return index, count


def _without(part: Any, keys: Iterable[str]) -> Any:
    """A part of a run without some keys; what is no mapping is left for its check to refuse."""
    return {key: part[key] for key in part if key not in keys} if isinstance(part, Mapping) else part


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _text(name: str, value: Any) -> str:
    """Text without blanks around it; a path may hold what no other text may, since files have such names."""
    if isinstance(value, Path):
        return str(value)
    if name in ("out", "plugins", "datasets") and isinstance(value, str) and value.strip():
        return value.strip()
    return text(name, value).strip()


def _texts(name: str, value: Any, may_be_empty: bool) -> tuple[str, ...]:
    if isinstance(value, (str, Path)):
        value = str(value).split(",")
    if not isinstance(value, Sequence) or not (value or may_be_empty):
        raise UpbenchError(f"{name}: expected a list of names, got {shown(value)}")
    return tuple(_text(name, item) for item in value)
