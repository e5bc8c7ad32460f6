"""The command line: parses, calls the library, prints. Results go to stdout, all else to stderr.

Exit codes: 0 done; 1 done, but a cell failed; 2 bad input (one line on stderr); 130 stopped by Ctrl-C;
143 by SIGTERM, in as orderly a way.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from upbench import __version__
from upbench.config import DEVICES, DTYPES, EXECUTORS, RunConfig
from upbench.errors import UpbenchError, unknown
from upbench.protocol import PRESETS

LISTS = ("methods", "tasks", "datasets", "backbones", "weights")
FORMATS = ("md", "csv")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    try:
        with _orderly_termination():
            code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except UpbenchError as error:
        print(f"upbench: error: {error}", file=sys.stderr)
        return 2
    except _Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it: ends a command the way Ctrl-C does."""


@contextmanager
def _orderly_termination() -> Iterator[None]:
    """Turns SIGTERM into an exception: worker processes end with this one, and nothing is half-written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _main(argv: list[str]) -> int:
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and argv[0] == first and first not in _COMMANDS:
        raise unknown("command", first, _COMMANDS, "see 'upbench --help'")
    parser, commands = _parser(first)
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        options = commands[arguments.command]._option_string_actions if arguments.command else {}
        flag = next((word for word in extra if word.startswith("--")), None)
        if flag is None:
            raise UpbenchError(f"unexpected argument '{extra[0]}'; see 'upbench {arguments.command} --help'")
        raise unknown(
            "option", flag.partition("=")[0], [option for option in options if option.startswith("--")]
        )
    if arguments.command is None:
        parser.print_help()
        return 0
    code: int = _COMMANDS[arguments.command].call(arguments)
    return code


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UpbenchError(f"{message}; see '{self.prog} --help'")


def _parser(command: str | None) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, with the arguments of the one command that is asked for."""
    parser = _Parser(prog="upbench", description="Benchmark feature upsamplers: methods x tasks x backbones.")
    parser.add_argument("--version", action="version", version=f"upbench {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands: dict[str, _Parser] = {}
    for name, item in _COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name, help=item.help, description=item.description or item.help
        )
        if name == command:
            item.arguments(commands[name])
    return parser, commands


# ------------------------------------------------------------------------------------------------------- run


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    default = RunConfig()
    add = parser.add_argument
    add(
        "--methods", metavar="NAME[:WEIGHTS],...", help="methods; wildcards such as 'b*', and 'all' (default)"
    )
    add("--tasks", metavar="NAME,...", help=f"tasks (default: {','.join(default.tasks)})")
    add("--backbones", metavar="NAME,...", help=f"backbones (default: {','.join(default.backbones)})")
    add("--datasets", metavar="NAME[:FOLDER],...", help="datasets (default: each task's own)")
    add("--preset", metavar="|".join(PRESETS), help=f"protocol (default: {default.preset})")
    add("--config", metavar="FILE.yaml", help="a YAML file with any of these settings; flags win over it")
    add("--seeds", type=_integer, metavar="N", help=f"trainings of the probe (default: {default.seeds})")
    add("--limit", type=_integer, metavar="N", help="only N images of every split, for a trial")
    add("--device", metavar="|".join(DEVICES), help=f"where to compute (default: {default.device})")
    add("--dtype", metavar="|".join(DTYPES), help=f"arithmetic of the method (default: {default.dtype})")
    add("--out", metavar="DIR", help=f"folder of the records (default: {default.out})")
    add(
        "--plugin", action="append", dest="plugins", metavar="FILE.py", help="a file with plugins; repeatable"
    )
    add("--force", action="store_true", default=None, help="redo cells that are finished")
    add("--executor", metavar="|".join(EXECUTORS), help=f"where cells run (default: {default.executor})")
    add("--workers", type=_integer, metavar="N", help="cells at a time, for process and ray (default: 2)")
    add(
        "--probe",
        action="append",
        metavar="KEY=VALUE",
        help="a probe setting other than the protocol's; repeatable",
    )
    add("--pdb", action="store_true", help="open a debugger where a cell fails")
    add("--quiet", action="store_true", help="no progress and no table, only errors")


def _run(arguments: argparse.Namespace) -> int:
    from upbench.progress import be_quiet

    names = {field.name for field in dataclasses.fields(RunConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given["probe"] = _settings("--probe", arguments.probe) if arguments.probe else None
    config = RunConfig.load(arguments.config, given)
    be_quiet(arguments.quiet)
    from upbench.runner import run

    records = run(config, debug=arguments.pdb)
    if not arguments.quiet:
        from upbench.records import frame
        from upbench.report import show

        show(frame(records), "md")
    failed = [record for record in records if record.status == "failed"]
    for record in failed:
        print(f"upbench: failed: {record.cell}: {record.reason}", file=sys.stderr)
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------- report


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        default=[RunConfig().out],
        metavar="DIR",
        help="folders of runs (default: %(default)s)",
    )
    add("--format", default="md", metavar="|".join(FORMATS), help="Markdown or CSV (default: %(default)s)")
    add("--out", metavar="FILE", help="write to a file instead of stdout")
    add(
        "--metrics",
        default="main",
        metavar="main|all",
        help="a few metrics of each task, or all (default: main)",
    )
    add(
        "--against", metavar="METHOD", help="add differences to this method, with 95 %% intervals over images"
    )


def _report(arguments: argparse.Namespace) -> int:
    from upbench.records import read_records
    from upbench.report import show, write

    for name, value, choices in (
        ("format", arguments.format, FORMATS),
        ("choice for --metrics", arguments.metrics, ("main", "all")),
    ):
        if value not in choices:
            raise unknown(name, value, choices)
    table = read_records(arguments.folders)
    options = {"metrics": arguments.metrics, "against": arguments.against}
    if arguments.out:
        write(table, arguments.format, arguments.out, **options)
    else:
        show(table, arguments.format, **options)
    return 0


# ------------------------------------------------------------------------------------------------------ list


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="|".join(LISTS), help="what to list")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, with every field")


def _list(arguments: argparse.Namespace) -> int:
    if arguments.what not in LISTS:
        raise unknown("list", arguments.what, LISTS)
    from upbench import listing
    from upbench.registry import load_plugin_files

    load_plugin_files(arguments.plugin)
    rows = listing.rows(arguments.what)
    print(listing.as_json(rows) if arguments.json else listing.as_text(rows))
    return 0


# --------------------------------------------------------------------------------------------------- profile


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--methods", default="all", metavar="NAME[:WEIGHTS],...", help="methods; wildcards (default: all)")
    add("--size", default="448", metavar="N|HxW,...", help="sizes of the image (default: %(default)s)")
    add("--backbone", metavar="NAME", help="of the features; methods that run it need one (default: none)")
    add("--channels", type=_integer, metavar="C", help="of the features (default: the backbone's, or 384)")
    add("--stride", type=_integer, metavar="N", help="pixels per feature (default: the backbone's, or 14)")
    add("--output", metavar="N|HxW", help="size of the output (default: that of the image)")
    add("--batch", type=_integer, default=1, metavar="N", help="images at a time (default: %(default)s)")
    add("--device", default="auto", metavar="|".join(DEVICES), help="where to measure (default: %(default)s)")
    add("--dtype", default="float32", metavar="|".join(DTYPES), help="arithmetic (default: %(default)s)")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins; repeatable")
    add("--out", metavar="FILE.json", help="write every number to a file, too")


def _profile(arguments: argparse.Namespace) -> int:
    for name in ("channels", "stride", "batch"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UpbenchError(f"--{name} must be at least 1, got {value}")
    from pathlib import Path

    from upbench import listing, profiling
    from upbench.records import write_json
    from upbench.registry import load_plugin_files

    load_plugin_files(arguments.plugin)
    costs = list(
        profiling.profile(
            arguments.methods.split(","),
            [profiling.parse_size(text) for text in arguments.size.split(",")],
            channels=arguments.channels,
            stride=arguments.stride,
            output=profiling.parse_size(arguments.output) if arguments.output else None,
            batch=arguments.batch,
            device=arguments.device,
            dtype=arguments.dtype,
            backbone=arguments.backbone,
        )
    )
    if not costs:
        raise UpbenchError(
            "no method is left: all that were asked for run the backbone; name one with --backbone"
        )
    if arguments.out:
        write_json(Path(arguments.out), costs)
    print(listing.as_text(profiling.table_row(cost) for cost in costs))
    first = costs[0]
    print(f"{first['hardware']}; {first['dtype']}, batch {arguments.batch}, {first['channels']} channels")
    return 0


# ---------------------------------------------------------------------------------------------------- export


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("method", metavar="METHOD[:WEIGHTS]", help="which method, with which weights")
    add("--out", required=True, metavar="FILE", help="what to write, as in raysup.onnx")
    add("--format", metavar="onnx|pt2", help="ONNX, or PyTorch's own (default: the suffix of FILE)")
    add("--image-size", required=True, metavar="N|HxW", help="of the guidance image")
    add("--backbone", metavar="NAME", help="whose features it is for; gives channels and stride")
    add("--channels", type=_integer, metavar="C", help="of the features (default: the backbone's, or 384)")
    add("--stride", type=_integer, metavar="N", help="pixels per feature (default: the backbone's, or 14)")
    add("--feature-size", metavar="N|HxW", help="of the features (default: image size // stride)")
    add("--output-size", metavar="N|HxW", help="of the output (default: that of the image)")
    add("--batch", type=_integer, default=1, metavar="N", help="images at a time (default: %(default)s)")
    add("--options", action="append", metavar="KEY=VALUE", help="an option of the method; repeatable")
    add("--tolerance", type=float, default=1e-4, metavar="X", help="of the check (default: %(default)s)")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins; repeatable")


def _export(arguments: argparse.Namespace) -> int:
    from upbench.config import MethodSpec
    from upbench.export import export
    from upbench.profiling import parse_size
    from upbench.registry import load_plugin_files

    for name in ("channels", "stride", "batch"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UpbenchError(f"--{name} must be at least 1, got {value}")
    load_plugin_files(arguments.plugin)
    spec = MethodSpec.parse(arguments.method)
    image, features, output = (
        parse_size(text) if text else None
        for text in (arguments.image_size, arguments.feature_size, arguments.output_size)
    )
    assert image is not None
    done = export(
        spec.name,
        arguments.out,
        image_size=image,
        weights=spec.weights,
        format=arguments.format,
        backbone=arguments.backbone,
        channels=arguments.channels,
        stride=arguments.stride,
        feature_size=features,
        output_size=output,
        batch=arguments.batch,
        tolerance=arguments.tolerance,
        **_settings("--options", arguments.options or []),
    )
    if done.difference is None:
        checked = "not checked, as onnxruntime is not installed"
    else:
        checked = f"checked: differs from {spec.name} by at most {done.difference:.1e}"
    print(f"{done.path}  {done.path.stat().st_size / 1e6:.1f} MB, {checked}")
    return 0


# ----------------------------------------------------------------------------------------------------- train


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from upbench.trainconfig import TrainConfig, ViewConfig

    parser.add_argument("method", metavar="METHOD", help="name of a trainable method")
    for config in (TrainConfig, ViewConfig):
        helps = _attributes(config)
        for field in dataclasses.fields(config):
            if field.name not in ("method", "views"):
                _add_field(parser, field, helps[field.name])
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins"
    )


def _train(arguments: argparse.Namespace) -> int:
    from upbench.registry import load_plugin_files
    from upbench.trainconfig import TrainConfig, ViewConfig

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "options" in given:
        given["options"] = _settings("--options", given["options"])
    names = {
        config: {field.name for field in dataclasses.fields(config)} for config in (TrainConfig, ViewConfig)
    }
    views = ViewConfig(**{name: value for name, value in given.items() if name in names[ViewConfig]})
    config = TrainConfig(views=views, **{n: v for n, v in given.items() if n in names[TrainConfig]})
    load_plugin_files(arguments.plugin)
    from upbench.train import train

    result = train(config)
    if not result.finished:
        return 130
    print(f"{result.out}  sha256 {result.sha256}")
    if result.val_cosine is not None:
        print(f"cosine similarity {result.val_cosine:.4f}, bilinear {result.val_bilinear:.4f}")
    return 0


def _add_field(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], text: str) -> None:
    """A flag for a field of a configuration; its type is read from the annotation."""
    flag, kind = f"--{field.name.replace('_', '-')}", str(field.type)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    shown = (
        "" if required or field.default in (None, (), dataclasses.MISSING) else f" (default: {field.default})"
    )
    text = (text + shown).replace("%", "%%")
    number = float if "float" in kind else _integer if "int" in kind else str
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


# --------------------------------------------------------------------------------------------------- helpers


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from None


def _settings(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as a mapping; a value is read as YAML reads it."""
    import yaml

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise UpbenchError(f"{flag}: expected KEY=VALUE, got '{pair}'")
        # YAML wants a point in a float with an exponent; people write 1e-3
        number = re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE)
        found[key.replace("-", "_")] = float(value) if number else yaml.safe_load(value)
    return found


@dataclasses.dataclass(frozen=True)
class _Command:
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    call: Callable[[argparse.Namespace], int]
    description: str = ""


_COMMANDS = {
    "run": _Command(
        "run methods on tasks, one record a cell",
        _run_arguments,
        _run,
        "Runs every cell that is not finished yet, and prints the table. Run the same again to go on.",
    ),
    "report": _Command("print the table of a run's records", _report_arguments, _report),
    "list": _Command("list methods, tasks, datasets, backbones or weights", _list_arguments, _list),
    "profile": _Command("measure what methods cost", _profile_arguments, _profile),
    "export": _Command(
        "write a method to a file that runs without upbench",
        _export_arguments,
        _export,
        "Writes a method with its weights, at fixed sizes, as ONNX or .pt2. It takes images in 0..1.",
    ),
    "train": _Command(
        "train a method on photos",
        _train_arguments,
        _train,
        "Trains a method to upsample a backbone's features, without labels. The same with --resume goes on.",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
