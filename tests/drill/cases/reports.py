"""Text of others in tables: no label, reason or note of a record is more than text, in any format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recording import record

from drill.case import Case, Promise, done, refused
from upbench.results.cell import MethodSpec
from upbench.results.records import write_record

RUN = Path("run") / "records"
CSV = ("report", "run", "--format", "csv")
MARKDOWN = ("report", "run")


def _run(**fields: Any) -> Callable[[Path], None]:
    """A run of two cells; `fields` are those of the first."""

    def given(folder: Path) -> None:
        (folder / RUN).mkdir(parents=True)
        write_record(folder / RUN, record("raysup", **fields))
        write_record(folder / RUN, record("bilinear"))

    return given


def _labelled(label: str) -> Callable[[Path], None]:
    return _run(spec=MethodSpec("raysup", label=label))


def _csv(name: str, label: str, shown: str) -> Case:
    return Case("reports", f"csv: {name}", CSV, done(shown), _labelled(label))


def _markdown(name: str, label: str, shown: str) -> Case:
    return Case("reports", f"md: {name}", MARKDOWN, done(shown), _labelled(label))


def _kept(name: str, words: tuple[str, ...], promise: Promise, **fields: Any) -> Case:
    return Case("reports", name, words, promise, _run(**fields))


CASES: list[Case] = [
    _csv("equals", "=1+1", ",'=1+1,"),
    _csv("a call", '=HYPERLINK("http://x","y")', "\"'=HYPERLINK("),
    _csv("plus", "+1", ",'+1,"),
    _csv("minus", "-1", ",'-1,"),
    _csv("at", "@SUM(A1)", ",'@SUM(A1),"),
    _csv("after a tab", "\t=1", ",'=1,"),
    _csv("after a carriage return", "\r=1", ",'=1,"),
    _csv("after a line", "a\n=1", ",a =1,"),
    _csv("wide equals", "＝1", ",'＝1,"),
    _csv("a comma", "a,=1", ',"a,=1",'),
    _csv("a quote", '",=1', ',""",=1"'[1:]),
    _csv("an escape", "\x1b]0;x\x07", r"\x1b]0;x\x07"),
    _csv("text that only has a minus in it", "ours - theirs", ",ours - theirs,"),
    _markdown("another column", "a | b", r"a \| b"),
    _markdown("code", "`rm`", r"\`rm\`"),
    _markdown("a link", "[x](http://e.vil)", r"\[x\](http\://e.vil)"),
    _markdown("a picture", "![x](https://e.vil/i.png)", r"!\[x\](https\://e.vil"),
    _markdown("a bare link", "see https://e.vil", r"https\://e.vil"),
    _markdown("a bare name of a site", "www.e.vil", r"www\.e.vil"),
    _markdown("a tag", "<img src=x onerror=alert(1)>", r"\<img src=x"),
    _markdown("a closing tag", "</table>", r"\</table>"),
    _markdown("a comment", "<!-- x", r"\<!-- x"),
    _markdown("bold", "**best**", r"\*\*best\*\*"),
    _markdown("a heading on a line of its own", "a\n# b", "a # b"),
    _markdown("a formula", "$x$", r"\$x\$"),
    _markdown("an escape", "\x1b[31mred", r"\\x1b\[31mred"),
    _markdown("a text from right to left", "a\u202eb", r"\\u202e"),
    _markdown("a backslash", "a\\", "a\\\\ "),
    _markdown("less than a number", "< 11.25", "| < 11.25 "),
    _kept("reason: a formula", CSV, done('"seg failed: Raysup, seg: =1"'), status="failed", reason="=1"),
    _kept(
        "reason: a link", MARKDOWN, done(r"\[a\](javascript:b)"), status="failed", reason="[a](javascript:b)"
    ),
    _kept("reason: lines", MARKDOWN, done("seg: a b c"), status="failed", reason="a\nb\r\nc"),
    _kept("warning: a tag", MARKDOWN, done(r"Raysup: \<script>"), warnings=["<script>"]),
    _kept("warning: an escape", MARKDOWN, done(r"\\x1b\[2J"), warnings=["\x1b[2J"]),
    _kept("title of a dataset", MARKDOWN, done(r"\<b>rooms"), dataset="<b>rooms"),
    _kept("dataset: a formula", CSV, done(",'=rooms,"), dataset="=rooms"),
    _kept("machine: a link", MARKDOWN, done(r"http\://e.vil"), environment={"cpu": "http://e.vil"}),
    _kept("format that there is not", (*MARKDOWN, "--format", "xlsx"), refused("unknown format", "xlsx")),
    _kept(
        "row that there is not", (*MARKDOWN, "--against", "\x1b[2J"), refused("unknown method", r"\x1b[2J")
    ),
]
