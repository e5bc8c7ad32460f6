"""Records and costs that hold anything: `report` refuses them in one line and changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recording import record

from drill.case import Case, done, refused
from upbench.results.records import LARGEST, write_record

RUN = Path("run") / "records"
BAD = "bad.json"
_GONE = object()


def _beside(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run with a record in order, and beside it what `make` makes at the path that it is given."""

    def given(folder: Path) -> None:
        (folder / RUN).mkdir(parents=True)
        write_record(folder / RUN, record("bilinear"))
        make(folder / RUN / BAD)

    return given


def _text(text: str | bytes) -> Callable[[Path], None]:
    data = text if isinstance(text, bytes) else text.encode()
    return _beside(lambda path: path.write_bytes(data))


def _changed(value: Any, *place: Any) -> Callable[[Path], None]:
    """A record of which one place was changed; `_GONE` takes it away."""

    def make(path: Path) -> None:
        data = json.loads(json.dumps(record("raysup", task="depth").to_dict()))
        *above, last = place
        node = data
        for key in above:
            node = node[key]
        if value is _GONE:
            del node[last]
        else:
            node[last] = value
        path.write_text(json.dumps(data))

    return _beside(make)


def _sparse(path: Path) -> None:
    """100 MB, that take no room on the disk."""
    with path.open("wb") as file:
        file.truncate(100_000_000)


def _long(path: Path) -> None:
    path.write_text(json.dumps({**record("raysup").to_dict(), "reason": "x" * LARGEST}))


def _loop(path: Path) -> None:
    os.symlink(path.name, path)


def _dangling(path: Path) -> None:
    os.symlink("nowhere", path)


def _two(path: Path) -> None:
    for name in ("a.json", "b.json", "c.json", "d.json"):
        (path.parent / name).write_text("{")


def _no_bytes_of_text(path: Path) -> None:
    (path.parent / os.fsdecode(b"b\xff.json")).write_text("{")


def _shut(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


REPORT = ("report", "run")
NAMED = ("damaged record", BAD, "delete it")


def _files() -> list[Case]:
    """What may be in the place of a record file."""
    kinds: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
        "folder": (Path.mkdir, ("cannot read record", BAD, "folder")),
        "pipe": (lambda path: os.mkfifo(path), ("cannot read record", BAD, "pipe")),
        "link in a circle": (_loop, ("cannot read record", BAD, "circle")),
        "link to nothing": (_dangling, ("cannot read record", BAD, "no such file")),
        "link to a device": (lambda path: os.symlink("/dev/zero", path), (BAD, "device")),
        "100 MB": (_sparse, (BAD, "100,000,000 bytes")),
        "a text that is too long": (_long, (BAD, "bytes")),
        "name that is not UTF-8": (_no_bytes_of_text, ("damaged record", r"b\udcff.json")),
        "several": (_two, ("a.json", "the same holds for", "b.json", "c.json", "and 1 more")),
    }
    found = [
        Case("records", name, REPORT, refused(*words), _beside(make)) for name, (make, words) in kinds.items()
    ]
    if os.geteuid():  # root may read everything
        found.append(Case("records", "no permission", REPORT, refused(BAD, "permission"), _beside(_shut)))
    return found


def _texts() -> list[Case]:
    """Files that are hardly JSON, or no record."""
    whole = json.dumps(record("raysup", task="depth").to_dict())
    texts: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
        "empty": (b"", ()),
        "a zero byte": (b"\0", ()),
        "not UTF-8": (b"\xff" + whole.encode(), ("not text in utf-8 (byte 0)",)),
        "UTF-16": (whole.encode("utf-16"), ()),
        "half": (whole[: len(whole) // 2], ()),
        "twice": (whole + whole, ("Extra data",)),
        "a list": ("[]", ("not a record",)),
        "a number": ("1e999", ("not a record",)),
        "nested 100,000 deep": ("[" * 100_000, ("recursion",)),
        "nested 60 deep": (whole.replace('"warnings": []', f'"warnings": {"[" * 60}{"]" * 60}'), ("nested",)),
        "NaN": (whole.replace("50.0", "NaN", 1), ("NaN",)),
        "5000 digits": (whole.replace("50.0", "9" * 5000, 1), ("a number of 5000 digits",)),
        "half a character": (whole.replace('"reason": ""', r'"reason": "\ud800"'), ("surrogate",)),
        "half a character as a key": (whole.replace('"reason": ""', r'"\udfff": ""'), ("surrogate",)),
        "HTML": ("<html><body>log in</body></html>", ()),
        "another program's": ('{"schema": {"type": "object"}}', ("schema",)),
        "of a future": (whole.replace('"schema": 2', '"schema": 3'), ("newer",)),
        "escapes of a terminal": (whole.replace('"schema": 2', '"schema": "\\u001b[2J"'), ("schema",)),
    }
    return [
        Case("records", name, REPORT, refused(*NAMED[:2], *words), _text(text))
        for name, (text, words) in texts.items()
    ]


def _changes() -> list[Case]:
    """Records of which one place is wrong, in a way that would have made a wrong table."""
    many = {"values": [1.0, 2.0, 3.0]}
    changes: dict[str, tuple[Any, tuple[Any, ...], str]] = {
        "metrics gone": (_GONE, ("metrics",), "metrics is missing"),
        "metrics empty": ({}, ("metrics",), "not empty"),
        "no values": ([], ("metrics", "val", "rmse", "values"), "at least 1"),
        "more values than seeds": (many, ("metrics", "val", "rmse"), "as there are seeds"),
        "metric without a column": (many, ("metrics", "val", "other"), "not those of the columns"),
        "column without a metric": ("else", ("columns", 0, "name"), "not those of the columns"),
        "values of images of one seed": ([[1.0, 2.0, 3.0]] * 3, ("per_image", "val", "values"), "seeds"),
        "images without a split": ({"names": [], "values": [[]]}, ("per_image", "train"), "without metrics"),
        "text for a value": (["1", "2"], ("metrics", "val", "rmse", "values"), "expected a number"),
        "truth for a value": ([True, 1.0], ("metrics", "val", "rmse", "values"), "expected a number"),
        "status": ("OK", ("status",), "expected one of"),
        "status is a list": (["ok"], ("status",), "expected one of"),
        "seeds": ("01", ("cell", "seeds"), "expected a list"),
        "a whole number of 100 digits": (10**100, ("seconds",), "64 bits"),
        "a field that there is not": (1, ("surprise",), "surprise"),
        "method is text": ("raysup", ("cell", "method"), "expected a mapping"),
        "no task": ("", ("cell", "task"), "expected a name"),
        "negative latency": (-1.0, ("cost", "cpu", "latency_ms"), "not negative"),
        "endless latency": (1e308 * 10, ("cost", "cpu", "latency_ms"), "Infinity"),
        "cost without parameters": (_GONE, ("cost", "cpu", "parameters"), "is missing"),
        "negative count of images": (-3, ("data",), "expected a mapping"),
        "size of an image": ([224], ("protocol", "image_size"), "2 values"),
        "year": ("2026", ("about", "year"), "whole number"),
        "warnings": ({"a": "b"}, ("warnings",), "expected a list"),
        "version of a package": (3, ("environment", "packages", "torch"), "expected text"),
    }
    return [
        Case("records", f"changed: {name}", REPORT, refused(*NAMED[:2], text), _changed(value, *place))
        for name, (value, place, text) in changes.items()
    ]


def _places() -> list[Case]:
    """What is given to `report` instead of a run."""

    def pipe(folder: Path) -> None:
        os.mkfifo(folder / "x.json")

    def empty(folder: Path) -> None:
        (folder / "run").mkdir()

    def hidden(folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "run" / ".a.json.12345678-1-12345678.tmp").write_text("{")

    def circle(folder: Path) -> None:
        os.symlink("run", folder / "run")

    return [
        Case("records", "place: nothing", ("report", "nowhere"), refused("nowhere", "does not exist")),
        Case("records", "place: empty", REPORT, refused("no records in"), empty),
        Case("records", "place: temporary files alone", REPORT, refused("no records in"), hidden),
        Case("records", "place: a pipe", ("report", "x.json"), refused("x.json", "pipe"), pipe),
        Case("records", "place: a circle", REPORT, refused("run"), circle),
        Case("records", "place: 300 characters", ("report", "x" * 300), refused("x" * 20, "too long")),
        Case("records", "in order", REPORT, done("Bilinear", "51.00"), _beside(lambda path: None)),
    ]


CASES: list[Case] = [*_files(), *_texts(), *_changes(), *_places()]
