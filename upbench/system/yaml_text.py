"""YAML that a user gives: files of settings and values of the command line, read by one reader. Imports no
torch, and YAML only where it is called.

What is read is plain: mappings with text for keys, lists, text, numbers, true, false and null. It is YAML 1.1
as PyYAML reads it, but for what surprises: `1e-3` is a number; dates and `1:30` are text, as they stand; a
key that is given twice is an error, and so is text that would unfold into more than `MOST_VALUES` values or
lie deeper than `DEEPEST` levels.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from os import PathLike
from typing import Any

from upbench.errors import UpbenchError, named, printable, shown
from upbench.values import read_text

DEEPEST = 20
MOST_VALUES = 10_000
_DROPPED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_INTEGER = re.compile(r"[-+]?(?:0b[01_]{1,64}|0o?[0-7_]{1,24}|0x[0-9a-fA-F_]{1,16}|0|[1-9][0-9_]{0,99})$")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:e[-+]?[0-9]+)?   # 1.5, 1.5e-3
        |\.[0-9][0-9_]*(?:e[-+]?[0-9]+)?                 # .5
        |[0-9][0-9_]*e[-+]?[0-9]+                        # 1e-3
        |\.inf)$|\.nan$""",
    re.IGNORECASE | re.VERBOSE,
)


def read_mapping(what: str, path: str | PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Args:
        what: What the file is called in errors, as in "config file".
        path: As a user writes it.

    Raises:
        UpbenchError: The file cannot be read, is not such YAML, or is not a mapping.
    """
    data = _parsed(f"{what} {named(path)}", read_text(what, path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UpbenchError(f"{what} {named(path)} must be a mapping of settings, got {shown(data)}")
    return data


def read_value(flag: str, text: str) -> Any:
    """The value of `KEY=VALUE` on a command line.

    Raises:
        UpbenchError: It is not such YAML.
    """
    return _parsed(f"{flag}: {shown(text)}", text)


def _parsed(where: str, text: str) -> Any:
    import yaml

    try:
        _check_size(text)
        loader = _loader()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_unfolded(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except _Refused as error:
        raise UpbenchError(f"{where} {error}") from None
    except yaml.reader.ReaderError as error:
        raise UpbenchError(
            f"{where} is not YAML: it has the character {shown(chr(error.character))}"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1})" if mark else ""
        text = printable(error.problem or error.context)
        text = text.replace("could not determine a constructor for the tag", "nothing is known of the tag")
        raise UpbenchError(f"{where} is not YAML: {text}{place}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UpbenchError(f"{where} is not YAML: {printable(error)}") from error


class _Refused(Exception):
    """YAML that is right, and is not read."""


def _check_size(text: str) -> None:
    """Counts before anything is built: what builds deep YAML is functions that call one another."""
    import yaml

    depth = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.ScalarEvent, yaml.AliasEvent)):
            values += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            values, depth = values + 1, depth + 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        _refuse_large(values, depth)


def _check_unfolded(root: Any) -> None:
    """The same with every alias in place of what it stands for: a few lines can mean more than all memory."""
    import yaml

    sizes: dict[int, tuple[int, int]] = {}  # of nodes that were looked at: values, levels
    above: set[int] = set()

    def measure(node: Any) -> tuple[int, int]:
        if id(node) in above:
            raise _Refused("refers to itself")
        if id(node) not in sizes:
            above.add(id(node))
            pairs = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [measure(p) for each in pairs for p in (each if isinstance(each, tuple) else (each,))]
            above.remove(id(node))
            sizes[id(node)] = (
                1 + sum(size for size, _ in parts),
                1 + max((deep for _, deep in parts), default=-1),
            )
            _refuse_large(*sizes[id(node)])
        return sizes[id(node)]

    measure(root)


def _refuse_large(values: int, depth: int) -> None:
    if depth > DEEPEST:
        raise _Refused(f"is nested deeper than {DEEPEST} levels")
    if values > MOST_VALUES:
        raise _Refused(f"stands for more than {MOST_VALUES} values")


@cache
def _loader() -> Any:
    """PyYAML's safe loader with the rules that the top of this file tells of."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_scalar(self, node: Any) -> Any:
            value = super().construct_scalar(node)
            if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
                with suppress(UnicodeDecodeError):  # JSON writes what lies beyond 16 bits in two halves
                    value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            return value

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                line = f"(line {key.start_mark.line + 1})"
                if not isinstance(key, yaml.ScalarNode):
                    raise _Refused(f"has a key that is not text {line}")
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.tag != "tag:yaml.org,2002:str":
                    raise _Refused(
                        f"has the key {shown(key.value)}, which is not text {line}; put it in quotes"
                    )
                if key.value in seen:
                    raise _Refused(f"gives {shown(key.value)} twice {line}")
                seen.add(key.value)
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader
