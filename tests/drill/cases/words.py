"""Words, files and folders that a user gives to the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from drill.case import Case, refused

LONG = "x" * 300


def yaml(text: str | bytes) -> Callable[[Path], None]:
    """Writes run.yaml."""
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: _write(folder / "run.yaml", data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def folder(name: str) -> Callable[[Path], None]:
    """Makes a folder with a file in it."""

    def make(place: Path) -> None:
        (place / name).mkdir()
        (place / name / "kept.txt").write_text("kept")

    return make


def pipe(name: str) -> Callable[[Path], None]:
    """Makes a pipe that nobody writes to: whoever reads it waits for ever."""
    return lambda place: os.mkfifo(place / name)


def link(name: str, target: str) -> Callable[[Path], None]:
    """Makes a link."""
    return lambda place: (place / name).symlink_to(target)


def file(name: str, data: bytes) -> Callable[[Path], None]:
    """Makes a file."""
    return lambda place: _write(place / name, data)


# Nine levels of nine aliases each: 3 kB that stand for 400 million values.
_LEVELS = "abcdefghi"
BOMB = "".join(
    f"{name}: &{name} [{', '.join(['x' if i == 0 else '*' + _LEVELS[i - 1]] * 9)}]\n"
    for i, name in enumerate(_LEVELS)
)
DEEP = "[" * 3000 + "]" * 3000

CONFIGS: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("bomb", BOMB, ("run.yaml", "more than 10000 values")),
    ("bomb of merges", "a: &a {x: 1}\n" + "b: &b {<<: [*a, *a]}\nseeds: [[*b, *b]]\n" * 3000, ("run.yaml",)),
    ("refers to itself", "probe: &a\n  lr: *a\n", ("refers to itself",)),
    ("deep", f"probe: {DEEP}", ("nested deeper",)),
    ("deep by blocks", "\n".join("  " * i + "a:" for i in range(500)), ("nested deeper",)),
    ("date", "seeds: 2024-01-32\n", ("seeds", "whole number", "2024-01-32")),
    ("date as limit", "limit: 2024-13-45\n", ("limit", "whole number", "2024-13-45")),
    ("number of 5000 digits", f"seeds: {'9' * 5000}\n", ("run.yaml",)),
    ("not a number", "seeds: .nan\n", ("seeds", "whole number", "nan")),
    ("infinite", "workers: .inf\n", ("workers", "whole number")),
    ("key twice", "seeds: 1\nseeds: 2\n", ("'seeds'", "twice", "line 2")),
    ("probe's key twice", "probe: {lr: 1, lr: 2}\n", ("'lr'", "twice")),
    ("key that is no text", "1: 2\n", ("key", "'1'", "not text")),
    ("key that is a list", "? [a]\n: b\n", ("key", "not text")),
    ("unknown key", "method: [nearest]\n", ("unknown key", "methods")),
    ("unknown key of 300 characters", f"{LONG}: 1\n", ("unknown key", "300 characters")),
    ("tag of Python", "seeds: !!python/object/apply:os.getpid []\n", ("not yaml", "tag")),
    ("bytes", "seeds: !!binary aGVsbG8=\n", ("seeds", "whole number")),
    ("broken", "seeds: [1, 2\n", ("not yaml",)),
    ("tabs", "probe:\n\tlr: 1\n", ("not yaml", "line 2")),
    ("two documents", "seeds: 1\n---\nseeds: 2\n", ("not yaml", "another document")),
    ("a list", "- seeds\n", ("mapping of settings",)),
    ("a word", "seeds\n", ("mapping of settings",)),
    ("not UTF-8", b"out: \xff\xfe\n", ("run.yaml", "not text in utf-8")),
    ("UTF-16", "seeds: 1\n".encode("utf-16"), ("run.yaml", "not text in utf-8")),
    ("binary", bytes(range(256)), ("run.yaml", "not text in utf-8")),
    ("NUL", b"out: \x00\n", ("not yaml",)),
    ("NUL in a path", 'out: "a\\0b"\n', ("NUL",)),
    ("large", "# " + "x" * 2_000_000, ("too large",)),
    ("null for a list", "methods:\n", ("methods", "list of names", "None")),
    ("probe that is a list", "probe: [lr]\n", ("probe", "mapping")),
    ("probe with a mapping", "probe: {lr: {a: 1}}\n", ("probe", "'lr'", "plain value")),
    ("method without a name", "methods: [{label: x}]\n", ("methods", "name")),
    ("method that is a number", "methods: [3]\n", ("methods", "3")),
    ("option twice", "methods: [{name: jbu, radius: 1, options: {radius: 2}}]\n", ("radius", "twice")),
    ("option not finite", "methods: [{name: jbu, sigma: .nan}]\n", ("'sigma'", "finite")),
    ("option beyond 64 bits", f"methods: [{{name: jbu, radius: {10**30}}}]\n", ("'radius'", "whole number")),
    ("weights with a control character", 'methods: ["a:\\x1b[31m"]\n', ("weights", "\\x1b")),
    ("protocol with a line break", 'protocol: "a\\nb"\n', ("protocol", "line break")),
    ("protocol twice", "protocol: standard\npreset: quick\n", ("two names",)),
    ("home of nobody", "out: ~nosuchuser/runs\n", ("no user", "nosuchuser")),
]

EXPORT = ("export", "jbu", "--out", "a.pt2", "--image-size", "28")

FLAGS: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("probe deep", ("run", "--probe", f"lr={DEEP}"), ("--probe lr", "nested deeper")),
    ("probe bomb", ("run", "--probe", f"lr={BOMB}"), ("--probe lr", "values")),
    ("probe date", ("run", "--probe", "lr=2024-13-45"), ("lr", "number", "2024-13-45")),
    ("probe without a value", ("run", "--probe", "lr"), ("KEY=VALUE", "'lr'")),
    ("probe with an empty value", ("run", "--probe", "lr="), ("KEY=VALUE",)),
    ("probe twice", ("run", "--probe", "lr=1", "--probe", "lr=2"), ("'lr'", "twice")),
    (
        "probe twice by another spelling",
        ("run", "--probe", "batch-size=1", "--probe", "batch_size=2"),
        ("twice",),
    ),
    ("probe with a control character", ("run", "--probe", "lr=\x1b[2J"), ("--probe lr", "\\x1b")),
    ("probe with a tag", ("run", "--probe", "lr=!!python/name:os.system"), ("not yaml", "tag")),
    ("probe unknown", ("run", "--probe", "lrr=1"), ("unknown probe setting", "'lr'")),
    ("home of nobody for out", ("run", "--out", "~nosuchuser/x"), ("no user", "nosuchuser")),
    ("home of nobody for config", ("run", "--config", "~nosuchuser/x.yaml"), ("no user",)),
    ("home of nobody for plugin", ("run", "--plugin", "~nosuchuser/x.py"), ("no user",)),
    ("home of nobody for a dataset", ("run", "--datasets", "camvid:~nosuchuser/x"), ("no user",)),
    ("home of nobody for weights", ("run", "--methods", "jafar:~nosuchuser/x.pth"), ("no user",)),
    ("home of nobody for report", ("report", "~nosuchuser/x"), ("no user",)),
    ("home of nobody for a table", ("report", "--out", "~nosuchuser/x"), ("no user",)),
    (
        "home of nobody for training",
        ("train", "jafar", "--images", "~nosuchuser/x", "--out", "a.safetensors"),
        ("no user",),
    ),
    ("long name of out", ("run", "--methods", "nearest", "--out", LONG), ("300 characters", "too long")),
    ("long name of config", ("run", "--config", LONG), ("300 characters", "too long")),
    ("long name of a plugin", ("run", "--plugin", LONG + ".py"), ("303 characters", "too long")),
    (
        "long name of a dataset's folder",
        ("run", "--datasets", f"camvid:{LONG}"),
        ("300 characters", "too long"),
    ),
    ("long name of a report", ("report", LONG), ("xxx",)),
    ("long name of a table", ("report", "--out", LONG), ("300 characters", "too long")),
    ("long name of a method", ("run", "--methods", LONG), ("unknown method", "300 characters")),
    ("long name of a command", (LONG,), ("unknown command", "300 characters")),
    ("long option", ("run", f"--{LONG}"), ("unknown option",)),
    ("long list", ("list", LONG), ("unknown list", "300 characters")),
    ("command with an escape", ("\x1b[31mrun",), ("unknown command", "\\x1b")),
    ("name that is not UTF-8", ("describe", "method", "caf\udce9"), ("unknown method", "\\udce9")),
    ("name that is empty", ("run", "--methods", ""), ("methods", "NAME")),
    ("blank out", ("run", "--out", " "), ("out", "text")),
    ("no such device", ("run", "--device", "cuda:1000"), ("unknown device",)),
    ("device in other digits", ("run", "--device", "cuda:\u0663"), ("unknown device",)),
    ("no such format", ("report", "--format", "exe"), ("unknown format",)),
    ("wildcard without a match", ("run", "--methods", "*zz*"), ("no method matches",)),
    ("argument too many", ("list", "methods", "tasks"), ("unexpected argument", "'tasks'")),
    ("no such kind", ("describe", "metod", "jbu"), ("unknown kind", "method")),
    *(
        (f"options {name}", (*EXPORT, "--options", f"radius={text}"), words)
        for name, text, words in (
            ("deep", DEEP, ("--options radius", "nested deeper")),
            ("bomb", BOMB, ("--options radius", "values")),
            ("tag", "!!python/name:os.system", ("--options radius", "tag")),
            ("word", "wide", ("jbu", "radius", "wide")),
            ("fraction", "1.5", ("jbu", "radius", "1.5")),
            ("below", "-3", ("jbu", "radius", "-3")),
        )
    ),
    ("options twice", (*EXPORT, "--options", "radius=1", "--options", "radius=2"), ("'radius'", "twice")),
    *(
        (f"option called {name}", (*EXPORT, "--options", f"{name}=3"), ("unknown option", f"'{name}'"))
        for name in ("name", "weights", "channels", "method", "out", "self")
    ),
]

PLUGINS: list[tuple[str, str, Callable[[Path], None], tuple[str, ...]]] = [
    ("a folder", "p.py", folder("p.py"), ("plugin file", "folder")),
    ("a pipe", "p.py", pipe("p.py"), ("plugin file", "pipe")),
    ("a device", "/dev/zero", lambda place: None, ("plugin file", "device")),
    ("a broken link", "p.py", link("p.py", "nowhere.py"), ("not found", "link")),
    ("a looping link", "p.py", link("p.py", "p.py"), ("plugin file", "circle")),
    ("not UTF-8", "p.py", file("p.py", b"x = '\xff'\n"), ("p.py", "utf-8")),
    ("NUL", "p.py", file("p.py", b"x = 1\0\n"), ("p.py", "null")),
    ("broken", "p.py", file("p.py", b"def f(:\n"), ("p.py", "SyntaxError")),
    ("deep", "p.py", file("p.py", b"x = " + b"(" * 300 + b")" * 300), ("p.py", "nested")),
    ("empty", "p.py", file("p.py", b""), ("registers nothing",)),
    ("no Python", "p.txt", file("p.txt", b""), ("must end in .py",)),
    ("an exit", "p.py", file("p.py", b"import sys; sys.exit(0)\n"), ("SystemExit",)),
    (
        "lines in its error",
        "p.py",
        file("p.py", b"raise ValueError('a\\nb\\x1b[31m')\n"),
        ("ValueError", "a b\\x1b[31m"),
    ),
    ("missing", "p.py", lambda place: None, ("not found",)),
    ("a name that is not UTF-8", "p\udcff.py", file("p\udcff.py", b""), ("p\\udcff.py", "registers nothing")),
    ("below a file", "a/p.py", file("a", b""), ("plugin file", "not a folder")),
]

_NAMED = """from upbench import Upsampler

class A(Upsampler):
    name = {!r}

    def forward(self, image, features, output_size):
        return features
"""
NAMES = [
    "all",
    "two words",
    "a*",
    "a?",
    "[a]",
    "a:b",
    "a,b",
    "a/b",
    "-a",
    ".a",
    "",
    " ",
    "a\n",
    "a\x1b[31m",
    "a" * 65,
    3,
    "\u202ea",
]

OUTS: list[tuple[str, str, Callable[[Path], None], tuple[str, ...]]] = [
    ("a folder", "x{}", lambda place: [folder(f"x{end}")(place) for end in ENDS], ("folder",)),
    ("a pipe", "x{}", lambda place: [pipe(f"x{end}")(place) for end in ENDS], ("pipe",)),
    ("a broken link", "x{}", lambda place: [link(f"x{end}", "gone")(place) for end in ENDS], ("link",)),
    ("a looping link", "x{}", lambda place: [link(f"x{end}", f"x{end}")(place) for end in ENDS], ("circle",)),
    ("in no folder", "no/x{}", lambda place: None, ("no such file or folder",)),
    ("below a file", "f/x{}", file("f", b"kept"), ("file",)),
]
ENDS = ("", ".json", ".pt2", ".onnx", ".safetensors")
WRITERS: list[tuple[str, tuple[str, ...]]] = [
    ("", ("report", "--out")),
    (".json", ("profile", "--methods", "nearest", "--size", "28", "--out")),
    (".pt2", ("export", "nearest", "--image-size", "28", "--out")),
    (".onnx", ("export", "nearest", "--image-size", "28", "--out")),
]


def notes(*names: str) -> Callable[[Path], None]:
    """A file that is named like a photo, and others that are somebody's."""
    return lambda place: [_write(place / name, b"kept") for name in ("a.jpg", *names)]  # type: ignore[func-returns-value]


TRAINING: list[tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
    ("notes of the same name", ".", (), ("notes.md",), ("notes.md", "--force")),
    ("another curve", ".", (), ("notes.curve.jsonl",), ("notes.curve.jsonl", "--force")),
    ("weights", ".", (), ("notes.safetensors",), ("notes.safetensors", "--force")),
    ("a checkpoint", ".", (), ("notes.resume.pt",), ("notes.resume.pt", "--resume", "--force")),
    ("a checkpoint and no photos", "no", ("--force",), ("notes.resume.pt",), ("image folder not found",)),
    ("no validation photos", ".", ("--val-images", "no", "--force"), ("notes.resume.pt",), ("not found",)),
    ("no such option", ".", ("--force", "--options", "x=1"), ("notes.resume.pt",), ("option", "'x'")),
    ("no such method's weights", ".", ("--init", "no.pth"), ("notes.writable",), ("no.pth", "not found")),
]

CASES = [
    *(
        Case("config", name, ("run", "--config", "run.yaml"), refused(*words), yaml(text))
        for name, text, words in CONFIGS
    ),
    Case("config", "a folder", ("run", "--config", "c"), refused("config file c", "folder"), folder("c")),
    Case("config", "a pipe", ("run", "--config", "c"), refused("config file c", "pipe"), pipe("c")),
    Case("config", "a device", ("run", "--config", "/dev/zero"), refused("config file", "device")),
    Case("config", "a broken link", ("run", "--config", "c"), refused("not found", "link"), link("c", "d")),
    Case("config", "a looping link", ("run", "--config", "c"), refused("circle"), link("c", "c")),
    *(Case("words", name, arguments, refused(*words)) for name, arguments, words in FLAGS),
    *(
        Case("plugin files", name, ("list", "methods", "--plugin", path), refused(*words), given)
        for name, path, given, words in PLUGINS
    ),
    *(
        Case(
            "plugin names",
            repr(name),
            ("list", "methods", "--plugin", "p.py"),
            refused("name", "p.py"),
            file("p.py", _NAMED.format(name).encode()),
        )
        for name in NAMES
    ),
    *(
        Case("outputs", f"{command[0]}{end}: {name}", (*command, path.format(end)), refused(*words), given)
        for name, path, given, words in OUTS
        for end, command in WRITERS
    ),
    Case(
        "outputs",
        "train: a long name",
        ("train", "jafar", "--images", ".", "--out", LONG + ".safetensors"),
        refused("too long"),
        file("a.jpg", b""),
    ),
    *(
        Case(
            "outputs",
            f"train: {name}",
            ("train", "jafar", "--images", images, "--out", "notes.safetensors", *more),
            refused(*words),
            notes(*there),
        )
        for name, images, more, there, words in TRAINING
    ),
    Case(
        "outputs",
        "train: photos that are none, with a checkpoint to be forgotten",
        ("train", "jafar", "--images", ".", "--out", "notes.safetensors", "--force"),
        refused("a.jpg"),
        notes("notes.resume.pt", "notes.md", "notes.writable"),
        whole=True,
    ),
    *(
        Case(
            "places", f"{name}={value}", words, refused(*told), file("f", b"kept"), True, True, {name: value}
        )
        for name, value, words, told in (
            ("UPBENCH_CACHE", "~nosuchuser/x", ("run", "--methods", "nearest"), ("no user", "nosuchuser")),
            ("UPBENCH_CACHE", "f", ("run", "--methods", "nearest"), ("cache folder", "UPBENCH_CACHE")),
            ("UPBENCH_CACHE", "/dev/null/x", ("run", "--methods", "nearest"), ("cache folder",)),
            ("UPBENCH_DATA", "~nosuchuser/x", ("run", "--datasets", "camvid"), ("no user", "nosuchuser")),
            ("UPBENCH_DATA", "f", ("run", "--datasets", "camvid"), ("dataset folder", "not a folder")),
        )
    ),
    Case("outputs", "report: a device", ("report", "--out", "/dev/null"), refused("device")),
    Case(
        "outputs",
        "run: a file",
        ("run", "--methods", "nearest", "--out", "f"),
        refused("file"),
        file("f", b"kept"),
    ),
    Case(
        "outputs",
        "run: below a file",
        ("run", "--methods", "nearest", "--out", "f/a"),
        refused("file"),
        file("f", b"kept"),
    ),
    Case("outputs", "run: a pipe", ("run", "--methods", "nearest", "--out", "f"), refused("f"), pipe("f")),
]
