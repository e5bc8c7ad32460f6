"""Downloads and the files they leave: whole, checked, or not there."""

from __future__ import annotations

import hashlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upbench.system.download as downloads
from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.system.cache import sha256_file
from upbench.system.download import download
from upbench.weights.load import load_method
from upbench.weights.resolve import list_weights, resolve

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


HALF = len(CONTENT) // 2


class Handler(BaseHTTPRequestHandler):
    """Serves `CONTENT`; other paths cut it short, send too much, lead elsewhere, or find nothing."""

    def __init__(self, requests: list[str], *args: object) -> None:
        self.requests = requests
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        first = self.requests.count(self.path) == 0
        self.requests.append(self.path)
        place = self.path.removeprefix("/").partition(".")[0]
        if place == "missing":
            self.send_error(404)
        elif place in ("leads", "circle"):
            self.send_response(302)
            self.send_header("Location", "/w.pth" if place == "leads" else self.path)
            self.end_headers()
        elif place == "resumed":
            self.resumed(first, tag='"a"')
        elif place == "changed":  # between the two requests
            self.resumed(first, tag='"a"' if first else '"b"')
        elif place == "weak":
            self.resumed(first, tag='W/"a"')
        elif place == "never":
            self.resumed(True, tag='"a"')
        elif place == "gone":  # what came before is more than there is now
            self.resumed(first, tag='"a"', beyond=not first)
        elif place == "elsewhere":
            self.resumed(first, tag='"a"', shift=1)
        else:
            self.plain(place)

    def plain(self, place: str) -> None:
        body = {"page": b"\n<html>log in</html>", "empty": b"", "text": b"oops"}.get(place, CONTENT)
        self.send_response(200)
        if place not in ("unsaid", "endless"):
            length = {"huge": 1 << 50, "long": HALF}.get(place, len(body))
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body[:HALF] if place == "short" else body)
        while place == "endless":
            self.wfile.write(body)

    def resumed(self, broken: bool, tag: str, beyond: bool = False, shift: int = 0) -> None:
        """A server that knows parts; where `broken`, the connection ends before the file does."""
        asked = self.headers.get("Range", "")
        start = int(asked[6:-1]) if asked and self.headers.get("If-Range") == tag else 0
        if beyond and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.requests[-1] += f" from {start}"
            self.send_header("Content-Range", f"bytes {start + shift}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[start : start + 300_000] if broken else CONTENT[start:])

    def handle(self) -> None:
        with suppress(ConnectionError):  # who is sent too much hangs up
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def requests() -> list[str]:
    return []


@pytest.fixture(scope="module")
def server(requests: list[str]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, requests)) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch, requests: list[str]) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("UPBENCH_WEIGHTS", raising=False)
    requests.clear()


def only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_downloads_once(server: str, requests: list[str], tmp_path: Path):
    path = tmp_path / "w.pth"
    for _ in range(2):
        assert download(f"{server}/w.pth", path, sha256=SHA256, size=len(CONTENT)) == SHA256
    assert path.read_bytes() == CONTENT
    assert requests == ["/w.pth"]
    only(tmp_path, "w.pth")


def test_file_urls(tmp_path: Path):
    (tmp_path / "source.bin").write_bytes(CONTENT)
    (tmp_path / "to").mkdir()
    url = (tmp_path / "source.bin").as_uri()
    assert download(url, tmp_path / "to" / "w.bin", sha256=SHA256) == SHA256
    only(tmp_path / "to", "w.bin")


def test_first_download_pins_an_unknown_hash(server: str, tmp_path: Path):
    path = tmp_path / "w.pth"
    assert download(f"{server}/w.pth", path) == SHA256
    assert (tmp_path / "w.pth.sha256").read_text().strip() == SHA256
    path.write_bytes(b"tampered")
    with pytest.raises(UpbenchError, match=f"expected {SHA256}; delete it to download it again"):
        download(f"{server}/w.pth", path)
    path.unlink()
    assert download(f"{server}/w.pth", path) == SHA256
    (tmp_path / "w.pth.sha256").write_text("1" * 64)
    path.unlink()
    with pytest.raises(UpbenchError, match="expected 1111"):  # the publisher changed the file
        download(f"{server}/w.pth", path)
    only(tmp_path, "w.pth.sha256")


@pytest.mark.parametrize(
    ("path", "options", "text"),
    [
        ("/w.pth", {"sha256": "0" * 64}, "has sha256 .*, expected 0000.*; nothing was kept"),
        ("/w.pth", {"size": 7}, "gave 1280000 bytes, expected 7"),
        ("/short.pth", {}, "gave 640000 bytes, expected 1280000|IncompleteRead"),
        ("/missing.pth", {}, "could not download toy:a from http.*: HTTP 404 Not Found"),
    ],
)
def test_bad_downloads_keep_nothing(server: str, tmp_path: Path, path: str, options: dict, text: str):
    with pytest.raises(UpbenchError, match=text) as info:
        download(server + path, tmp_path / "w.pth", label="toy:a", **options)
    assert "\n" not in str(info.value)
    only(tmp_path)


def test_the_advice_about_another_file_works(server: str, tmp_path: Path):
    """What a message says is done to the letter, and then it goes on."""
    path, pin = tmp_path / "w.pth", tmp_path / "w.pth.sha256"
    pin.write_text("1" * 64 + "\n")  # of what was there when it was first downloaded
    with pytest.raises(UpbenchError) as caught:
        download(f"{server}/w.pth", path)
    advice = f"expected {'1' * 64} as on the first download; to take what is there now, delete {pin}"
    assert advice in str(caught.value)
    only(tmp_path, "w.pth.sha256")
    pin.unlink()
    assert download(f"{server}/w.pth", path) == SHA256
    path.write_bytes(b"tampered")
    with pytest.raises(UpbenchError, match=r"w\.pth has sha256 .*; delete it to download it again"):
        download(f"{server}/w.pth", path)
    path.unlink()
    assert download(f"{server}/w.pth", path) == SHA256


@pytest.mark.parametrize("note", [b"", b"\xff\xfe", b"0" * 63, b"x" * 64, b"0" * 5000])
def test_a_damaged_pin_is_not_believed(server: str, tmp_path: Path, note: bytes):
    path, pin = tmp_path / "w.pth", tmp_path / "w.pth.sha256"
    download(f"{server}/w.pth", path)
    pin.write_bytes(note)
    with pytest.raises(UpbenchError) as caught:
        download(f"{server}/w.pth", path)
    assert str(pin)[-30:] in str(caught.value)
    assert "\n" not in str(caught.value)
    if len(note) < 1000:
        assert "is damaged" in str(caught.value)
        assert "delete it and the file beside it to download anew" in str(caught.value)
    pin.unlink()
    path.unlink()
    assert download(f"{server}/w.pth", path) == SHA256


def no_page(path: Path) -> None:
    if path.read_bytes() != CONTENT:
        raise UpbenchError(f"checkpoint {path} is corrupt or truncated (it is a web page)")


@pytest.mark.parametrize("place", ["page", "empty", "text"])
def test_a_wrong_first_answer_is_not_pinned(server: str, tmp_path: Path, place: str):
    path = tmp_path / "w.pth"
    with pytest.raises(
        UpbenchError, match=r"gave something else: it is corrupt .*; nothing was kept"
    ) as caught:
        download(f"{server}/{place}.pth", path, check=no_page)
    assert ".part" not in str(caught.value)
    only(tmp_path)
    assert download(f"{server}/w.pth", path, check=no_page) == SHA256
    only(tmp_path, "w.pth", "w.pth.sha256")


def test_a_file_that_was_put_there_is_checked_before_it_is_pinned(server: str, tmp_path: Path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"<html>")
    with pytest.raises(
        UpbenchError, match=r"is something else: it is corrupt .*; delete it to download it again"
    ):
        download(f"{server}/w.pth", path, check=no_page)
    only(tmp_path, "w.pth")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UpbenchError, match="is not a file; delete it to download it again"):
        download(f"{server}/w.pth", path, check=no_page)
    path.unlink()
    path.write_bytes(CONTENT)
    assert download(f"{server}/w.pth", path, check=no_page) == SHA256
    only(tmp_path, "w.pth", "w.pth.sha256")


@pytest.mark.parametrize(
    ("place", "size", "text"),
    [
        ("long", None, "gives more than the 640,000 bytes|gave 640000 bytes"),  # http.client reads no more
        ("unsaid", 1000, "gives more than the 1,000 bytes that it may have"),
        ("endless", 1_000_000, "gives more than the 1,000,000 bytes that it may have"),
        ("endless", None, "gives more than the 2,000,000 bytes that it may have"),
        ("huge", None, r"promises 1,125,899,906,842,624 bytes, more than 2,000,000"),
        ("huge", 1000, "gave 1125899906842624 bytes, expected 1000"),
    ],
)
def test_no_more_is_taken_than_was_promised(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, size: int | None, text: str
):
    monkeypatch.setattr(downloads, "LARGEST", 2_000_000)
    if place == "long":
        assert download(f"{server}/{place}.pth", tmp_path / "w.pth", size=size) != SHA256
        assert (tmp_path / "w.pth").stat().st_size == HALF
        return
    with pytest.raises(UpbenchError, match=text):
        download(f"{server}/{place}.pth", tmp_path / "w.pth", size=size)
    only(tmp_path)


def test_without_a_promise_all_that_comes_is_taken(server: str, tmp_path: Path):
    assert download(f"{server}/unsaid.pth", tmp_path / "w.pth") == SHA256


def test_redirects(server: str, tmp_path: Path):
    """From http anywhere; from https to https alone."""
    assert download(f"{server}/leads.pth", tmp_path / "w.pth") == SHA256
    with pytest.raises(UpbenchError, match="could not download"):
        download(f"{server}/circle.pth", tmp_path / "other.pth")
    handler = downloads._Redirects()
    request = urllib.request.Request("https://example.org/w.pth")
    for target in ("http://example.org/w.pth", "ftp://example.org/w.pth", "HTTP://example.org/"):
        with pytest.raises(urllib.error.URLError, match=r"it leads from https to .*, which is refused"):
            handler.redirect_request(request, None, 302, "Found", {}, target)
    found = handler.redirect_request(request, None, 302, "Found", {}, "https://elsewhere.org/w.pth")
    assert found is not None
    assert found.full_url == "https://elsewhere.org/w.pth"


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        ("resumed", ["/resumed.pth", "/resumed.pth from 300000"]),
        ("changed", ["/changed.pth", "/changed.pth"]),
        ("gone", ["/gone.pth", "/gone.pth", "/gone.pth"]),
    ],
)
def test_a_broken_connection_goes_on(
    server: str, requests: list[str], tmp_path: Path, place: str, asked: list[str]
):
    assert download(f"{server}/{place}.pth", tmp_path / "w.pth", sha256=SHA256) == SHA256
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert requests == asked
    only(tmp_path, "w.pth")


def test_the_next_call_goes_on(server: str, requests: list[str], tmp_path: Path):
    path = tmp_path / "w.pth"
    with pytest.raises(UpbenchError, match="900,000 bytes are kept for the next attempt"):
        download(f"{server}/never.pth", path)
    only(tmp_path, ".w.pth.part", ".w.pth.part.json")
    assert (tmp_path / ".w.pth.part").read_bytes() == CONTENT[:900_000]
    assert download(f"{server}/never.pth", path) == SHA256
    assert requests[-1] == "/never.pth from 1200000"
    only(tmp_path, "w.pth", "w.pth.sha256")


def test_parts_that_cannot_be_gone_on_with_are_not_kept(server: str, requests: list[str], tmp_path: Path):
    """Of another address, with damaged notes, or of a server that does not name the state of a file."""
    path = tmp_path / "w.pth"
    with pytest.raises(UpbenchError, match=r"gave 300000 bytes, expected 1280000|IncompleteRead"):
        download(f"{server}/weak.pth", path)
    only(tmp_path)
    (tmp_path / ".w.pth.part").write_bytes(b"x" * 1000)
    (tmp_path / ".w.pth.part.json").write_text('{"url": "http://elsewhere", "validator": "a"}')
    assert download(f"{server}/w.pth", path) == SHA256
    path.unlink()
    (tmp_path / ".w.pth.part").write_bytes(b"x" * 1000)
    (tmp_path / ".w.pth.part.json").write_bytes(b"\xff[")
    assert download(f"{server}/w.pth", path) == SHA256
    only(tmp_path, "w.pth", "w.pth.sha256")
    path.unlink()
    with pytest.raises(UpbenchError, match="gave another part than was asked for; nothing was kept"):
        download(f"{server}/elsewhere.pth", path)
    only(tmp_path, "w.pth.sha256")


@pytest.mark.skipif(downloads.fcntl is None, reason="a system without locks")
def test_two_at_once_do_not_share_a_part(server: str, tmp_path: Path):
    path = tmp_path / "w.pth"
    with downloads._Part(path, "a") as first:
        first.begin('"x"')
        first.file.write(b"mine")
        assert download(f"{server}/w.pth", path) == SHA256
        assert first.path.read_bytes() in (b"", b"mine")
        only(tmp_path, "w.pth", "w.pth.sha256", ".w.pth.part", ".w.pth.part.json")
        first.discard()
    only(tmp_path, "w.pth", "w.pth.sha256")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/w.pth", "file:///nowhere/w.pth", "nonsense://x/w.pth"])
def test_unreachable(url: str, tmp_path: Path):
    with pytest.raises(UpbenchError, match=r"could not download toy:a from .*UPBENCH_WEIGHTS") as info:
        download(url, tmp_path / "w.pth", label="toy:a")
    assert "\n" not in str(info.value)
    only(tmp_path)


# -------------------- through a method --------------------


class Toy(Upsampler):
    def __init__(self, channels: int = 384) -> None:
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size)


Toy.name = "toy"


def test_remote_entry_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: list[str], server: str
):
    """From the URL into the cache, but first from `$UPBENCH_WEIGHTS`; both are checked."""
    torch.save({"bias": torch.ones(3)}, tmp_path / "w.pth")
    url = (tmp_path / "w.pth").as_uri()
    sha256 = sha256_file(tmp_path / "w.pth")
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(Upsampler.registered, "toy", Toy)
    monkeypatch.setattr(Toy, "weights", {"a": Weights(url, sha256)})
    assert load_method("toy", "a").bias.tolist() == [1, 1, 1]  # type: ignore[union-attr, operator]
    resolved = resolve(Toy, "a")
    assert resolved.path == tmp_path / "cache" / "weights" / "toy" / "w.pth"
    assert resolved.sha256 == sha256

    local = tmp_path / "local"
    local.mkdir()
    (local / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes())
    monkeypatch.setenv("UPBENCH_WEIGHTS", str(local))
    monkeypatch.setattr(Toy, "weights", {"a": Weights("http://127.0.0.1:9/w.pth", sha256)})
    assert resolve(Toy, "a").path == local / "w.pth"
    (local / "w.pth").write_bytes(b"other")
    with pytest.raises(UpbenchError, match=r"local/w\.pth is not weights 'toy:a': its sha256 is"):
        load_method("toy", "a")


def test_a_portals_page_is_not_pinned_as_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
):
    """The first answer has to be a checkpoint that can be read; then it is pinned, and the list says so."""
    torch.save({"bias": torch.ones(3)}, tmp_path / "w.pth")
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(Upsampler.registered, "toy", Toy)
    cached = tmp_path / "cache" / "weights" / "toy"

    def checked(url: str) -> str:
        monkeypatch.setattr(Toy, "weights", {"a": Weights(url, filename="w.pth")})
        return next(row.checked for row in list_weights() if row.method == "toy")

    assert checked(f"{server}/page.pth") == "pinned on first download"
    with pytest.raises(UpbenchError, match="it is a web page: a portal's or a login's"):
        load_method("toy", "a")
    assert list(cached.iterdir()) == []
    assert checked((tmp_path / "w.pth").as_uri()) == "pinned on first download"
    assert load_method("toy", "a").bias.tolist() == [1, 1, 1]  # type: ignore[union-attr, operator]
    only(cached, "w.pth", "w.pth.sha256")
    assert checked(f"{server}/page.pth") == "pinned"
    assert load_method("toy", "a").bias.tolist() == [1, 1, 1]  # type: ignore[union-attr, operator]
    monkeypatch.setattr(Toy, "weights", {"a": Weights(f"{server}/w.pth", sha256=SHA256)})
    assert next(row.checked for row in list_weights() if row.method == "toy") == "sha256"
