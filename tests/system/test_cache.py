"""Files of the cache: whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from upbench.errors import UpbenchError
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
