"""One JSON file a cell: written whole or not at all, read with every doubt spoken. Imports no torch.

A record says what was measured and everything that is needed to measure it again. Tables are made from
records and from nothing else.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import UpbenchError
from upbench.results.cell import Cell
from upbench.system.cache import replacing

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
STATUSES = ("ok", "skipped", "failed")
FOLDER = "records"


@dataclass(frozen=True)
class Record:
    """What became of a cell.

    Attributes:
        cell: The cell.
        status: "ok", "skipped" (the method or the task cannot do this) or "failed" (an error).
        reason: Why it was skipped, or the error's last line; "" where ok.
        traceback: Of the error; "" where there was none.
        metrics: Split -> metric -> values, one per seed, in the metric's unit.
        per_image: Split -> {"names": images, "values": one list per seed}, of the task's primary metric; nan
            where an image has no value.
        about: Title, paper, year, licence and native ratio of the method.
        columns: Name, title, direction and unit of each metric and whether it stands in every table
            (`main`); the primary one first.
        cost: Device -> what `upbench.cost.measure` measured; see there.
        inputs: Fingerprints of what went in (weights, dataset, backbone, source files): a record is kept on
            resume while they are the same.
        protocol: Name, version, sizes, and the probe's settings as they were used.
        environment: Versions and hardware; see `upbench.system.environment`.
        warnings: What a reader of the numbers must know.
        started: Time at which the cell began, ISO 8601 with time zone.
        seconds: Wall time of the cell, without what it shares with others.
        schema: Version of this layout.
    """

    cell: Cell
    status: str
    reason: str = ""
    traceback: str = ""
    metrics: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    per_image: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    started: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")

    @property
    def file_name(self) -> str:
        """Where it stands in the folder of records."""
        return f"{self.cell.slug}.json"

    def to_dict(self) -> dict[str, Any]:
        """Plain values. Metrics get their mean and standard deviation beside them, for other readers."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        head = {"schema": data.pop("schema"), "key": self.cell.key, "cell": self.cell.to_dict()}
        del data["cell"]
        data["metrics"] = {
            split: {name: asdict(Spread.of(values)) for name, values in metrics.items()}
            for split, metrics in self.metrics.items()
        }
        return {**head, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is missing, unknown, or of another schema.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise ValueError("not a record of upbench")
        if data["schema"] != SCHEMA:
            age = "newer" if isinstance(data["schema"], int) and data["schema"] > SCHEMA else "older"
            raise ValueError(f"schema {data['schema']} is {age} than this version's {SCHEMA}")
        try:
            rest = {key: value for key, value in data.items() if key not in ("key", "cell", "metrics")}
            metrics = {
                split: {name: [_number(v) for v in spread["values"]] for name, spread in of_split.items()}
                for split, of_split in data["metrics"].items()
            }
            per_image = {
                split: {**scores, "values": [[_number(v) for v in seed] for seed in scores["values"]]}
                for split, scores in data["per_image"].items()
            }
            cell = Cell.from_dict(data["cell"])
            return cls(**{**rest, "cell": cell, "metrics": metrics, "per_image": per_image})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a field is missing, unknown or of the wrong kind ({error})") from error


@dataclass(frozen=True)
class Spread:
    """Values over seeds.

    Attributes:
        mean: Of the values.
        std: Sample standard deviation (n - 1); None for a single value, which says nothing about spread.
        values: One per seed.
    """

    mean: float
    std: float | None
    values: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and standard deviation of values; nan where a value is nan."""
        values = [float(value) for value in values]
        if not values:
            return cls(math.nan, None, [])
        if not all(map(math.isfinite, values)):
            return cls(math.nan, None, values)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)


def write_record(folder: Path, record: Record) -> Path:
    """Writes a record into a folder of records, in place of an older one of the same cell.

    Raises:
        UpbenchError: The disk is full or the folder cannot be written; what was there before stays as it was.
    """
    path = folder / record.file_name
    write_json(path, record.to_dict())
    return path


def write_json(path: Path, data: Any) -> None:
    """Writes plain values as JSON, atomically and durably; nan and infinities become null.

    Raises:
        UpbenchError: The disk is full or the folder cannot be written.
    """
    text = json.dumps(_finite(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_record(path: str | Path) -> Record:
    """The record in a file.

    Raises:
        UpbenchError: The file cannot be read, is damaged, or has another schema.
    """
    try:
        return Record.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UpbenchError(f"cannot read record {path}: {error.strerror}") from error
    except ValueError as error:  # not JSON, not UTF-8, not a record
        text = " ".join(str(error).split())
        raise UpbenchError(f"damaged record {path}: {text}; delete it and run its cell again") from error


def record_files(path: str | Path) -> list[Path]:
    """The record files that a path stands for: one file, a folder of records, or the folder of a run.

    Raises:
        UpbenchError: There is no such file or folder, or it holds no record.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UpbenchError(f"no records: {place} does not exist")
    folder = place / FOLDER if (place / FOLDER).is_dir() else place
    files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
    if not files:
        raise UpbenchError(f"no records in {folder}")
    return files


def load_records(path: str | Path | Iterable[str | Path]) -> list[Record]:
    """Every record of a run, of several runs, or of single files.

    Raises:
        UpbenchError: There is none, or one is damaged: a table must not lose a cell in silence.
    """
    places = [path] if isinstance(path, (str, Path)) else list(path)
    return [read_record(file) for place in places for file in record_files(place)]


def read_records(path: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """A table of records, one row a cell; see `frame` for its columns and `load_records` for errors."""
    return frame(load_records(path))


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table, one row a cell.

    Columns: the cell (`method`, `label`, `title`, `weights`, `options`, `camera`, `task`, `backbone`,
    `dataset`, `preset`, `seeds`, `limit`, `device`, `dtype`, `probe`, `key`), `protocol`, `status`, `reason`,
    then for each metric of the first split `NAME` (mean over seeds) and `NAME_std`, for other splits
    `SPLIT/NAME` and `SPLIT/NAME_std`, for each device's cost `DEVICE/NAME`, and, as objects, `splits`,
    `columns`, `per_image`, `cost`, `inputs`, `environment`, `warnings`. What a cell has not is nan or None.
    """
    import pandas as pd

    return pd.DataFrame([dict(_row(record)) for record in records])


def _row(record: Record) -> Iterator[tuple[str, Any]]:
    cell = record.cell
    yield from (
        ("method", cell.method.name),
        ("label", cell.method.title),
        ("title", record.about.get("title") or cell.method.name),
        ("year", record.about.get("year")),
        ("paper", record.about.get("paper", "")),
        ("native_ratio", record.about.get("native_ratio")),
        ("weights", cell.method.weights),
        ("options", json.dumps(dict(cell.method.options), sort_keys=True)),
        ("camera", cell.method.camera),
        ("task", cell.task),
        ("backbone", cell.backbone),
        ("dataset", cell.dataset),
        ("preset", cell.preset),
        ("protocol", record.protocol.get("name", "")),
        ("image_size", record.protocol.get("image_size")),
        ("output_size", record.protocol.get("output_size")),
        ("seeds", len(cell.seeds)),
        ("limit", cell.limit),
        ("device", cell.device),
        ("dtype", cell.dtype),
        ("probe", json.dumps(dict(cell.probe), sort_keys=True)),
        ("key", cell.key),
        ("status", record.status),
        ("reason", record.reason),
        ("started", record.started),
        ("seconds", record.seconds),
    )
    for index, (split, metrics) in enumerate(record.metrics.items()):
        prefix = "" if index == 0 else f"{split}/"
        for name, values in metrics.items():
            spread = Spread.of(values)
            yield f"{prefix}{name}", spread.mean
            yield f"{prefix}{name}_std", math.nan if spread.std is None else spread.std
    for device, cost in record.cost.items():
        yield from (
            (f"{device}/{name}", value) for name, value in cost.items() if isinstance(value, (int, float))
        )
    yield "splits", list(record.metrics)
    for name in ("columns", "per_image", "cost", "inputs", "environment", "warnings"):
        yield name, getattr(record, name)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(data: Any) -> Any:
    """The same values with None for what JSON cannot say."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data
