"""Finds an official layout in a user's folder, and says in one line what is wrong with any other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from upbench.datasets._files import read_text
from upbench.errors import UpbenchError, nearest

ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2")


def locate(name: str, root: Path | None, places: Sequence[str], needed: Sequence[str], layout: str) -> Path:
    """The first of some folders that has everything that is needed.

    Args:
        name: Of the dataset.
        root: Folder that the user gave.
        places: Where, below `root`, the layout may begin; "" for `root` itself.
        needed: Files and folders that it must have there.
        layout: The expected layout, in a few words.

    Raises:
        UpbenchError: None has; the message says what was found, what was expected, and the nearest thing that
            would do: a folder above, below or beside, an archive to be unpacked, a name with a slip in it.
    """
    if root is None:
        raise UpbenchError(f"dataset '{name}' needs its folder: write {name}:/path")
    if (found := _first(root, places, needed)) is not None:
        return found
    bases = [root, *(root / place for place in places)]  # the first of those that have most
    base = max(bases, key=lambda folder: len(_present(folder, needed)))
    there = _present(base, needed)
    lacking = [each for each in needed if each not in there]
    what = f"has {_words(there)} but no {lacking[0]}" if there else f"has no {lacking[0]}"
    seen = "" if there else f" (found: {_words(_entries(root)) or 'nothing'})"
    hint = _hint(name, root, base, places, needed, lacking)
    raise UpbenchError(f"dataset '{name}': {base} {what}{seen}; expected {layout}{hint and f'; {hint}'}")


def split_list(name: str, file: Path) -> list[str]:
    """The names in a list of a split, one a line; what follows a name on its line is left out.

    Raises:
        UpbenchError: It cannot be read, is no text, is empty, or names an image twice.
    """
    lines = read_text(file).splitlines()
    names = [words[0] for line in lines if (words := line.split())]
    if not names:
        raise UpbenchError(f"dataset '{name}': split list {file} names no image")
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise UpbenchError(f"dataset '{name}': split list {file} names '{twice}' twice")
    return names


def _first(root: Path, places: Iterable[str], needed: Sequence[str]) -> Path | None:
    """The first place that has everything."""
    for place in places:
        if len(_present(root / place, needed)) == len(needed):
            return root / place
    return None


def _present(folder: Path, needed: Iterable[str]) -> list[str]:
    return [each for each in needed if (folder / each).exists()]


def _entries(folder: Path) -> list[str]:
    """What is in a folder, by name; nothing where it cannot be read."""
    with suppress(OSError):
        return sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    return []


def _words(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ..." if len(names) > most else shown


def _hint(
    name: str, root: Path, base: Path, places: Sequence[str], needed: Sequence[str], lacking: Sequence[str]
) -> str:
    """The nearest thing that would do, or ""."""
    for other in _around(root):
        if _first(other, places, needed) is not None:
            return f"did you mean {name}:{other}?"
    for folder in dict.fromkeys((base, root)):
        if archives := [entry for entry in _entries(folder) if entry.lower().endswith(ARCHIVES)]:
            return f"unpack {_words(archives, 2)}"
    folder = base
    for part in Path(lacking[0]).parts:
        if not (folder / part).exists():
            guess = nearest(part, _entries(folder))
            return "" if guess is None else f"'{guess}' should be called '{part}'"
        folder /= part
    return ""


def _around(root: Path) -> Iterator[Path]:
    """Folders above a folder, beside it, and in it."""
    root = root.absolute()
    yield from list(root.parents)[:2]
    for folder in (root, root.parent):
        yield from (folder / entry for entry in _entries(folder) if (folder / entry).is_dir())
