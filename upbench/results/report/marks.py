"""Text of others in tables: labels, reasons and notes from records, so that none is more than text.

The one place for every format that tables are written in. A record may come from anybody: what stands in it
must not become a formula, a link, a tag, a command to a terminal, or a second line. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Any

from upbench.errors import printable

_MARKDOWN = re.compile(r"([\\`*\[\]|~$]|<(?=[A-Za-z/!?]))")
_LINKS = re.compile(r"(?i)\b((?:https?|ftp|mailto):|www\.)")
_LEAD = re.compile(r"(\*\*[\w ]+\*\*: )(.*)", re.DOTALL)
_FORMULA = "=+-@＝＋－＠"
"""What a spreadsheet takes for the beginning of a formula; the last four are wide, as Japanese texts have."""


def plain(text: object) -> str:
    r"""Text in one line; control characters, and those that change the direction of text, as in `\x1b`."""
    return printable(text)


def markdown(text: object) -> str:
    """Text that Markdown shows as it is: no table, emphasis, code, tag, link or picture is made of it."""
    marked = _MARKDOWN.sub(r"\\\1", plain(text))
    return _LINKS.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", marked)


def markdown_note(text: str) -> str:
    """A note; what it begins with in bold, as in `**Warning**: `, is kept."""
    lead = _LEAD.fullmatch(text)
    return lead[1] + markdown(lead[2]) if lead else markdown(text)


def cell(value: Any) -> Any:
    """An entry of a CSV file. Numbers stay as they are; text that a spreadsheet would compute gets a `'`."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = plain(value)
    return f"'{text}" if text.startswith(tuple(_FORMULA)) else text
