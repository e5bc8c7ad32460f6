"""The command line: parses, calls the library, prints. Results go to stdout, all else to stderr.

Exit codes: 0 done; 1 done, but a cell failed; 2 bad input (one line on stderr); 130 stopped by Ctrl-C;
143 by SIGTERM, in as orderly a way.
Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from upbench._version import __version__
from upbench.cli._parser import Parser
from upbench.cli.describe import COMMAND as DESCRIBE
from upbench.cli.download import COMMAND as DOWNLOAD
from upbench.cli.export import COMMAND as EXPORT
from upbench.cli.list import COMMAND as LIST
from upbench.cli.profile import COMMAND as PROFILE
from upbench.cli.published import COMMAND as PUBLISHED
from upbench.cli.report import COMMAND as REPORT
from upbench.cli.run import COMMAND as RUN
from upbench.cli.train import COMMAND as TRAIN
from upbench.errors import UpbenchError, named, reason, unknown
from upbench.system.outputs import complain, drop, emit, flush, prepare_streams

TRACEBACK = "UPBENCH_TRACEBACK"
"""Environment variable: where it is set, errors come with the traceback that developers read."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    prepare_streams()
    try:
        with _orderly_termination():
            code = _main(list(sys.argv[1:] if argv is None else argv))
        flush()
        return code
    except UpbenchError as error:
        return _refused(str(error))
    except _Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing may be flushed to it at exit
        drop(sys.stdout)
        return 0
    except (OSError, MemoryError, RecursionError, UnicodeError) as error:  # the last net: no place foresaw it
        name = getattr(error, "filename", None)
        thing = f" at {named(os.fsdecode(name))}" if isinstance(name, (str, bytes)) else ""
        return _refused(f"cannot go on{thing}: {reason(error)}; {TRACEBACK}=1 shows where")


def _refused(text: str) -> int:
    """Says why a command ended, within an exception's handler."""
    if os.environ.get(TRACEBACK):
        complain(traceback.format_exc().rstrip(), longest=None)
    complain(f"upbench: error: {text}")
    return 2


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
    try:
        arguments, extra = parser.parse_known_args(argv)
    except SystemExit as end:  # after --help and --version
        return int(end.code or 0)
    if extra:
        options = commands[arguments.command]._option_string_actions if arguments.command else {}
        flag = next((word for word in extra if word.startswith("--")), None)
        if flag is None:
            usage = f"see 'upbench {arguments.command} --help'"
            raise UpbenchError(f"unexpected argument {named(extra[0])}; {usage}")
        raise unknown(
            "option", flag.partition("=")[0], [option for option in options if option.startswith("--")]
        )
    if arguments.command is None:
        emit(parser.format_help(), end="")
        return 0
    code: int = _COMMANDS[arguments.command].call(arguments)
    return code


def _parser(command: str | None) -> tuple[Parser, dict[str, Parser]]:
    """The parser, with the arguments of the one command that is asked for."""
    parser = Parser(prog="upbench", description="Benchmark feature upsamplers: methods x tasks x backbones.")
    parser.add_argument("--version", action="version", version=f"upbench {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands: dict[str, Parser] = {}
    for name, item in _COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name, help=item.help, description=item.description or item.help
        )
        if name == command:
            item.arguments(commands[name])
    return parser, commands


_COMMANDS = {
    "run": RUN,
    "report": REPORT,
    "published": PUBLISHED,
    "list": LIST,
    "describe": DESCRIBE,
    "download": DOWNLOAD,
    "profile": PROFILE,
    "export": EXPORT,
    "train": TRAIN,
}


if __name__ == "__main__":
    sys.exit(main())
