"""The files of a feature store: damaged ones are never believed, and full disks are told."""

from __future__ import annotations

import errno
import os
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from storing import Pictures, Toy, check_all, files, open_store, same_moments
from storing import own_cache as own_cache  # each test has one

from upbench.errors import UpbenchError
from upbench.features import shards as shards_module
from upbench.features import store as feature_store
from upbench.features.shards import Shard, ShardWriter

# Damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip(path, -100),
    "flipped in the header": lambda path: flip(path, 300),
    "flipped length": lambda path: flip(path, 6),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"1234"),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not features at all"),
    "other JSON": lambda path: path.write_bytes(b"\x02\0\0\0\0\0\0\0[]"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["before", "between", "while it grows"])
def test_damaged_shards_are_computed_again(damage: str, when: str, capsys: pytest.CaptureFixture[str]):
    """Before the process starts, after it has read the headers, and in a short shard that is to be filled."""
    first = open_store(Pictures(6))
    expected = first.moments()
    whole = Pictures(6) if when != "while it grows" else Pictures(10)
    store = open_store(whole)
    if when == "between":
        store.prepare()
    path = store.folder / "00001.safetensors"
    DAMAGES[damage](path)
    capsys.readouterr()
    check_all(store, Pictures(len(whole)))
    assert whole.read == ([4, 5] if len(whole) == 6 else [4, 5, 6, 7, 8, 9])
    said = capsys.readouterr().err
    assert said.count(f"features of toy/train by toy: {path} is damaged (") == (damage != "gone")
    assert same_moments(open_store(Pictures(6)).moments(), expected)
    assert not [name for name in files(store.folder) if name.endswith(".tmp")]


def test_a_damaged_shard_of_a_longer_store(capsys: pytest.CaptureFixture[str]):
    """It is computed as far as it is needed; whoever needs more fills it up."""
    expected = open_store().moments()
    path = open_store().folder / "00001.safetensors"
    flip(path, -100)
    check_all(open_store(short := Pictures(6)), Pictures(6))
    assert short.read == [4, 5]
    check_all(open_store(whole := Pictures()), Pictures())
    assert whole.read == [6, 7]
    assert same_moments(open_store().moments(), expected)


def test_a_disk_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    store = open_store()
    store.prepare()

    def broken(*_: object) -> None:
        raise shards_module.Damaged("rotten")

    monkeypatch.setattr(Shard, "verify", broken)
    with pytest.raises(UpbenchError, match="failing disk"):
        store.features(0)


def test_files_that_may_not_be_read_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    store = open_store()
    store.prepare()
    before = files(store.folder)

    def refused(*_: object, **__: object) -> object:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UpbenchError, match=r"cannot read .*00000\.safetensors: Permission denied"):
        store.features(0)
    monkeypatch.undo()
    assert files(store.folder) == before


def test_another_process_puts_a_longer_shard_in_place(monkeypatch: pytest.MonkeyPatch):
    store = open_store(Pictures(6), memory=0)
    check_all(store, Pictures(6))
    open_store().prepare()
    monkeypatch.setattr(feature_store, "alone", lambda *_: pytest.fail("a reader took the lock"))
    check_all(store, Pictures(6))


def test_shards_reject_what_they_did_not_write(tmp_path: Path):
    """Headers are compared whole: not a byte may differ."""
    form = shards_module.Format("key", "float32")
    path = tmp_path / "0.safetensors"
    with path.open("wb") as file:
        writer = ShardWriter(file, form, 0, ["a", "b"])
        for _ in range(2):
            writer.add(torch.ones(2, 3, 4))
        writer.finish()
    good = path.read_bytes()
    assert len(Shard.open(path, form, 0)) == 2
    for old, new in (
        (b'"F32"', b'"F64"'),
        (b"[2,3,4]", b"[2,3,5]"),
        (b"[2,3,4]", b"[0,3,4]"),
        (b"[2,3,4]", b"[2, 12]"),
        (b"[0,96]", b"[0,92]"),
        (b'"000001"', b'"000002"'),
        (b'"first":"0"', b'"first":"1"'),
        (b'"key"', b'"kez"'),
    ):
        assert old in good
        path.write_bytes(good.replace(old, new, 1))
        with pytest.raises(shards_module.Damaged):
            Shard.open(path, form, 0)


# Disks


def test_size_is_told_before(capsys: pytest.CaptureFixture[str]):
    store = open_store(Pictures(6))
    store.prepare()
    assert f"features of toy/train by toy: 6 images, 2.6 kB in {store.folder}\n" in capsys.readouterr().err
    open_store().prepare()
    assert f"toy: 10 images, 4.3 kB in {store.folder}; 6 are there\n" in capsys.readouterr().err
    open_store().prepare()
    assert capsys.readouterr().err == ""
    assert feature_store.amount(37_748_736) == "37.7 MB"


def test_too_small_a_disk(monkeypatch: pytest.MonkeyPatch, cache: Path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage(2e9, 1e9, 1_000_004_000))
    store = open_store(backbone=(backbone := Toy()))
    with pytest.raises(UpbenchError, match=r"need 4\.3 kB, but .* has 4\.0 kB free .*UPBENCH_CACHE") as info:
        store.prepare()
    assert "\n" not in str(info.value)
    assert backbone.batches == []
    assert files(cache) == ["lock"]
    open_store(Pictures(9)).prepare()


def test_disk_full_in_the_middle(monkeypatch: pytest.MonkeyPatch, cache: Path):
    """The second shard finds no room; the first stays, and the next run goes on after it."""

    def full(writer: ShardWriter) -> None:
        if writer._first:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(writer)

    finish = ShardWriter.finish
    monkeypatch.setattr(ShardWriter, "finish", full)
    with pytest.raises(UpbenchError, match=r"disk full: cannot write .*00001\.safetensors") as info:
        open_store().prepare()
    assert "\n" not in str(info.value)
    assert files(cache) == ["00000.safetensors", "lock", "moments.safetensors", "store.json"]
    monkeypatch.undo()
    monkeypatch.setenv("UPBENCH_CACHE", str(cache.parent))
    check_all(open_store(images := Pictures()), Pictures())
    assert images.read == [4, 5, 6, 7, 8, 9]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource")
def test_disk_full_by_the_kernel(cache: Path):
    """It refuses to write past a limit, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UpbenchError, match="disk full: cannot write"):
            open_store().prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [name for name in files(cache) if name.endswith((".safetensors", ".tmp"))]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache():
    store = open_store()
    store.prepare()
    store._moments_path.unlink()
    store.folder.chmod(0o555)
    try:
        check_all(open_store(), Pictures())
        assert open_store().moments().count == 120
        with pytest.raises(UpbenchError, match="cannot write"):
            open_store(Pictures(11)).prepare()
    finally:
        store.folder.chmod(0o755)
