"""Records and cost files that hold anything: read, or refused in one line; other rows stay right."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recording import COST, record

from upbench.cli.dispatch import main
from upbench.errors import UpbenchError
from upbench.results.records import Record, load_records, read_record, write_record
from upbench.run.loop import _read_cost, finished, run, summary

pytestmark = pytest.mark.drill("records: mutated")

ROOT = Path(__file__).resolve().parents[2]
FIRST_EDITION = ROOT / "results" / "reference" / "quick" / "records"
BUDGETS = [120, pytest.param(3000, marks=pytest.mark.whole)]
KINDS = ["cut", "drop", "put", "flip"]
GONE = "\0gone"
NUMBERS = st.sampled_from([0, -1, 1e308, -1e308, 1e-320, 2**63, 2**64, 10**30, 1e999, -1e999, True, 0.5])
TEXTS = st.sampled_from(
    ["", "x", "\ud800", "\x1b[2J", "=1+1", "a|b", "../../x", "\0", "x" * 5000, "<b>", "１"]
)
DEEP = st.integers(1, 60).map(lambda depth: json.loads("[" * depth + "]" * depth))
VALUES = (
    NUMBERS | TEXTS | DEEP | st.sampled_from([GONE, None, [], {}, {"": 1}, {"x": {"y": []}}, [[1], ["2"]]])
)


def _originals() -> list[dict[str, Any]]:
    facts = {"val": {"images": 3, "official": 10, "fingerprint": "ab", "names": "cd"}}
    ours = record("raysup", data=facts, cell_data="0123456789abcdef", warnings=["w"])
    failed = record(
        "raysup", status="failed", reason="boom", traceback="t", metrics={}, columns=[], per_image={}
    )
    first = json.loads(min(FIRST_EDITION.glob("*.json")).read_text())
    return [json.loads(json.dumps(each.to_dict())) for each in (ours, failed)] + [first]


ORIGINALS = _originals()


def _places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place but the whole, of long lists the first."""
    if place:
        yield place
    if isinstance(node, dict):
        for key, item in node.items():
            yield from _places(item, (*place, key))
    elif isinstance(node, list):
        for index, item in enumerate(node[:3]):
            yield from _places(item, (*place, index))


def _apply(data: Any, place: tuple[Any, ...], value: Any) -> None:
    *above, last = place
    try:
        for key in above:
            data = data[key]
        if value == GONE:
            del data[last]
        else:
            data[last] = copy.deepcopy(value)
    except (KeyError, IndexError, TypeError):
        pass  # an earlier change took the place away


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A record with a few changes of its values, then of its bytes."""
    data = copy.deepcopy(draw(st.sampled_from(ORIGINALS)))
    for place, value in draw(st.lists(st.tuples(st.sampled_from(list(_places(data))), VALUES), max_size=3)):
        _apply(data, place, value)
    content = json.dumps(data).encode()
    for at, kind, more in draw(
        st.lists(
            st.tuples(st.floats(0, 1), st.sampled_from(KINDS), st.binary(max_size=6)),
            max_size=2,
        )
    ):
        index = int(at * len(content))
        if kind == "cut":
            content = content[:index]
        elif kind == "drop":
            content = content[:index] + content[index + 1 :]
        elif kind == "put":
            content = content[:index] + more + content[index:]
        elif content[index : index + 1]:
            content = content[:index] + bytes([content[index] ^ 1 << len(more)]) + content[index + 1 :]
    return content


def _one_line(text: str) -> None:
    assert "Traceback" not in text
    assert text.count("\n") == 1, text
    assert text.rstrip("\n").isprintable(), text
    assert len(text) < 700, text


def _report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`upbench report`, in both formats: refused in a line, or right about the record that is in order."""
    for words in (["--format", "csv", "--metrics", "all"], ["--against", "bilinear"]):
        code = main(["report", str(folder), *words])
        captured = capsys.readouterr()
        if code == 2:
            assert captured.out == ""
            _one_line(captured.err)
            continue
        assert code == 0
        if words[0] == "--format":
            rows = list(csv.DictReader(io.StringIO(captured.out)))
            (ours,) = [row for row in rows if row["method"] == "Bilinear" and row["seg/miou"]]
            assert float(ours["seg/miou"]) == 51


def _resume(folder: Path, bad: Path, original: Record) -> None:
    """What a run that resumes makes of the file: a record that it can speak of, or a line."""
    planned = SimpleNamespace(
        cell=original.cell,
        skip="",
        inputs=original.inputs,
        row=original.row,
        task=SimpleNamespace(metrics=[SimpleNamespace(name=c["name"]) for c in original.columns]),
        dataset=SimpleNamespace(eval_splits=tuple(original.metrics)),
    )
    path = bad.rename(bad.with_name(f"x-{original.cell.key[:8]}.json"))
    told: list[str] = []
    kept = finished(folder, [planned], told.append, rename=False)  # type: ignore[list-item]
    for found in kept.values():
        assert found.cell.key == original.cell.key
        _one_line(summary(found) + "\n")
    for text in told:
        _one_line(text + "\n")
    path.unlink()


@pytest.mark.parametrize("examples", BUDGETS)
def test_whatever_a_record_holds(examples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "records"
    folder.mkdir()
    good, original = record("bilinear", cell_data="0123456789abcdef"), Record.from_dict(ORIGINALS[0])

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mutated())
    def try_one(content: bytes) -> None:
        write_record(folder, good)
        bad = folder / "bad.json"
        bad.write_bytes(content)
        _report(folder, capsys)
        _resume(folder, bad, original)

    try_one()


# -------------------- what stands in a file's place --------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "circle", "nothing", "device", "large", "not UTF-8"])
def test_a_run_that_resumes_says_what_it_cannot_read(toy, tmp_path: Path, capsys, kind: str):
    out = tmp_path / "run"
    (before,) = run(toy.config(out))
    (path,) = (out / "records").glob("*.json")
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 30)
    elif kind == "not UTF-8":
        path.write_bytes(b"\xff")
    else:
        path.symlink_to({"circle": path.name, "nothing": "nowhere", "device": "/dev/zero"}[kind])
    capsys.readouterr()
    if kind == "folder":
        with pytest.raises(UpbenchError, match=r"cannot write .*: it is a folder; move it away"):
            run(toy.config(out))
        assert path.is_dir()
        return
    (after,) = run(toy.config(out))
    assert after.metrics == before.metrics
    assert read_record(path).cell.key == before.cell.key
    lines = [line for line in capsys.readouterr().err.splitlines() if path.name[-20:] in line]
    assert len(lines) == 1
    assert lines[0].endswith("(its cell is run again)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path):
    path = write_record(tmp_path, record("bilinear"))
    path.chmod(0)
    with pytest.raises(UpbenchError, match="permission denied"):
        load_records(tmp_path)


# -------------------- cost files --------------------


def _cost(**changes: Any) -> str:
    return json.dumps({key: value for key, value in {**COST, **changes}.items() if value != GONE})


DAMAGED = {
    "negative": _cost(latency_ms=-1.0),
    "not a number": _cost(latency_ms=float("nan")),
    "endless": _cost(macs=float("inf")),
    "endless, in JSON": _cost().replace("75.81", "1e999"),
    "truth": _cost(parameters=True),
    "text": _cost(latency_ms="75"),
    "a key gone": _cost(latency_ms=GONE),
    "size": _cost(output_size=[224]),
    "no text": _cost(warnings=[1]),
    "a number of 100 digits": _cost(parameters=10**100),
    "half a character": _cost(hardware="\ud800"),
    "a list": "[]",
    "nothing": "",
    "cut": _cost()[:50],
    "deep": "[" * 100_000,
    "large": json.dumps("x" * (1 << 21)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_cost_file_is_measured_again(kind: str, tmp_path: Path, capsys):
    path = tmp_path / "c.json"
    path.write_text(_cost())
    assert _read_cost(path) == json.loads(_cost())
    assert capsys.readouterr().err == ""
    path.write_text(DAMAGED[kind])
    assert _read_cost(path) is None
    said = capsys.readouterr().err
    _one_line(said)
    assert "c.json" in said
    assert "measured again" in said


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(st.tuples(st.sampled_from(list(COST)), VALUES), min_size=1, max_size=3),
    junk=st.binary(max_size=2),
)
def test_whatever_a_cost_file_holds(changes, junk, tmp_path: Path, capsys):
    path = tmp_path / "c.json"
    path.write_bytes(_cost(**dict(changes)).encode() + junk)
    read = _read_cost(path)
    said = capsys.readouterr().err
    if read is None:
        _one_line(said)
        return
    found = record("bilinear", cost={"cpu": read})
    assert Record.from_dict(json.loads(json.dumps(found.to_dict()))).cost


def test_no_damaged_cost_gets_into_a_record(toy, tmp_path: Path, capsys):
    out = tmp_path / "run"
    (before,) = run(toy.config(out))
    for path in (out / "cost").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "latency_ms": -5.0}))
    for path in (out / "records").glob("*.json"):
        path.unlink()
    capsys.readouterr()
    (after,) = run(toy.config(out))
    assert set(after.cost) == set(before.cost)
    assert all(cost["latency_ms"] >= 0 for cost in after.cost.values())
    assert (
        "latency_ms: expected a number that is finite and not negative, got -5.0" in capsys.readouterr().err
    )
