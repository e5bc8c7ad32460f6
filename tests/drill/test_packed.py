"""Packed data that are no good: arrays of NumPy, and scenes in zip files."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drill.imagefiles import SIDE, line, refuses, scene, scenes, with_line
from upbench.datasets import read_array
from upbench.datasets.interiors import Interiors
from upbench.datasets.interiors.scenes import SceneFolder
from upbench.errors import UpbenchError

# -------------------- arrays --------------------


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def npy(values: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def announced(shape: str, dtype: str = "'<f4'") -> bytes:
    """The head of an array, without its numbers."""
    head = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()


ODD_ARRAYS = {
    "objects": (npy(np.array([{}], object), allow_pickle=True), "Python objects, which are never unpickled"),
    "objects in a zip": (npz(a=np.array([{}], dtype=object)), "Python objects"),
    "a pickle": (pickle.dumps([1.0]), "no array of NumPy"),
    "text": (b"1.0 2.0", "no array of NumPy"),
    "strings": (npy(np.array(["a"])), "not plain numbers"),
    "a table": (npy(np.zeros(2, [("a", "f4"), ("b", "i4")])), "not plain numbers"),
    "complex": (npy(np.zeros(2, complex)), "not plain numbers"),
    "dates": (npy(np.zeros(2, "datetime64[s]")), "not plain numbers"),
    "cut": (npy(np.zeros(100))[:300], "too short"),
    "a head alone": (announced("(3, 4)"), "too short"),
    "a size beyond all": (announced("(1000000000000, 1000000000000)"), "too short"),
    "a size below 0": (announced("(-3, 4)"), "[-3, 4]"),
    "a head of nonsense": (announced("(3, 'a')"), "damaged"),
    "a head that calls": (announced("__import__('os').getcwd()"), "damaged"),
    "a type of nonsense": (announced("(3,)", "'spam'"), "damaged"),
    "half a zip": (npz(a=np.zeros(100))[:150], "damaged"),
    "two arrays": (npz(a=np.zeros(1), b=np.zeros(1)), "say which array is meant; it has a, b"),
    "no arrays": (npz(), ""),
}


@pytest.mark.drill("arrays")
@pytest.mark.parametrize("case", ODD_ARRAYS)
def test_arrays_that_are_no_numbers(tmp_path: Path, case: str) -> None:
    data, words = ODD_ARRAYS[case]
    file = tmp_path / "a.npy"
    file.write_bytes(data)
    refuses(lambda: read_array(file), file, words)


@pytest.mark.drill("arrays")
def test_nothing_is_unpickled(tmp_path: Path) -> None:
    sign, file = tmp_path / "sign", tmp_path / "a.npy"
    odd = np.array([Evil(sign)], dtype=object)
    for data in (npy(odd, allow_pickle=True), pickle.dumps(Evil(sign))):
        file.write_bytes(data)
        refuses(lambda: read_array(file), file)
    stream = io.BytesIO()
    np.savez(stream, a=odd)
    file.write_bytes(stream.getvalue())
    refuses(lambda: read_array(file), file)
    assert not sign.exists()


@pytest.mark.drill("arrays")
@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "f2", "<f4", ">f4", "f8"])
def test_numbers_of_every_kind(tmp_path: Path, dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    file = tmp_path / "a"
    for data in (npy(values), npy(np.asfortranarray(values)), npz(depth=values)):
        file.write_bytes(data)
        assert np.array_equal(read_array(file), values)
    file.write_bytes(npz(depth=values, other=values + values))
    assert np.array_equal(read_array(file, "depth"), values)
    refuses(lambda: read_array(file, "dept"), "no array 'dept'", "depth, other")


@pytest.mark.drill("arrays")
@given(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=3)), max_size=4), st.booleans())
def test_any_damage_to_an_array_is_named_or_none(damage: list[tuple[int, bytes]], packed: bool) -> None:
    values = np.arange(20, dtype=np.float32)
    data = bytearray(npz(a=values) if packed else npy(values))
    for place, other in damage:
        data[place : place + len(other)] = other
    said = ""
    try:
        found = read_array(Path("the file"), data=bytes(data))
    except UpbenchError as error:
        said = str(error)
    assert "the file" in said if said else found.dtype.kind in "biuf"


# -------------------- scenes --------------------


def repacked(shard: Path, **files: bytes | None) -> None:
    """A shard in which the first scene has other files, with sums that are right."""
    with zipfile.ZipFile(shard) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    first = min(int(name.partition("_")[0].partition(".")[0]) for name in held)
    suffixes = {"image": ".jpg", "label": "_label.png", "depth": "_depth.png", "normal": "_normal.png"}
    for kind, data in files.items():
        name = f"{first}{suffixes[kind]}"
        held.pop(name)
        if data is not None:
            held[name] = data
    with zipfile.ZipFile(shard, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)


def as_png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


ODD_SCENES: dict[str, tuple[dict[str, bytes], str]] = {
    "a grey image": ({"image": as_png(Image.new("L", (SIDE, SIDE)))}, "not uint8 [32, 32, 3]"),
    "an image of another size": ({"image": as_png(Image.new("RGB", (SIDE, 8)))}, "32x8"),
    "labels of colours": ({"label": as_png(Image.new("RGB", (SIDE, SIDE)))}, "not uint8 [32, 32]"),
    "labels of 16 bits": ({"label": scene()["_depth.png"]}, "not uint8 [32, 32]"),
    "depth of a byte": ({"depth": as_png(Image.new("L", (SIDE, SIDE)))}, "not uint16 [32, 32]"),
    "normals of one channel": ({"normal": as_png(Image.new("L", (SIDE, SIDE)))}, "not uint8 [32, 32, 3]"),
    "text": ({"depth": b"hello"}, "it is not an image"),
    "nothing": ({"normal": b""}, "it is not an image"),
}


@pytest.mark.drill("scenes")
@pytest.mark.parametrize("case", ODD_SCENES)
def test_a_file_of_a_scene_that_is_no_good(tmp_path: Path, case: str) -> None:
    files, words = ODD_SCENES[case]
    folder = scenes(tmp_path)
    repacked(folder / "train-00.zip", **files)
    dataset = Interiors(folder)
    refuses(lambda: dataset.read("train", 0), "scene 0", "train-00.zip", words)
    dataset.read("train", 1)


@pytest.mark.drill("scenes")
def test_a_file_that_a_shard_lacks_is_noticed_when_a_run_is_planned(tmp_path: Path) -> None:
    folder = scenes(tmp_path)
    repacked(folder / "val-00.zip", depth=None)
    assert Interiors(folder).fingerprint("train")
    refuses(lambda: Interiors(folder).fingerprint("val"), "val-00.zip lacks 100_depth.png")


@pytest.mark.drill("scenes")
def test_an_image_that_the_index_was_not_made_with(tmp_path: Path) -> None:
    folder = scenes(tmp_path)
    with_line(image_sha256="0" * 64)(folder / "train.jsonl")
    refuses(lambda: Interiors(folder).read("train", 0), "scene 0", "is not the image")


@pytest.mark.drill("scenes")
def test_a_scene_that_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upbench.datasets.interiors.scenes._MOST", 10_000)
    folder = scenes(tmp_path)
    repacked(folder / "train-00.zip", normal=b"\0" * 20_000)
    refuses(lambda: Interiors(folder).read("train", 0), "scene 0", "20000 bytes")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=5),
    st.sampled_from(["../x.zip", "/x.zip", "a/b.zip", "..", ".zip", "x.zip\0", "C:\\x.zip"]),
)


@pytest.mark.drill("scenes")
@given(
    st.dictionaries(st.sampled_from(["seed", "size", "shard", "intrinsics", "image_sha256", "new"]), VALUES)
)
def test_whatever_a_line_says_no_file_elsewhere_is_read(tmp_path_factory, fields: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("scenes")
    lines = [
        json.dumps({**line(1, shard="train-00.zip"), **fields}),
        json.dumps(line(2, shard="train-00.zip")),
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))
    try:
        found = SceneFolder("train", folder).index
    except UpbenchError:
        return
    for each in found:
        place = folder / each.get("shard", "train") / f"{each['seed']}.jpg"
        assert os.path.normpath(place).startswith(f"{folder}{os.sep}")
