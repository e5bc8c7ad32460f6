"""Files of the cache: whole or not there, of writers on other machines, too, and with long names."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from upbench.errors import UpbenchError
from upbench.system import cache
from upbench.system.cache import cache_dir, replacing, safe_name


def only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


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


def test_replacing_what_is_a_folder(tmp_path: Path):
    (tmp_path / "f.txt" / "more").mkdir(parents=True)
    with (
        pytest.raises(UpbenchError, match=r"cannot write .*f\.txt: "),
        replacing(tmp_path / "f.txt") as temporary,
    ):
        temporary.write_text("x")
    only(tmp_path, "f.txt")


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


@pytest.mark.parametrize(
    ("whose", "age", "locked", "left"),
    [
        ("ours", 0, False, False),  # process numbers mean the same there: that one is gone
        ("theirs", 0, False, True),  # and here they do not
        ("theirs", 2 * 86400, True, True),
        ("theirs", 2 * 86400, False, False),
    ],
)
def test_files_of_writers_elsewhere(tmp_path: Path, whose: str, age: int, locked: bool, left: bool):
    fcntl = pytest.importorskip("fcntl", reason="this system has no locks on files")
    machine = cache._machine() if whose == "ours" else "01234567"
    other = tmp_path / f".f.txt.{machine}-4194305-89abcdef.tmp"  # beyond the largest process number
    other.write_text("half")
    os.utime(other, (time.time() - age, time.time() - age))
    with other.open("r+") as file:
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        with replacing(tmp_path / "f.txt") as mine:
            mine.write_text("mine")
    assert other.exists() == left
    assert (tmp_path / "f.txt").read_text() == "mine"


def test_a_writer_holds_a_lock(tmp_path: Path):
    with replacing(tmp_path / "f.txt") as mine:
        mine.write_text("mine")
        os.utime(mine, (0, 0))
        assert not cache.abandoned(mine)
    os.utime(tmp_path / "f.txt", (0, 0))
    assert cache.abandoned(tmp_path / "f.txt")


@pytest.mark.parametrize("parts", [("hostname",), ("hostname", "/proc/sys/kernel/random/boot_id")])
def test_machines_that_share_a_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...]):
    """Two containers of one image, or a machine before and after it was started anew."""
    here = cache._machine()
    assert cache._machine.__wrapped__() == here
    monkeypatch.setattr(cache.os, "stat", lambda path: os.stat_result([0] * 10))
    if len(parts) > 1:
        monkeypatch.setattr(cache.Path, "read_text", lambda self: "another start")
    assert cache._machine.__wrapped__() != here


def test_names_that_are_nearly_too_long(tmp_path: Path):
    for length in (120, 200, 255):
        with replacing(tmp_path / ("n" * length)) as mine:
            mine.write_text("mine")
        assert (tmp_path / ("n" * length)).read_text() == "mine"
    with pytest.raises(UpbenchError, match=r"cannot write .*File name too long"):  # noqa: SIM117
        with replacing(tmp_path / ("n" * 300)) as mine:
            mine.write_text("mine")
