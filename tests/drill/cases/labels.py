"""What rows are called: labels that no record could hold or that would do something to a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from drill.case import Case, done, refused

# JSON is YAML: escapes stand for any character.
REFUSED: list[tuple[str, object, tuple[str, ...]]] = [
    ("half of a pair", "a\ud83d", ("bytes that are not UTF-8",)),
    ("bytes of a name that is not UTF-8", "caf\udce9", ("bytes that are not UTF-8",)),
    ("escape sequence", "\x1b[31mred", ("\\x1b",)),
    ("title of the window", "\x1b]0;owned\x07", ("\\x1b",)),
    ("bell", "a\x07", ("\\x07",)),
    ("backspace", "a\bb", ("\\x08",)),
    ("NUL", "a\0b", ("\\x00",)),
    ("delete", "a\x7f", ("\\x7f",)),
    ("C1 control", "a\x9b31m", ("\\x9b",)),
    ("line break", "a\nb", ("line break",)),
    ("return", "a\rb", ("line break",)),
    ("tab", "a\tb", ("\\t",)),
    ("line separator", "a\u2028b", ("line break",)),
    ("next line", "a\x85b", ("line break",)),
    ("change of direction", "a\u202eb", ("\\u202e",)),
    ("isolate", "a\u2066b", ("\\u2066",)),
    ("byte order mark", "\ufeffa", ("\\ufeff",)),
    ("300 characters", "x" * 300, ("at most 200 characters",)),
    ("100000 characters", "x" * 100_000, ("at most 200 characters",)),
    ("blank", "   ", ("blank",)),
    ("a number", 3, ("text", "3")),
    ("a list", ["a"], ("text",)),
    ("true", True, ("text", "True")),
    ("nothing", None, ("text", "None")),
]

# Tables tell these rows by their labels; `test_labels` looks at their records.
KEPT = [
    *(
        ".5 ablation",
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "-x",
        "a/b",
        "a\\b",
        "CON",
        "nul.json",
        "~",
        "$HOME",
        "a:b",
    ),
    *(
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u00e9",
        "e\u0301",
        "\u0645\u0631\u062d\u0628\u0627",
        "\u65e5\u672c\u8a9e",
    ),
    *(
        "[bold]x[/bold]",
        "[/]",
        "[red",
        "|",
        "a|b",
        "`x`",
        "<script>",
        "=1+1",
        "&amp;",
        "%s",
        "{}",
        "a  b",
        " a ",
        "x" * 200,
    ),
]


def config(label: object) -> Callable[[Path], None]:
    """A run of one method with a label."""
    rows = [{"name": "nearest", "label": label}]
    return lambda folder: _write(
        folder / "run.json", json.dumps({"methods": rows}).replace("\x7f", "\\u007f")
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text)


CASES = [
    Case("labels", name, ("run", "--config", "run.json"), refused("label", "nearest", *words), config(label))
    for name, label, words in REFUSED
]
CASES += [
    Case(
        "labels",
        f"planned {number}",
        ("run", "--config", "run.json", "--limit", "2", "--dry-run"),
        done("run", "seg"),
        config(label),
        whole=True,
    )
    for number, label in enumerate(KEPT[:3])
]
