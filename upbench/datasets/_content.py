"""Fingerprints of a dataset's files, which every file is read for once and checked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from upbench.datasets._files import read_bytes
from upbench.system.ahead import ahead
from upbench.system.cache import cache_dir, digest, replacing
from upbench.system.progress import track

VERSION = 2
"""Rises with every change of what a fingerprint is made of."""

Check = Callable[[Sequence[Path], Sequence[bytes]], object]


def content_fingerprint(
    title: str, items: Sequence[Sequence[Path]], facts: object = (), check: Check | None = None
) -> str:
    """Sixteen hexadecimal digits that change when a file's name or content does, or a fact, and only then.

    Where the files lie plays no part. They are read once, by threads; what was found is kept in the cache
    until a file changes its size or its date.

    Args:
        title: As in "camvid/train", for the progress.
        items: Files that belong together, such as an image and its label map; of each split, in a fixed
            order.
        facts: What else decides on what is read, such as the classes; told apart by its `repr`.
        check: Called with an item's files and their content; raises UpbenchError where they are no good. It
            may be called from several threads at once.

    Raises:
        UpbenchError: A file that cannot be read, or what `check` raises: for the first bad item in their
            order.
    """
    note = cache_dir("datasets") / digest(VERSION, title, repr(facts), check is not None, _stamps(items))
    if known := _known(note):
        return known

    def read(item: Sequence[Path]) -> bytes:
        contents = [read_bytes(file) for file in item]
        if check is not None:
            check(item, contents)
        found = hashlib.sha256()
        for file, content in zip(item, contents, strict=True):
            found.update(os.fsencode(file.name) + f" {len(content)} ".encode() + content)
        return found.digest()

    whole = hashlib.sha256(repr(facts).encode())
    workers = min(8, os.cpu_count() or 1)
    with closing(ahead(read, items, workers, 2 * workers)) as parts:
        for part in track(parts, f"checking {title}", total=len(items)):
            whole.update(part)
    result = whole.hexdigest()[:16]
    with replacing(note) as temporary:
        temporary.write_text(result)
    return result


def _known(note: Path) -> str:
    """The fingerprint that an earlier run noted; "" where there is none, or what is there is none."""
    try:
        text = note.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if re.fullmatch("[0-9a-f]{16}", text) else ""


def _stamps(items: Sequence[Sequence[Path]]) -> list[tuple[str, int, int]]:
    """Place, size and date of every file; nothing for those that are not there, as reading tells."""
    found = []
    for item in items:
        for file in item:
            try:
                stamp = file.stat()
            except OSError:
                continue
            found.append((repr(os.fsencode(file.absolute())), stamp.st_size, stamp.st_mtime_ns))
    return found
