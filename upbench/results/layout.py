"""What a record's JSON may hold: the one place that says so. Imports no torch.

`check` is run on every record that is read. It names the first thing that is missing or of the wrong kind, by
its path in the file, so that nothing behind it has to doubt what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

from upbench.results.cell import shown

STATUSES = ("ok", "skipped", "failed")
DEEPEST = 40
_LARGEST = 2**64

Check = Callable[[str, Any], None]
"""Raises ValueError for a value, given with its path, that is not what it should be."""


def _kind(words: str, fits: Callable[[Any], bool]) -> Check:
    def check_kind(path: str, value: Any) -> None:
        if not fits(value):
            raise _bad(path, words, value)

    return check_kind


def _bad(path: str, words: str, value: Any) -> ValueError:
    return ValueError(f"{path or 'record'}: expected {words}, got {shown(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return all(part is None or isinstance(part, (str, int, float, bool)) for part in parts)


_text = _kind("text", lambda value: isinstance(value, str))
_name = _kind("a name", lambda value: isinstance(value, str) and bool(value))
_number = _kind("a number", _is_number)
_amount = _kind(
    "a number that is finite and not negative",
    lambda value: _is_number(value) and math.isfinite(value) and value >= 0,
)
_count = _kind("a whole number that is not negative", lambda value: _is_whole(value) and value >= 0)
_whole = _kind("a whole number", _is_whole)
_flag = _kind("true or false", lambda value: isinstance(value, bool))
_plain = _kind("a plain value or a list of them", _is_plain)
_anything = _kind("anything", lambda value: True)


def _maybe(check_value: Check) -> Check:
    def check_maybe(path: str, value: Any) -> None:
        if value is not None:
            check_value(path, value)

    return check_maybe


def _list(check_item: Check, least: int = 0, most: int | None = None) -> Check:
    def check_list(path: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise _bad(path, "a list", value)
        if len(value) < least or (most is not None and len(value) > most):
            raise _bad(path, f"{least} values" if least == most else f"at least {least} values", value)
        for index, item in enumerate(value):
            check_item(f"{path}[{index}]", item)

    return check_list


def _mapping(check_value: Check, least: int = 0) -> Check:
    def check_mapping(path: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _bad(path, "a mapping", value)
        if len(value) < least:
            raise _bad(path, "a mapping that is not empty", value)
        for name, item in value.items():
            check_value(f"{path}.{name}" if path else str(name), item)

    return check_mapping


def _fields(needed: Mapping[str, Check], known: Mapping[str, Check] | None = None) -> Check:
    """A mapping with fields that must be there and fields that may be; others are free."""

    def check_fields(path: str, value: Any) -> None:
        _mapping(_anything)(path, value)
        for name, check_value in {**needed, **(known or {})}.items():
            inner = f"{path}.{name}" if path else name
            if name in value:
                check_value(inner, value[name])
            elif name in needed:
                raise ValueError(f"{inner} is missing")

    return check_fields


def _size(path: str, value: Any) -> None:
    """A side of a square, or height and width."""
    if not _is_whole(value):
        _list(_whole, 2, 2)(path, value)


def _scores(path: str, value: Any) -> None:
    """Values of images: a list of names, and one list of as many values for each seed."""
    _fields({"names": _list(_text), "values": _list(_list(_maybe(_number)))})(path, value)
    for index, of_seed in enumerate(value["values"]):
        if len(of_seed) != len(value["names"]):
            count = len(value["names"])
            raise ValueError(f"{path}.values[{index}]: expected {count} values, got {len(of_seed)}")


_SPREAD = _fields(
    {"values": _list(_maybe(_number), least=1)}, {"mean": _maybe(_number), "std": _maybe(_number)}
)

_METHOD = _fields(
    {"name": _name, "weights": _text, "options": _mapping(_plain), "camera": _text, "label": _text}
)

_COST = _fields(
    {
        "parameters": _amount,
        "macs": _maybe(_amount),
        "latency_ms": _amount,
        "latency_q25_ms": _amount,
        "latency_q75_ms": _amount,
        "peak_memory_bytes": _maybe(_amount),
        "hardware": _text,
        "dtype": _text,
        "batch": _count,
        "channels": _count,
        "feature_size": _list(_count, 2, 2),
        "output_size": _list(_count, 2, 2),
        "warnings": _list(_text),
    }
)

_COLUMN = _fields(
    {"name": _name, "title": _text, "higher_is_better": _maybe(_flag), "unit": _text, "main": _flag}
)

_WEIGHTS = _fields({}, {"name": _maybe(_text), "sha256": _maybe(_text), "images_seen": _maybe(_count)})

_FIRST = _fields(
    {
        "cell": _fields({"method": _METHOD, "preset": _name, "dataset": _name}),
        "about": _fields({}, {"title": _text}),
        "protocol": _fields({}, {"name": _text, "version": _whole}),
    }
)
"""What a record of the first edition must be before it can be made one of the second."""

_RECORD = _fields(
    {
        "cell": _fields(
            {
                **dict.fromkeys(("task", "backbone", "dataset", "protocol", "device", "dtype"), _name),
                "method": _METHOD,
                "seeds": _list(_whole),
                "limit": _maybe(_whole),
            },
            {"probe": _mapping(_plain), "data": _text},
        ),
        "status": _kind(f"one of {', '.join(STATUSES)}", lambda value: value in STATUSES),
        "metrics": _mapping(_mapping(_SPREAD)),
        "per_image": _mapping(_scores),
    },
    {
        **dict.fromkeys(("key", "reason", "traceback", "row", "started"), _text),
        "about": _fields(
            {},
            {
                **dict.fromkeys(("title", "paper", "license"), _text),
                "year": _maybe(_whole),
                "native_ratio": _maybe(_number),
            },
        ),
        "columns": _list(_COLUMN),
        "cost": _mapping(_COST),
        "inputs": _fields({}, {"weights": _maybe(_WEIGHTS)}),
        "data": _mapping(
            _fields(
                {"images": _count}, {"official": _maybe(_count), "fingerprint": _text, "names": _anything}
            )
        ),
        "protocol": _fields(
            {},
            {
                "name": _text,
                "version": _whole,
                "exact": _text,
                "source": _text,
                "departures": _list(_text),
                "image_size": _maybe(_size),
                "output_size": _maybe(_size),
                "parameters": _mapping(_anything),
                "recipe": _mapping(_anything),
            },
        ),
        "environment": _fields(
            {},
            {
                **{name: _maybe(_text) for name in ("cpu", "gpu", "upbench")},
                "cores": _maybe(_whole),
                "packages": _mapping(_maybe(_text)),
            },
        ),
        "warnings": _list(_text),
        "seconds": _number,
    },
)


def check(data: Any) -> None:
    """Whether plain values are a record of this edition.

    Raises:
        ValueError: They are not; names the first thing that is wrong.
    """
    check_values(data)
    _RECORD("", data)
    if data["status"] == "ok":
        try:
            _mapping(_mapping(_SPREAD, least=1), least=1)("metrics", data["metrics"])
            _list(_COLUMN, least=1)("columns", data.get("columns", ()))
            _agree(data)
        except ValueError as error:
            raise ValueError(f"status is ok, but {error}") from error


def _agree(data: Mapping[str, Any]) -> None:
    """Whether the parts of a result are of one evaluation: metrics have columns, seeds have values."""
    names = [column["name"] for column in data["columns"]]
    if len(set(names)) < len(names):
        raise ValueError("columns: a name stands there twice")
    seeds = {1, len(data["cell"]["seeds"])}  # a task that draws nothing has one value in all
    for split, metrics in data["metrics"].items():
        if odd := sorted(set(metrics) ^ set(names)):
            raise ValueError(f"metrics.{split}: not those of the columns ({shown(odd[0])})")
        for name, spread in metrics.items():
            _seeds(f"metrics.{split}.{name}.values", spread["values"], seeds)
    for split, scores in data["per_image"].items():
        if split not in data["metrics"]:
            raise ValueError(f"per_image.{split}: a split without metrics")
        _seeds(f"per_image.{split}.values", scores["values"], seeds)


def _seeds(path: str, values: Any, counts: set[int]) -> None:
    if len(values) not in counts:
        words = " or ".join(map(str, sorted(counts)))
        raise ValueError(f"{path}: expected {words} of them, as there are seeds, got {len(values)}")


def check_cost(data: Any) -> None:
    """Whether plain values are what `upbench.cost.measure` measured.

    Raises:
        ValueError: They are not; names the first thing that is wrong.
    """
    check_values(data)
    _COST("cost", data)


def check_first(data: Any) -> None:
    """Whether plain values can be read as a record of the first edition.

    Raises:
        ValueError: They cannot.
    """
    check_values(data)
    _FIRST("", data)


def check_values(data: Any) -> None:
    """Whether values can be handled at all, whatever they mean: not too deep, too large, or no text.

    Raises:
        ValueError: They cannot.
    """
    unread: list[Iterator[Any]] = [iter((data,))]  # one a level: no copy of what may be large
    while unread:
        for value in unread[-1]:
            if isinstance(value, Mapping):
                unread.append(chain.from_iterable(value.items()))
                break
            if isinstance(value, (list, tuple)):
                unread.append(iter(value))
                break
            if isinstance(value, str):
                value.encode()  # a lone surrogate cannot be printed; UnicodeEncodeError is a ValueError
            elif isinstance(value, int) and abs(value) > _LARGEST:
                raise ValueError("a whole number of more than 64 bits")
        else:
            unread.pop()
        if len(unread) > DEEPEST + 1:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
