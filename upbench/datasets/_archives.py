"""Archives: whether a file is the one that it should be, and unpacking it without harm. Imports no torch."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from upbench.errors import UpbenchError
from upbench.system.progress import track

KINDS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_CHUNK = 1 << 20


def is_archive(name: str) -> bool:
    """Whether a file of this name is one that `unpack` takes."""
    return name.lower().endswith(KINDS)


def verify(path: Path, checksum: str, archive: bool) -> None:
    """Does nothing for a file with that checksum.

    Args:
        path: The file.
        checksum: "md5:...", "sha1:..." or "sha256:..."; "" where none is known.
        archive: Whether it must open as one, where no checksum is known.

    Raises:
        UpbenchError: It is another file, or cannot be read.
    """
    if not checksum:
        if archive:
            with _opened(path):
                pass
        return
    kind, _, expected = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise UpbenchError(f"cannot read {path}: {error.strerror}") from error
    if digest.hexdigest() != expected:
        raise UpbenchError(f"its {kind} is {digest.hexdigest()}, expected {expected}")


def unpack(path: Path, folder: Path) -> int:
    """Unpacks an archive into a folder; how many files there were.

    What is there under the same name is replaced. Nothing is written outside the folder, no link that leads
    out of it is made, and what is neither file nor folder is refused.

    Raises:
        UpbenchError: It is damaged, holds such an entry, or there is no room for it.
    """
    with _opened(path) as archive:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(archive, zipfile.ZipFile):
            members = [member for member in archive.infolist() if not member.is_dir()]
            for member in members:
                _inside(path, member.filename, linked=(member.external_attr >> 16) & 0o170000 == 0o120000)
            _room(path, folder, sum(member.file_size for member in members))
            for member in track(members, f"unpacking {path.name}"):
                archive.extract(member, folder)
            return len(members)
        count = 0
        for entry in track(archive, f"unpacking {path.name}"):
            _inside(path, entry.name, linked=False)
            archive.extract(entry, folder, filter="data")
            count += entry.isfile()
        return count


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    """An archive, and its errors as one line."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield archive
        else:
            with tarfile.open(path) as tape:
                yield tape
    except UpbenchError:
        raise
    except tarfile.FilterError as error:
        raise UpbenchError(f"{path} is not to be trusted: {' '.join(str(error).split())}") from error
    except OSError as error:
        if isinstance(error, tarfile.TarError) or error.errno is None:
            raise UpbenchError(f"{path} is damaged: {' '.join(str(error).split())}") from error
        raise UpbenchError(f"cannot unpack {path}: {error.strerror} ({error.filename or path})") from error
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        RuntimeError,
        NotImplementedError,
        ValueError,
    ) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UpbenchError(f"{path} is damaged, or no archive: {text}") from error
    except Exception as error:  # decoders of damaged streams have errors of their own
        if type(error).__module__ not in ("zlib", "_lzma", "lzma"):
            raise
        raise UpbenchError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _inside(path: Path, name: str, linked: bool) -> None:
    """Raises UpbenchError for an entry that would lie outside of the folder, and for links in zips."""
    place = PurePosixPath(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or ":" in (place.parts or ("",))[0] or "\0" in name:
        raise UpbenchError(
            f"{path} is not to be trusted: it holds '{ascii(name)[1:-1]}', outside of its folder"
        )
    if linked:
        raise UpbenchError(f"{path} is not to be trusted: it holds a link, '{ascii(name)[1:-1]}'")


def _room(path: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UpbenchError(
            f"no room to unpack {path.name}: {needed / 1e9:.1f} GB are needed, {folder} has "
            f"{free / 1e9:.1f} GB left"
        )
