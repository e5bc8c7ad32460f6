"""Downloads a file once, checks it, and keeps it. Imports no torch."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upbench.errors import UpbenchError
from upbench.system.cache import replacing, sha256_file
from upbench.system.progress import bar

_CHUNK = 1 << 18
_TIMEOUT = 30.0


def download(
    url: str, path: Path, *, sha256: str | None = None, size: int | None = None, label: str = "file"
) -> str:
    """Makes sure that `path` is the file at `url`; downloads it where it is not there yet.

    Without a `sha256` the hash of the first download is kept in `<path>.sha256` and holds from then on.

    Args:
        url: https, http or file.
        path: Where the file goes; its folder exists.
        sha256: What the file must hash to.
        size: Bytes it must have.
        label: What it is called in errors.

    Returns:
        The file's sha256.

    Raises:
        UpbenchError: It cannot be downloaded, is cut short, or hashes to something else.
    """
    pin = path.with_name(path.name + ".sha256")
    expected = sha256 or _read_pin(pin)
    if path.is_file():
        found = sha256_file(path)
        if expected is not None and found != expected:
            raise UpbenchError(
                f"{label}: {path} has sha256 {found}, expected {expected}; delete it to download it again"
            )
    else:
        found = _fetch(url, path, expected, size, label)
    if sha256 is None and expected is None:
        with replacing(pin) as temporary:
            temporary.write_text(found + "\n")
    return found


def _read_pin(pin: Path) -> str | None:
    try:
        return pin.read_text().strip() or None
    except OSError:
        return None


def _fetch(url: str, path: Path, expected: str | None, size: int | None, label: str) -> str:
    digest = hashlib.sha256()
    received = 0
    with replacing(path) as temporary:
        with _opened(url, label) as response, temporary.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else size
            kilobytes = None if total is None else total // 1000
            with bar(f"downloading {label} (kB)", kilobytes) as progress:
                for block in _blocks(response, url, label):
                    file.write(block)
                    digest.update(block)
                    received += len(block)
                    progress.advance(received // 1000 - progress.done)
        promised = size if size is not None else total
        if promised is not None and received != promised:
            raise UpbenchError(
                f"could not download {label}: {url} gave {received} bytes, expected {promised}"
            )
        found = digest.hexdigest()
        if expected is not None and found != expected:
            raise UpbenchError(f"{label}: {url} has sha256 {found}, expected {expected}; nothing was kept")
    return found


def _failure(url: str, label: str, error: Exception) -> UpbenchError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    text = " ".join(str(reason).split()) or type(error).__name__
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {text}"
    return UpbenchError(
        f"could not download {label} from {url}: {text}; "
        "a copy of the file in the folder $UPBENCH_WEIGHTS would be used instead"
    )


@contextmanager
def _opened(url: str, label: str) -> Iterator[Any]:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "upbench"})
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _failure(url, label, error) from error
    with response:
        yield response


def _blocks(response: Any, url: str, label: str) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _failure(url, label, error) from error
        if not block:
            return
        yield block
