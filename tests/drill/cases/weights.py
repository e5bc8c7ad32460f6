"""Checkpoints that hold anything, given on the command line: one line, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drill.case import Case, done, refused

FILE = "c.pth"
MAGIC = 0x1950A86A20F9469CFC6C
"""What `torch.save` began files with before PyTorch 1.6; then come versions and the system."""


def profile(file: str = FILE) -> tuple[str, ...]:
    """The command that loads weights first, and does little after."""
    return ("profile", "--methods", f"carafe:{file}", "--size", "64")


# -------------------- pickles, opcode by opcode --------------------


def text(value: str) -> bytes:
    """A text on the stack."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """A whole number."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    """A class or a function."""
    return f"c{module}\n{name}\n".encode()


def values(*parts: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def called(function: bytes, *parts: bytes) -> bytes:
    """The result of a call."""
    return function + values(*parts) + b"R"


def storage(elements: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    """A storage of tensors that stands elsewhere in the file."""
    return values(text("storage"), named("torch", kind), text(key), text("cpu"), number(elements)) + b"Q"


def tensor(store: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A tensor as `torch.save` writes it."""
    return called(
        named("torch._utils", "_rebuild_tensor_v2"),
        store,
        number(offset),
        values(*map(number, shape)),
        values(*map(number, stride)),
        b"\x89",
        called(named("collections", "OrderedDict")),
    )


def mapping(**entries: bytes) -> bytes:
    """A whole pickle: a mapping of names to values."""
    body = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80\x02}(" + body + b"u."


def archive(path: Path, content: bytes, stores: Mapping[str, bytes], compressed: bool = False) -> None:
    """Writes the file that `torch.save` would."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        for key, data in stores.items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", "3\n")


def legacy(content: bytes, keys: list[str], data: bytes) -> bytes:
    """The file that `torch.save` wrote before PyTorch 1.6."""
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    heads = [pickle.dumps(part, protocol=2) for part in (MAGIC, 1001, system)]
    return b"".join([*heads, content, pickle.dumps(keys, protocol=2), data])


# -------------------- files that ask for more than they hold --------------------

Maker = Callable[[Path], None]


def _zip(content: bytes, data: bytes = bytes(16), compressed: bool = False) -> Maker:
    return lambda folder: archive(folder / FILE, content, {"0": data}, compressed)


def _old(content: bytes) -> Maker:
    data = struct.pack("<q", 4) + bytes(16)
    return lambda folder: (folder / FILE).write_bytes(legacy(content, ["0"], data)) and None


def _doubled(times: int) -> bytes:
    """Text that is written as hexadecimal digits, again and again."""
    value = called(named("_codecs", "encode"), text("x"), text("latin1"))
    for _ in range(times):
        value = called(named("_codecs", "encode"), value, text("hex"))
    return value


def _twice(folder: Path) -> None:
    archive(folder / FILE, mapping(a=tensor(storage(4), (4,), (1,))), {"0": bytes(16)})
    with zipfile.ZipFile(folder / FILE, "a") as file:
        file.writestr("archive/DATA/0", bytes(4))


def _copies() -> bytes:
    """A list of a million entries, and a hundred sets of it."""
    long = b"](" + b"K\x01" * 1_000_000 + b"eq\x00"
    sets = b"".join(called(named("builtins", "bytearray"), b"h\x00") for _ in range(100))
    return b"\x80\x02(" + long + sets + b"t."


def _sparse() -> bytes:
    layout = called(named("torch.serialization", "_get_layout"), text("torch.sparse_coo"))
    parts = values(tensor(storage(4), (2,), (1,)), tensor(storage(4), (2,), (1,)), values(number(10**9)))
    return mapping(a=called(named("torch._utils", "_rebuild_sparse_tensor"), layout, parts))


def _quantised() -> bytes:
    kind = values(named("torch", "per_tensor_affine"), number(1), number(0))
    parts = (storage(4), number(0), values(number(10**12)), values(number(1)), kind, b"\x89", b"N")
    return mapping(a=called(named("torch._utils", "_rebuild_qtensor"), *parts))


def _bombs() -> list[Case]:
    whole = tensor(storage(4), (4,), (1,))
    found: dict[str, tuple[Maker, str]] = {
        "storage of a terabyte": (_zip(mapping(a=tensor(storage(2**38), (4,), (1,)))), "states"),
        "storage of one more": (
            _zip(mapping(a=tensor(storage(5), (4,), (1,)))),
            "states 20 bytes, and has 16",
        ),
        "storage that is not there": (_zip(mapping(a=tensor(storage(4, key="7"), (4,), (1,)))), "and has 0"),
        "storage of a negative size": (_zip(mapping(a=tensor(storage(-1), (4,), (1,)))), "no size"),
        "storage of kinds unheard of": (
            _zip(mapping(a=tensor(storage(4, "XStorage"), (4,), (1,)))),
            "states",
        ),
        "tensor larger than its storage": (_zip(mapping(a=tensor(storage(4), (5,), (1,)))), "larger than"),
        "tensor beyond its storage": (_zip(mapping(a=tensor(storage(4), (2,), (1,), 3))), "larger than"),
        "tensor of one value a billion times": (
            _zip(mapping(a=tensor(storage(4), (10**9,), (0,)))),
            "many times",
        ),
        "tensor of a negative size": (_zip(mapping(a=tensor(storage(4), (-4,), (1,)))), "no sizes"),
        "old: storage of a terabyte": (_old(mapping(a=tensor(storage(2**38), (4,), (1,)))), "states"),
        "old: two storages for one": (
            _old(mapping(a=whole, b=tensor(storage(10_000, key="1"), (4,), (1,)))),
            "states",
        ),
        "old: tensor larger than its storage": (
            _old(mapping(a=tensor(storage(4), (5,), (1,)))),
            "larger than",
        ),
        "bytes from a number": (
            _zip(mapping(a=called(named("builtins", "bytearray"), number(10**12)))),
            "bytearray",
        ),
        "bytes from a number, as in Python 2": (
            _zip(mapping(a=called(named("__builtin__", "bytearray"), number(10**12)))),
            "bytearray",
        ),
        "tensor from a number": (
            _zip(mapping(a=called(named("torch", "FloatTensor"), number(10**12)))),
            "FloatTensor",
        ),
        "text that doubles": (_zip(mapping(a=_doubled(40))), "encodes text as 'hex'"),
        "copies of copies": (_zip(_copies()), "copies"),
        "sparse": (_zip(_sparse()), "_rebuild_sparse_tensor"),
        "quantised": (_zip(_quantised()), "_rebuild_qtensor"),
        "zeros, compressed": (_zip(mapping(a=whole), bytes(50_000_000), compressed=True), "states to hold"),
        "an entry that stands there twice": (_twice, "twice"),
        "a name nested a million deep": (
            _zip(b"\x80\x02}()" + b"\x85" * 1_000_000 + b"Nu."),
            "nested deeper than 100 levels",
        ),
        "code": (_zip(mapping(a=called(named("os", "mkdir"), text("made")))), "more than tensors"),
        "code, in the old format": (
            _old(mapping(a=called(named("os", "mkdir"), text("made")))),
            "more than tensors",
        ),
    }
    return [
        Case("weights", f"asks for {name}", profile(), refused(FILE, text), make)
        for name, (make, text) in found.items()
    ]


# -------------------- files that are no checkpoint --------------------


def _bytes(data: bytes, name: str = FILE) -> Maker:
    return lambda folder: (folder / name).write_bytes(data) and None


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def _entry(shape: list[int], offsets: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


def _others() -> list[Case]:
    files: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "empty"),
        "a web page": (b"\n<!DOCTYPE html><html>log in</html>", "web page"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n", "begins with"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "begins with"),
        "a list": (pickle.dumps([1, 2]), "corrupt"),
        "a pickle of another program": (pickle.dumps({"a": 1}, protocol=4), "corrupt"),
        "an archive without an end": (b"PK\x03\x04" + bytes(100), "corrupt"),
        "only a number": (legacy(b"\x80\x02K\x01.", [], b""), "not a mapping"),
        "a mapping of nothing": (legacy(b"\x80\x02}.", [], b""), "empty"),
        "numbers for names": (legacy(b"\x80\x02}(K\x01K\x02u.", [], b""), "no name"),
        "a mapping that holds itself": (
            legacy(b"\x80\x02}q\x00" + text("model") + b"h\x00s.", [], b""),
            "model",
        ),
        "a pickle without an end": (legacy(b"\x80\x02}", [], b""), "corrupt"),
        "a stack that is empty": (legacy(b"\x80\x020.", [], b""), "corrupt"),
        "a memo that is not there": (legacy(b"\x80\x02h\x07.", [], b""), "corrupt"),
        "a tar archive": (b"storages" + bytes(249) + b"ustar" + bytes(500), "begins with"),
    }
    found = [
        Case("weights", name, profile(), refused(FILE, text), _bytes(data))
        for name, (data, text) in files.items()
    ]
    headers: dict[str, bytes] = {
        "header of 2^63 bytes": safetensors({}, length=2**63),
        "header of 2^40 bytes": safetensors({}, length=2**40),
        "header that is no JSON": safetensors(b"{]"),
        "header nested 10,000 deep": safetensors(b'{"a":' * 10_000),
        "header that is a list": safetensors([]),
        "shape of 2^62": safetensors(_entry([2**62], [0, 16])),
        "shape that overflows": safetensors(_entry([2**33, 2**33], [0, 16])),
        "negative shape": safetensors(_entry([-4], [0, 16])),
        "offsets beyond the file": safetensors(_entry([2**20], [0, 2**22])),
        "offsets backwards": safetensors(_entry([4], [16, 0])),
        "a kind that there is not": safetensors(_entry([4], [0, 16], "F33")),
        "data without a tensor": safetensors({}, bytes(16)),
        "metadata that is no text": safetensors({"__metadata__": {"method": 3}}, b""),
        "nothing": b"",
        "seven bytes": bytes(7),
    }
    name = "c.safetensors"
    return [
        *found,
        *(
            Case("weights", f"safetensors: {k}", profile(name), refused(name, "corrupt"), _bytes(v, name))
            for k, v in headers.items()
        ),
    ]


# -------------------- what is in a file's place --------------------


def _link(target: str) -> Maker:
    return lambda folder: os.symlink(target, folder / FILE)


def _places() -> list[Case]:
    long = "x" * 300 + ".pth"
    return [
        Case("weights", "place: nothing", profile(), refused("not found", FILE)),
        Case(
            "weights",
            "place: a folder",
            profile(),
            refused("not found", FILE),
            lambda folder: (folder / FILE).mkdir(),
        ),
        Case(
            "weights",
            "place: a pipe",
            profile(),
            refused("not found", FILE),
            lambda folder: os.mkfifo(folder / FILE),
        ),
        Case("weights", "place: a circle", profile(), refused("not found", FILE), _link(FILE)),
        Case("weights", "place: a device", profile(), refused("not found", FILE), _link("/dev/zero")),
        Case("weights", "place: 300 characters", profile(long), refused("not found", "xxx")),
        Case("weights", "place: another kind of file", profile("./c.onnx"), refused("must end in")),
    ]


BOMBS = _bombs()
LISTED = ("list", "weights")
CASES: list[Case] = [
    *BOMBS,
    *_others(),
    *_places(),
    Case("weights", "how each is checked", LISTED, done("pinned on first download", "not checked", "sha256")),
]
