"""Downloads a file once, checks it, and keeps it. Imports no torch.

What has come of a file is kept beside its place (`.NAME.part`) while it is being downloaded, and after a
connection that broke: the next attempt goes on from there where the server says that it is still the same
file.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from upbench.errors import UpbenchError, named, system_errors
from upbench.system.cache import replacing, sha256_file
from upbench.system.progress import bar
from upbench.system.reading import is_file, read_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LARGEST = 1 << 33
"""Bytes of a file whose size nobody has promised, or that a server promises."""
ATTEMPTS = 3
"""At a file whose connection breaks, within one call."""
_CHUNK = 1 << 18
_TIMEOUT = 30.0
_PIN = re.compile(r"[0-9a-f]{64}")

INSTEAD = "a copy of the file in the folder $UPBENCH_WEIGHTS would be used instead"
"""What else would do, of weights."""

Check = Callable[[Path], object]
"""Raises UpbenchError for a file, given by its path, that is not what it should be."""


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    label: str = "file",
    check: Check | None = None,
    instead: str = INSTEAD,
) -> str:
    """Makes sure that `path` is the file at `url`; downloads it where it is not there yet.

    Without a `sha256` the hash of the first download is kept in `<path>.sha256` and holds from then on;
    `check` is asked before, so that a portal's page or an empty answer is not what holds.

    Args:
        url: https, http or file. From https nothing leads to another kind of address.
        path: Where the file goes; its folder exists.
        sha256: What the file must hash to.
        size: Bytes it must have. Without it, no more than the server promises, and than `LARGEST`, are taken.
        label: What it is called in errors.
        check: Whether a file whose hash is not known is of the right kind.
        instead: What else would do, for errors.

    Returns:
        The file's sha256.

    Raises:
        UpbenchError: It cannot be downloaded, is cut short or longer than it should be, hashes to something
            else, or is of another kind.
    """
    pin = pin_of(path)
    noted = None if sha256 else read_pin(pin)
    known = sha256 or noted
    with system_errors("look for", path):
        there = os.path.lexists(path)
    if there:
        return _held(path, pin, known, label, check)
    with _Part(path, url) as part:
        found = _fetch(part, size, label, instead)
        if known is not None and found != known:
            part.discard()
            what = f"{label}: {url} has sha256 {found}, expected {known}"
            if noted is not None:
                what += f" as on the first download; to take what is there now, delete {pin}"
            raise UpbenchError(f"{what}; nothing was kept")
        if known is None:
            if why := _refused(check, part.path):
                part.discard()
                raise UpbenchError(
                    f"could not download {label}: {url} gave something else: {why}; nothing was kept"
                )
            _note(pin, found)
        part.keep()
    return found


def _held(path: Path, pin: Path, known: str | None, label: str, check: Check | None) -> str:
    """The sha256 of the file that is there."""
    again = "delete it to download it again"
    if not is_file(path):
        raise UpbenchError(f"{label}: {path} is not a file; {again}")
    found = sha256_file(path)
    if known is not None and found != known:
        raise UpbenchError(f"{label}: {path} has sha256 {found}, expected {known}; {again}")
    if known is None:
        if why := _refused(check, path):
            raise UpbenchError(f"{label}: {path} is something else: {why}; {again}")
        _note(pin, found)
    return found


def pin_of(path: Path) -> Path:
    """Where the hash of a first download is noted."""
    return path.with_name(path.name + ".sha256")


def read_pin(pin: Path) -> str | None:
    """The noted hash; None where there is none.

    Raises:
        UpbenchError: The note cannot be read, or holds no hash: what it said is not known any more.
    """
    if not os.path.lexists(pin):
        return None
    text = read_file(pin, "sha256 of the first download", 1 << 10).decode("ascii", "replace").strip()
    if not _PIN.fullmatch(text):
        raise UpbenchError(
            f"{pin} is damaged: it should hold the sha256 of the first download; delete it and the file "
            "beside it to download anew"
        )
    return text


def _note(pin: Path, sha256: str) -> None:
    with replacing(pin) as temporary:
        temporary.write_text(sha256 + "\n")


def _refused(check: Check | None, path: Path) -> str:
    """Why a file is not of the right kind; "" where it is."""
    try:
        if check is not None:
            check(path)
    except UpbenchError as error:
        return str(error).replace(f"checkpoint {path} ", "it ")
    return ""


class _Part:
    """What has come of a file, with what tells whether the rest is still that of the same file.

    One process at a time goes on with it; another one, and one on a system without locks, has a file of its
    own that vanishes.

    Attributes:
        path: Where it is.
        url: Where it comes from.
    """

    def __init__(self, target: Path, url: str) -> None:
        self.target, self.url = target, url
        self.path = target.with_name(f".{target.name}.part")
        self.facts = target.with_name(f".{target.name}.part.json")
        self.shared, self.settled = True, False

    def __enter__(self) -> _Part:
        with system_errors("write", self.path):
            self.file: IO[bytes] = self.path.open("ab+")
            if not _locked(self.file):
                self.file.close()
                self.path, self.shared = self.path.with_name(f"{self.path.name}.{os.getpid()}"), False
                self.file = self.path.open("wb+")
        return self

    def __exit__(self, *_: object) -> None:
        if not self.settled and not (self.size and self.validator):
            self.discard()
        self.file.close()

    @property
    def size(self) -> int:
        """Bytes so far."""
        self.file.flush()
        return os.fstat(self.file.fileno()).st_size

    @property
    def validator(self) -> str:
        """What the server called the file that this is the beginning of; "" where that is not known."""
        with suppress(UpbenchError, ValueError, AttributeError):
            facts = json.loads(read_file(self.facts, "notes of a download", 1 << 14)) if self.shared else {}
            if facts.get("url") == self.url and isinstance(facts.get("validator"), str):
                return str(facts["validator"])
        return ""

    def begin(self, validator: str) -> None:
        """Begins anew."""
        with system_errors("write", self.path):
            self.file.truncate(0)
        if self.shared:
            with replacing(self.facts) as temporary:
                temporary.write_text(json.dumps({"url": self.url, "validator": validator}))

    def discard(self) -> None:
        """Nothing of it is kept."""
        self.settled = True
        for path in (self.path, *([self.facts] if self.shared else [])):
            with suppress(OSError):
                path.unlink()

    def keep(self) -> None:
        """It is whole: it takes its place."""
        with system_errors("write", self.target):
            self.file.flush()
            os.fsync(self.file.fileno())
            if self.shared:
                self.facts.unlink(missing_ok=True)
            else:
                self.file.close()  # Windows moves no open file; where there are locks, this one is held on to
            os.replace(self.path, self.target)
        self.settled = True


def _locked(file: IO[bytes]) -> bool:
    """Whether a file is this process's alone."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    # another process may have finished with the file, and taken the name away, between opening and locking
    return os.path.exists(file.name) and os.path.samestat(os.stat(file.name), os.fstat(file.fileno()))


class _Broken(UpbenchError):
    """A connection that broke: what has come so far is good."""


class _Stale(_Broken):
    """What came before is no part of what is there now."""


def _fetch(part: _Part, size: int | None, label: str, instead: str) -> str:
    """Downloads into `part`; its sha256."""
    for left in reversed(range(ATTEMPTS)):
        try:
            _receive(part, size, label, instead)
            break
        except _Broken as error:
            if not left or not (part.validator or isinstance(error, _Stale)):
                kept = f"; {part.size:,} bytes are kept for the next attempt" if part.validator else ""
                raise UpbenchError(f"{error}{kept}") from error
    part.file.flush()
    return sha256_file(part.path)


def _receive(part: _Part, size: int | None, label: str, instead: str) -> None:
    """One request for what is missing."""
    url, what, validator = part.url, f"could not download {label}", part.validator
    asked = {"Range": f"bytes={part.size}-", "If-Range": validator} if validator and part.size else {}
    with _opened(url, label, asked, instead) as response:
        if asked and response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.begin("")
            raise _Stale(f"{what}: {url} has less than came of it before")
        goes_on = bool(asked) and response.status == http.client.PARTIAL_CONTENT
        if goes_on and not str(response.headers.get("Content-Range", "")).startswith(f"bytes {part.size}-"):
            part.begin("")
            raise UpbenchError(f"{what}: {url} gave another part than was asked for; nothing was kept")
        if not goes_on:
            part.begin(_validator(response))
        received = part.size
        length = response.headers.get("Content-Length") or ""
        promised = received + int(length) if length.isdecimal() and len(length) < 19 else None
        if size is not None and promised not in (None, size):
            part.discard()
            raise UpbenchError(f"{what}: {url} gave {promised} bytes, expected {size}; nothing was kept")
        total = promised if size is None else size
        most = LARGEST if total is None else total
        if size is None and most > LARGEST:
            raise UpbenchError(f"{what}: {url} promises {most:,} bytes, more than {LARGEST:,}")
        with bar(f"downloading {label} (kB)", None if total is None else total // 1000) as progress:
            for block in _blocks(response, url, label, instead):
                received += len(block)
                if received > most:
                    part.discard()
                    raise UpbenchError(f"{what}: {url} gives more than the {most:,} bytes that it may have")
                with system_errors("write", part.path):
                    part.file.write(block)
                progress.advance(received // 1000 - progress.done)
    if total is not None and received != total:
        raise _Broken(f"{what}: {url} gave {received} bytes, expected {total}")


def _validator(response: Any) -> str:
    """What the server calls this state of a file; "" where it does not, or not exactly."""
    tag = str(response.headers.get("ETag", ""))
    return "" if tag.startswith("W/") else tag


def _failure(
    url: str, label: str, error: Exception, instead: str, kind: type[UpbenchError] = UpbenchError
) -> UpbenchError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    text = str(reason) or type(error).__name__
    if isinstance(error, urllib.error.HTTPError):
        text = f"HTTP {error.code} {text}"
    return kind(f"could not download {label} from {url}: {text}; {instead}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where a server sends to, but never from https to what anybody on the way can change."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request for the other address."""
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it leads from https to {named(newurl)}, which is refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _opened(url: str, label: str, headers: dict[str, str], instead: str) -> Iterator[Any]:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "upbench", **headers})
        response = urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if headers and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            response = error
        else:
            error.close()
            raise _failure(url, label, error, instead) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _failure(url, label, error, instead) from error
    with response:
        yield response


def _blocks(response: Any, url: str, label: str, instead: str) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_CHUNK)
        except http.client.IncompleteRead as error:
            yield error.partial
            raise _failure(url, label, error, instead, _Broken) from error
        except (OSError, http.client.HTTPException) as error:
            raise _failure(url, label, error, instead, _Broken) from error
        if not block:
            return
        yield block
