"""`upbench download`: gets a dataset, after its licence was shown; or says what to do by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from upbench.cli._parser import Command
from upbench.errors import UpbenchError, system_errors

if TYPE_CHECKING:
    from upbench.contracts.dataset import Archive, Dataset

NOTE = ".upbench-download"
"""File in the folder that lists the archives that were unpacked there, one a line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("dataset", metavar="NAME", help="a dataset, as `upbench list datasets` has it")
    add("--to", metavar="DIR", help="folder of the dataset (default: its own in $UPBENCH_DATA)")
    add("--yes", action="store_true", help="accept the licence without being asked")
    add("--keep", action="store_true", help="keep archives after they were unpacked")
    add("--mirror", metavar="URL", help="where all files lie, by their names, instead of at their owners'")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with datasets; repeatable")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: 1 where something is left to be done by hand."""
    from upbench.registry import find_dataset, load_plugin_files, open_dataset
    from upbench.system.outputs import emit

    load_plugin_files(arguments.plugin)
    cls = find_dataset(arguments.dataset)
    if not cls.needs_root:
        emit(f"{cls.name} comes with the package: nothing is to be downloaded")
        return 0
    if not cls.archives and not cls.by_hand:
        raise UpbenchError(
            f"dataset '{cls.name}' is no data of its own: it reads what you have ({cls.source})"
        )
    folder = _folder(arguments.to, cls.folder or cls.name)
    emit(_facts(cls, folder))
    sys.stdout.flush()
    if cls.archives:
        _agree(cls, arguments.yes)
        for archive in cls.archives:
            _get(archive, folder, arguments.mirror, arguments.keep)
    if cls.by_hand:
        emit("\n".join(["by hand:", *(f"  {i}. {step}" for i, step in enumerate(cls.by_hand, 1))]))
    try:
        dataset = open_dataset(f"{cls.name}:{folder}")
        found = ", ".join(f"{split} {len(dataset.names(split))}" for split in dataset.splits)
    except UpbenchError as error:
        emit(f"not complete yet: {error}")
        return 1
    emit(f"{cls.name} is there: {found} images; use it as {cls.name}:{folder}")
    return 0


def _folder(to: str | None, name: str) -> Path:
    import os

    from upbench.values import user_path

    data = os.environ.get("UPBENCH_DATA")
    if not to and not data:
        raise UpbenchError("say where to: --to DIR, or set UPBENCH_DATA")
    return user_path(to) if to else user_path(str(data)) / name


def _facts(cls: type[Dataset], folder: Path) -> str:
    """The licence and what will be downloaded, in words."""
    lines = [
        f"{cls.title or cls.name} ({cls.name})",
        f"  license:  {cls.license or 'not stated'}",
        f"  source:   {cls.source}",
        f"  citation: {cls.citation or 'not stated'}",
        f"  folder:   {folder}",
    ]
    for archive in cls.archives:
        size = "" if archive.size is None else f" ({archive.size / 1e9:.1f} GB)"
        lines.append(
            f"  file:     {archive.url}{size}" + ("" if archive.checksum else " (no published checksum)")
        )
    return "\n".join(lines)


def _agree(cls: type[Dataset], yes: bool) -> None:
    """Raises UpbenchError where the licence is not accepted."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UpbenchError(f"add --yes to accept the licence of {cls.name} ('{cls.license}')")
    answer = input("Do you accept the licence, and the terms at the source? [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise UpbenchError("the licence was not accepted: nothing was downloaded")


def _get(archive: Archive, folder: Path, mirror: str | None, keep: bool) -> None:
    """Downloads and unpacks one file, where that was not done before."""
    from upbench.datasets._archives import is_archive, unpack, verify
    from upbench.system.cache import replacing
    from upbench.system.download import download
    from upbench.system.progress import say

    name = archive.url.rpartition("/")[2]
    note, place = folder / NOTE, folder / archive.folder
    done = note.read_text().splitlines() if note.is_file() else []
    if archive.url in done:
        return
    with system_errors("create the folder", place):
        place.mkdir(parents=True, exist_ok=True)
    file = place / name
    url = archive.url if mirror is None else f"{mirror.rstrip('/')}/{name}"
    download(
        url,
        file,
        sha256=archive.checksum.removeprefix("sha256:") if archive.checksum.startswith("sha256:") else None,
        size=archive.size,
        label=name,
        check=lambda path: verify(path, archive.checksum, is_archive(name)),
        instead=f"a copy of it at {file} would be used instead",
    )
    if is_archive(name):
        say(f"{name}: {unpack(file, place)} files")
        if not keep:
            file.unlink()
    file.with_name(f"{name}.sha256").unlink(missing_ok=True)
    with replacing(note) as temporary:
        temporary.write_text("".join(f"{url}\n" for url in [*done, archive.url]))


COMMAND = Command("get a dataset, after showing its licence", add_arguments, call)
