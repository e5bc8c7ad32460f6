"""One JSON file a cell: written whole or not at all, read with every doubt spoken. Imports no torch.

A record says what was measured and everything that is needed to measure it again. Tables are made from
records and from nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from upbench.errors import UpbenchError, named, system_errors
from upbench.results.cell import Cell, shown
from upbench.results.layout import STATUSES, check, check_first
from upbench.system.cache import replacing
from upbench.system.reading import read_file
from upbench.values import user_path

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2
_FIRST = 1  # records of the first edition are read, and written as the second's
FOLDER = "records"
_MOST_DIGITS = 1000
LARGEST = 1 << 25
"""Bytes of a record: five seeds on 200,000 images."""


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
        row: What tables call the row: the user's label as it is, else the method's title with what differs
            from its defaults. Filled in where it is empty.
        about: Title, paper, year, license and native ratio of the method.
        columns: Name, title, direction and unit of each metric and whether it stands in every table
            (`main`); the primary one first.
        cost: Device -> what `upbench.cost.measure` measured; see there.
        inputs: Fingerprints of what went in (weights, dataset, backbone, source files): a record is kept on
            resume while they are the same.
        data: Split -> what was seen: "images" (how many), "official" (how many the dataset has officially, or
            None), "fingerprint" of its content, "names" (digest over the images' names).
        protocol: Name, version and every parameter, and the recipe of the probe as it was used.
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
    row: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[Mapping[str, Any]] = ()
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    started: str = ""
    seconds: float = 0.0
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {self.status!r}")
        if not self.row:
            title = self.about.get("title") or self.cell.method.name
            object.__setattr__(self, "row", self.cell.method.named(title))

    @property
    def file_name(self) -> str:
        """Where it stands in the folder of records."""
        return f"{self.cell.slug}.json"

    @property
    def protocol_label(self) -> str:
        """Name and version of the protocol, as in "quick-v1"."""
        name, version = self.protocol.get("name") or self.cell.protocol, self.protocol.get("version")
        return name if version is None else f"{name}-v{version}"

    @property
    def content(self) -> str:
        """Digest of the dataset's content; "" where the record does not say.

        In records of the first edition, which have no such digest, it is taken over the splits' fingerprints.
        """
        splits = self.inputs.get("dataset")
        if self.cell.data or not isinstance(splits, Mapping) or not splits:
            return self.cell.data
        return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()[:16]

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
            ValueError: A field is missing, unknown or of the wrong kind, or the schema is another.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise ValueError("not a record of upbench")
        schema = data["schema"]
        if type(schema) is not int:
            raise ValueError(f"no such schema: {shown(schema)}")
        if schema not in (_FIRST, SCHEMA):
            age = "newer" if schema > SCHEMA else "older"
            raise ValueError(f"schema {shown(schema)} is {age} than this version's {SCHEMA}")
        try:
            data = _second_edition(data) if schema == _FIRST else data
            check(data)
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
        except (ValueError, TypeError) as error:  # TypeError: a field that no record has
            raise ValueError(f"a field is missing, unknown or of the wrong kind ({error})") from error


def _second_edition(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the first edition as one of the second."""
    check_first(data)
    cell, about = dict(data["cell"]), dict(data["about"])
    cell["protocol"] = cell.pop("preset")
    cell["dataset"] = cell["dataset"].partition(":")[0]  # the rest was a folder
    about["license"] = about.pop("licence", about.get("license", ""))
    protocol = dict(data["protocol"])
    protocol["name"] = protocol.get("name", "").removesuffix(f"-v{protocol.get('version')}")
    return {**data, "schema": SCHEMA, "cell": cell, "about": about, "protocol": protocol}


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
        try:
            std = statistics.stdev(values) if len(values) > 1 else None
            return cls(statistics.fmean(values), std, values)
        except OverflowError:  # as far apart as numbers can be
            return cls(math.nan, None, values)


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
    content = read_file(path, "record", LARGEST)
    try:
        return Record.from_dict(parse_json(content))
    except (ValueError, MemoryError) as error:  # not JSON, not UTF-8, not a record
        text = str(error) or type(error).__name__
        raise UpbenchError(f"damaged record {path}: {text}; delete it and run its cell again") from error


def parse_json(content: bytes) -> Any:
    """What JSON stands for.

    Raises:
        ValueError: It is not JSON, not UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"not JSON that can be read ({error})") from error


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def record_files(path: str | Path) -> list[Path]:
    """The record files that a path stands for: one file, a folder of records, or the folder of a run.

    Raises:
        UpbenchError: There is no such file or folder, or it holds no record.
    """
    with system_errors("look for records in", path):
        place = user_path(path)
        if not place.exists():
            raise UpbenchError(f"no records: {named(place)} does not exist")
        if not place.is_dir():
            return [place]
        folder = place / FOLDER if (place / FOLDER).is_dir() else place
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    files = [folder / name for name in names if not name.startswith(".")]
    if not files:
        raise UpbenchError(f"no records in {named(folder)}")
    return files


def load_records(path: str | Path | Iterable[str | Path]) -> list[Record]:
    """Every record of a run, of several runs, or of single files.

    Raises:
        UpbenchError: There is none, or one is damaged: a table must not lose a cell in silence. Names the
            first that is, and says how many others are.
    """
    places = [path] if isinstance(path, (str, Path)) else list(path)
    found, faults = [], []
    for file in [file for place in places for file in record_files(place)]:
        try:
            found.append(read_record(file))
        except UpbenchError as error:
            faults.append((file, error))
    if not faults:
        return found
    _, first = faults[0]
    others = [named(file.name) for file, _ in faults[1:]]
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    told = f"; the same holds for {', '.join(others[:2])}{more}" if others else ""
    raise UpbenchError(f"{first}{told}") from first


def read_records(path: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """A table of records, one row a cell; see `frame` for its columns and `load_records` for errors."""
    return frame(load_records(path))


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a DataFrame, one row a cell, for analyses of one's own. Tables are not made from it.

    Columns: what the row is called (`row`), the cell (`method`, `label` as the command line would say it,
    `title`, `year`, `paper` and `native_ratio` of the method, `weights`, `options`, `camera`, `task`,
    `backbone`, `dataset`, `data` (digest of its content), `seeds` (how many), `limit`, `device`, `dtype`,
    `probe`, `key`), `protocol` (name and version, as in "quick-v1"; its name alone is in `preset`, as it was
    called before), `image_size` and `output_size` (the side of a square, else as in "480x640"), `status`,
    `reason`, `started`, `seconds`, then for each metric of the first split `NAME` (mean over seeds) and
    `NAME_std`, for other splits `SPLIT/NAME` and `SPLIT/NAME_std`, for each device's cost `DEVICE/NAME`, and,
    as objects, `splits`, `columns`, `per_image`, `cost`, `inputs`, `environment`, `warnings`. What a cell has
    not is nan or None.
    """
    import pandas as pd

    return pd.DataFrame([dict(_row(record)) for record in records])


def _row(record: Record) -> Iterator[tuple[str, Any]]:
    cell = record.cell
    yield from (
        ("row", record.row),
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
        ("data", record.content),
        ("preset", cell.protocol),
        ("protocol", record.protocol_label),
        ("image_size", size(record.protocol.get("image_size"))),
        ("output_size", size(record.protocol.get("output_size"))),
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


def size(value: Any) -> int | str | None:
    """A size as records keep it, for readers: the side of a square, else height and width as in "480x640"."""
    if not isinstance(value, Sequence):
        return None if value is None else int(value)
    height, width = value
    return int(height) if height == width else f"{height}x{width}"


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
