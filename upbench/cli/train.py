"""`upbench train`: weights for a method."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
from typing import Any

from upbench.cli._parser import Command, integer, real, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    from upbench.train.config import TrainConfig, ViewConfig

    parser.add_argument("method", metavar="METHOD", help="name of a trainable method")
    for config in (TrainConfig, ViewConfig):
        helps = _attributes(config)
        for field in dataclasses.fields(config):
            if field.name not in ("method", "views"):
                _add_field(parser, field, helps[field.name])
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins"
    )


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from upbench.registry import load_plugin_files
    from upbench.train.config import TrainConfig, ViewConfig

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "options" in given:
        given["options"] = settings("--options", given["options"])
    names = {
        config: {field.name for field in dataclasses.fields(config)} for config in (TrainConfig, ViewConfig)
    }
    views = ViewConfig(**{name: value for name, value in given.items() if name in names[ViewConfig]})
    config = TrainConfig(views=views, **{n: v for n, v in given.items() if n in names[TrainConfig]})
    load_plugin_files(arguments.plugin)
    from upbench.system.outputs import emit
    from upbench.train.loop import train

    result = train(config)
    if not result.finished:
        return 128 + (result.stopped_by or signal.SIGINT)
    emit(f"{result.out}  sha256 {result.sha256}")
    if result.val_cosine is not None:
        emit(f"cosine similarity {result.val_cosine:.4f}, bilinear {result.val_bilinear:.4f}")
    return 0


def _add_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], text: str) -> None:
    """A flag for a field of a configuration; its type is read from the annotation."""
    flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    shown = (
        "" if required or field.default in (None, (), dataclasses.MISSING) else f" (default: {field.default})"
    )
    text = (text + shown).replace("%", "%%")
    number = real if "float" in kind else integer if "int" in kind else str
    if kind == "bool":
        parser.add_argument(flag, action="store_true", default=None, help=text)
    elif kind.startswith("dict"):
        parser.add_argument(flag, action="append", metavar="KEY=VALUE", help=text)
    elif kind.startswith("tuple"):
        parser.add_argument(flag, action="extend", nargs="+", type=number, required=required, help=text)
    else:
        parser.add_argument(flag, type=number, required=required, help=text)


def _attributes(config: type) -> dict[str, str]:
    """What a dataclass says of its fields under "Attributes:"."""
    lines = re.findall(r"^        (\w+): (.+(?:\n            .+)*)", config.__doc__ or "", re.MULTILINE)
    return {name: " ".join(text.split()).replace("`", "").rstrip(".") for name, text in lines}


COMMAND = Command(
    "train a method on photos",
    add_arguments,
    call,
    "Trains a method to upsample a backbone's features, without labels. The same with --resume goes on.",
)
