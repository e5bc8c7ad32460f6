"""Downloads and the files they leave: whole, checked, or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.upsampler import Upsampler
from upbench.contracts.weights import Weights
from upbench.errors import UpbenchError
from upbench.system.cache import cache_dir, replacing, safe_name, sha256_file
from upbench.system.download import download
from upbench.weights.load import load_method
from upbench.weights.resolve import resolve

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `CONTENT`; other paths cut it short, answer late errors, or find nothing."""

    def __init__(self, requests: list[str], *args: object) -> None:
        self.requests = requests
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path.startswith("/short") else CONTENT)

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


# -------------------- files that are whole or not there --------------------


def test_replacing(tmp_path: Path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    only(tmp_path, "f.txt")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_replacing_cleans_up_after_killed_writers(tmp_path: Path):
    child = os.fork()
    if child == 0:
        with replacing(tmp_path / "f.txt") as temporary:
            temporary.write_text("half")
            os._exit(9)  # as kill -9: nothing below runs
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "f.txt") as mine, replacing(tmp_path / "f.txt") as other:
        mine.write_text("mine")  # a living writer's file is left alone
        other.write_text("other")
    assert (tmp_path / "f.txt").read_text() == "mine"
    only(tmp_path, "f.txt")


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "disk full: cannot write"), (errno.EROFS, "cannot write .*Read-only")]
)
def test_replacing_says_what_the_disk_says(tmp_path: Path, code: int, text: str):
    with pytest.raises(UpbenchError, match=text), replacing(tmp_path / "f.txt"):
        raise OSError(code, os.strerror(code))
    only(tmp_path)


def test_replacing_leaves_errors_of_other_files_alone(tmp_path: Path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "f.txt"):
        (tmp_path / "other.txt").read_text()


def test_missing_folder(tmp_path: Path):
    with pytest.raises(UpbenchError, match="cannot write"), replacing(tmp_path / "no" / "f.txt") as temporary:
        temporary.write_text("x")


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "c"))
    assert cache_dir("a", "b") == tmp_path / "c" / "a" / "b"
    assert (tmp_path / "c" / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UpbenchError, match=r"cannot create cache folder .*; set UPBENCH_CACHE"):
        cache_dir("a")
    monkeypatch.delenv("UPBENCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "upbench"


def test_safe_name():
    assert safe_name("folder:/a b/ü") == "folder_a_b_"
