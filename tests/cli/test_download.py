"""`upbench download`, from a server of files on this machine."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import miniatures
import pytest

from upbench.cli import dispatch
from upbench.cli.download import NOTE
from upbench.contracts.dataset import Archive
from upbench.datasets import _archives as archives
from upbench.errors import UpbenchError
from upbench.registry import find_dataset, plugins


class Files:
    """What the server has, what it was asked for, and after how many bytes it hangs up."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.most: int | None = None
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """Serves parts of files, as the hosts of datasets do."""

    def __init__(self, files: Files, *args: object) -> None:
        self.files = files
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name, wanted = self.path.rpartition("/")[2], self.headers.get("Range", "")
        self.files.asked.append((name, wanted))
        content = self.files.content.get(name)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:8]}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.files.most])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    monkeypatch.delenv("UPBENCH_DATA", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    files = Files()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, files)) as http:
        files.url = f"http://127.0.0.1:{http.server_port}/data"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield files
        http.shutdown()
        thread.join()


def tape(folder: Path, mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)
    return stream.getvalue()


def zipped(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return stream.getvalue()


def offer(
    server: Files, monkeypatch: pytest.MonkeyPatch, name: str, *contents: bytes, kind: str = ""
) -> None:
    """Has the server hold the dataset's files; their checksums are those of these."""
    cls = find_dataset(name)
    there = []
    for archive, content in zip(cls.archives, contents, strict=True):
        server.content[archive.url.rpartition("/")[2]] = content
        how = kind or archive.checksum.partition(":")[0]
        checksum = f"{how}:{hashlib.new(how, content).hexdigest()}" if how else ""
        there.append(Archive(archive.url, checksum, archive.folder, len(content) if archive.size else None))
    monkeypatch.setattr(cls, "archives", tuple(there))


def voc(server: Files, monkeypatch: pytest.MonkeyPatch, root: Path, kind: str = "") -> bytes:
    content = tape(miniatures.voc2012(root / "official"))
    offer(server, monkeypatch, "voc2012", content, kind=kind)
    return content


def run(server: Files, *words: str) -> int:
    return dispatch.main(["download", *words, "--mirror", server.url])


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_dataset_is_there_afterwards(
    kind: str,
    server: Files,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    voc(server, monkeypatch, tmp_path, kind)
    to = tmp_path / "to" / "voc"
    assert run(server, "voc2012", "--to", str(to), "--yes") == 0
    out = capsys.readouterr().out
    assert out.index("license:") < out.index(
        f"voc2012 is there: train 4, val 3 images; use it as voc2012:{to}"
    )
    assert sorted(file.name for file in to.iterdir()) == [NOTE, "VOCdevkit"], "the archive is not kept"
    asked = len(server.asked)
    assert run(server, "voc2012", "--to", str(to), "--yes") == 0
    assert len(server.asked) == asked, "nothing is downloaded twice"


def test_into_the_folder_of_all_data(server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    voc(server, monkeypatch, tmp_path)
    monkeypatch.setenv("UPBENCH_DATA", str(tmp_path / "all"))
    assert run(server, "voc2012", "--yes", "--keep") == 0
    assert (tmp_path / "all/voc2012/VOCdevkit").is_dir()
    assert (tmp_path / "all/voc2012/VOCtrainval_11-May-2012.tar").is_file()


def test_zips_in_folders_of_their_own(server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """COCO-Stuff's four files, as their owners pack them."""
    base = miniatures.coco_stuff(tmp_path / "official")
    parts = []
    for kind, split in (("images", "train2017"), ("images", "val2017")):
        place = tmp_path / f"{split}-zip"
        place.mkdir()
        (base / "dataset" / kind / split).rename(place / split)
        parts.append(zipped(place))
    lists = tmp_path / "lists" / "COCO" / "COCOStuff164k"
    lists.mkdir(parents=True)
    (base / "curated").rename(lists / "curated")
    contents = [*parts, zipped(base / "dataset/annotations"), tape(tmp_path / "lists", "w:gz")]
    offer(server, monkeypatch, "coco_stuff27", *contents)
    assert run(server, "coco_stuff27", "--to", str(tmp_path / "to"), "--yes") == 0


def test_the_licence_is_accepted_first(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voc(server, monkeypatch, tmp_path)
    words = ("voc2012", "--to", str(tmp_path / "to"))
    assert run(server, *words) == 2
    shown = capsys.readouterr()
    assert "license:" in shown.out
    assert "add --yes to accept the licence of voc2012" in shown.err
    assert not server.asked

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, code in (("no\n", 2), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run(server, *words) == code


def test_it_goes_on_where_it_was_broken_off(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = voc(server, monkeypatch, tmp_path)
    server.most = len(content) // 10
    assert run(server, "voc2012", "--to", str(tmp_path / "to"), "--yes") == 2
    assert "bytes are kept for the next attempt" in capsys.readouterr().err
    came = len(server.asked)
    server.most = None
    assert run(server, "voc2012", "--to", str(tmp_path / "to"), "--yes") == 0
    (rest,) = server.asked[came:]
    assert rest[1] == f"bytes={came * (len(content) // 10)}-", "only what was missing"


def test_another_file_is_not_unpacked(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = voc(server, monkeypatch, tmp_path)
    server.content["VOCtrainval_11-May-2012.tar"] = content[:-1] + b"!"
    to = tmp_path / "to"
    assert run(server, "voc2012", "--to", str(to), "--yes") == 2
    assert "its md5 is" in capsys.readouterr().err
    assert not list(to.rglob("*.tar")), "it is not kept"
    assert not (to / "VOCdevkit").exists()


def test_a_portals_page_is_no_archive(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no checksum is published, the file must open at least."""
    offer(server, monkeypatch, "kitti_semantics", b"<html>Please log in</html>")
    assert run(server, "kitti_semantics", "--to", str(tmp_path / "to"), "--yes") == 2
    assert "data_semantics.zip" in capsys.readouterr().err
    server.content["data_semantics.zip"] = zipped(miniatures.kitti_semantics(tmp_path / "official"))
    assert run(server, "kitti_semantics", "--to", str(tmp_path / "to"), "--yes") == 0


def test_a_file_that_was_put_there_by_hand(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = voc(server, monkeypatch, tmp_path)
    server.content.clear()
    assert run(server, "voc2012", "--to", str(tmp_path / "to"), "--yes") == 2
    file = tmp_path / "to/VOCtrainval_11-May-2012.tar"
    assert f"a copy of it at {file} would be used instead" in capsys.readouterr().err
    file.write_bytes(content)
    assert run(server, "voc2012", "--to", str(tmp_path / "to"), "--yes") == 0


def test_files_that_are_no_archives(
    server: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("h5py", reason="extra 'datasets' is not installed")
    base = miniatures.nyuv2(tmp_path / "official", normals=True)
    (tmp_path / "zip").mkdir()
    (base / "surfacenormal_metadata").rename(tmp_path / "zip/surfacenormal_metadata")
    contents = [(base / name).read_bytes() for name in ("nyu_depth_v2_labeled.mat", "splits.mat")]
    offer(server, monkeypatch, "nyuv2", *contents, zipped(tmp_path / "zip"))
    assert run(server, "nyuv2", "--to", str(tmp_path / "to"), "--yes") == 0
    out = capsys.readouterr().out
    assert "by hand:" in out
    assert "classMapping40.mat" in out
    assert not list((tmp_path / "to").glob("*.sha256"))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("cityscapes", 1, "1. register at"),
        ("camvid", 1, "git clone"),
        ("interiors", 0, "comes with the package"),
        ("folder", 2, "is no data of its own"),
        ("mmseg", 2, "is no data of its own"),
        ("hf", 2, "is no data of its own"),
        ("cityscape", 2, "did you mean 'cityscapes'?"),
    ],
)
def test_what_cannot_be_downloaded(
    name: str, code: int, words: str, server: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, name, "--to", str(tmp_path / "to"), "--yes") == code
    shown = capsys.readouterr()
    assert words in shown.out + shown.err
    assert not server.asked


def test_where_to(server: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(server, "voc2012", "--yes") == 2
    assert "say where to: --to DIR, or set UPBENCH_DATA" in capsys.readouterr().err


def test_what_datasets_declare() -> None:
    for name, cls in plugins("dataset").items():
        for archive in cls.archives:
            assert archive.url.startswith(("https://", "http://")), name
            kind, colon, digest = archive.checksum.partition(":")
            lengths = {"": 0, "md5": 32, "sha1": 40, "sha256": 64}
            assert len(digest) == lengths[kind], f"{name}: {archive.checksum}"
            assert bool(colon) == bool(kind)
        assert not isinstance(cls.by_hand, str), f"{name}: by_hand is one text, not a sequence of them"


# -------------------- archives that are not to be trusted --------------------


def tar_with(**facts: object) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            entry = tarfile.TarInfo("entry")
            for name, value in facts.items():
                setattr(entry, name, value)
            archive.addfile(entry)

    return do


def zip_with(name: str, mode: int = 0o100644) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, "../../outside")

    return do


def halved(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(range(256)) * 100)
    content = bytearray(path.read_bytes())
    content[40:60] = b"?" * 20
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (tar_with(name="../outside"), "outside of its folder"),
        (tar_with(name="/outside"), "outside of its folder"),
        (tar_with(type=tarfile.SYMTYPE, linkname="../../outside"), "is not to be trusted"),
        (tar_with(type=tarfile.CHRTYPE), "is not to be trusted"),
        (zip_with("../outside"), "outside of its folder"),
        (zip_with("/outside"), "outside of its folder"),
        (zip_with("..\\outside"), "outside of its folder"),
        (zip_with("C:outside"), "outside of its folder"),
        (zip_with("link", 0o120777), "it holds a link"),
        (halved, "is damaged"),
        (lambda path: path.write_bytes(b"text") and None, "is damaged, or no archive"),
    ],
)
def test_unpacking_does_no_harm(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "archive.zip", tmp_path / "a" / "b"
    make(path)
    with pytest.raises(UpbenchError, match=words) as refused:
        archives.unpack(path, folder)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("outside"))


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zip_with("a")(tmp_path / "a.zip")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 3})())
    with pytest.raises(UpbenchError, match="no room to unpack"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "to")
