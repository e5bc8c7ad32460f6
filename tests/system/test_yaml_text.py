"""YAML as a user means it."""

from __future__ import annotations

import math

import pytest

from upbench.errors import UpbenchError
from upbench.system.yaml_text import DEEPEST, MOST_VALUES, read_mapping, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("+3", 3),
        ("1_000", 1000),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("1.5e-3", 0.0015),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("true", True),
        ("no", False),
        ("null", None),
        ("", None),
        ("~", None),
        ("abc", "abc"),
        ("'1'", "1"),
        ("2024-01-02", "2024-01-02"),
        ("2024-13-45", "2024-13-45"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("{a: {b: [1]}}", {"a": {"b": [1]}}),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{a: &x {p: 1}, b: {<<: *x, q: 2}}", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("'\U0001f600'", "\U0001f600"),
    ],
)
def test_values(text, value):
    found = read_value("--probe", text)
    assert found == value
    assert type(found) is type(value)


def test_limits_themselves_are_taken():
    assert len(read_value("--probe", f"[{', '.join('1' * (MOST_VALUES - 1))}]")) == MOST_VALUES - 1
    read_value("--probe", "[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(UpbenchError, match=f"stands for more than {MOST_VALUES} values"):
        read_value("--probe", f"[{', '.join('1' * MOST_VALUES)}]")
    with pytest.raises(UpbenchError, match=f"nested deeper than {DEEPEST} levels"):
        read_value("--probe", "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "run.yaml").write_bytes("\ufeffseeds: 2\n".encode())
    assert read_mapping("config file", tmp_path / "run.yaml") == {"seeds": 2}
