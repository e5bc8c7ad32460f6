"""What a checkpoint file says of its sizes, looked through before anything is allocated for it.

A pickle is a program that makes objects. `torch.load(weights_only=True)` runs no foreign code, but it makes
whatever memory the program asks for: a storage of a terabyte that the file does not hold, a
`bytearray(10**12)`, text that doubles forty times, a compressed entry of zeros. Here the same program is run
over stand-ins that have sizes and no content, and a file that asks for more than it can hold is refused.
Imports no torch.

The format is that of `torch.save`, as PyTorch documents it ("Serialization semantics") and as its
`torch/serialization.py` reads it; the opcodes are those of Python's `pickletools`.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

EXPANSION = 10
"""How many times its own size a file may take in memory: tensors may share values, entries be compressed."""
_SLACK = 1 << 20
_LONGEST_PICKLE = 1 << 26
_DEEPEST = 100
_LEGACY_PARTS = 5
"""Pickles that a file of the format before PyTorch 1.6 begins with: magic number, version, system, content,
keys of storages."""
_BITS = {"Double": 64, "Float": 32, "Half": 16, "BFloat16": 16, "Long": 64, "Int": 32, "Short": 16}
_BITS |= {"Char": 8, "Byte": 8, "Bool": 8, "Untyped": 8, "ComplexDouble": 128, "ComplexFloat": 64}
_WIDEST = 128
_REBUILDS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_MAKERS = ("Tensor", "Storage", "Parameter")
_COPIERS = ("builtins", "__builtin__", "collections", "torch")
_WRAPPERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


class Refused(ValueError):
    """A file that asks for more than it can hold, or for what no checkpoint needs."""


def check_stated(path: Path) -> None:
    """Whether what a `.pth` file asks for is what it can hold.

    Raises:
        Refused: It asks for more, or for objects that make memory from a number alone.
        Exception: Whatever a damaged file leads to; it is no checkpoint then.
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            stream = io.BytesIO(file.read(_LONGEST_PICKLE))
            for _ in range(_LEGACY_PARTS):
                _Reader(stream, size).load()
            return
    with zipfile.ZipFile(path) as archive:
        entries = _entries(archive, size)
        content = archive.read(_content_of(archive))
    _Reader(io.BytesIO(content), size, entries).load()


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Bytes of the storages of an archive, by their keys."""
    infos = archive.infolist()
    names = [info.filename.casefold() for info in infos]  # as PyTorch finds entries
    if len(set(names)) < len(names):
        raise Refused("an entry of its archive stands there twice")
    stated = sum(info.file_size for info in infos)
    if stated > EXPANSION * size + _SLACK:
        raise Refused(f"its archive of {size:,} bytes states to hold {stated:,}")
    folder = f"{_folder(archive)}/data/".casefold()
    return {
        name[len(folder) :]: info.file_size
        for name, info in zip(names, infos, strict=True)
        if name.startswith(folder)
    }


def _folder(archive: zipfile.ZipFile) -> str:
    """PyTorch reads the entries of the folder that the first one is in."""
    return archive.infolist()[0].filename.partition("/")[0]


def _content_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    info = archive.getinfo(f"{_folder(archive)}/data.pkl")
    if info.file_size > _LONGEST_PICKLE:
        raise Refused(f"its list of tensors states to have {info.file_size:,} bytes")
    return info


class _Stand:
    """Stands for an object of a class, or for what a function gives; the class for the class or function."""

    module = ""
    name = ""
    items = 0
    reader: _Reader

    def __new__(cls, *args: Any, **named: Any) -> Any:
        return cls.reader.called(cls, args)

    def __setstate__(self, state: object) -> None:
        """Tensors were once made by this."""
        if self.name.endswith("Tensor"):
            raise Refused("it makes tensors as no version of PyTorch in use does")

    def __setitem__(self, key: object, value: object) -> None:
        """Items of an OrderedDict."""
        self.items += 1

    def __len__(self) -> int:
        return self.items

    def append(self, value: object) -> None:
        """Items of a list of another kind."""
        self.items += 1


class _Storage(_Stand):
    """Stands for the values of tensors: how many, in how many bits each."""

    elements: int
    bits: int


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how deeply it is nested: Python's own end the process when a deep one is hashed."""

    depth: int


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Runs a pickle over stand-ins. The reader in C makes a table as long as the largest index in the file.

    Args:
        stream: The pickle, as far as the file has one.
        size: Bytes of the file.
        entries: Bytes of each storage; None where they stand behind the pickle.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO, size: int, entries: dict[str, int] | None = None) -> None:
        super().__init__(stream, fix_imports=False, encoding="utf-8")
        self.most = EXPANSION * size + _SLACK
        self.room, self.entries = size, entries
        self.stands: dict[tuple[str, str], type[_Stand]] = {}
        self.storages: dict[Any, _Storage] = {}
        self.copies = _LONGEST_PICKLE

    def tuple_made(self) -> None:
        """Puts one that knows its depth in the place of the tuple on top of the stack."""
        value = _Tuple(self.stack[-1])
        value.depth = 1 + max((part.depth for part in value if isinstance(part, _Tuple)), default=0)
        if value.depth > _DEEPEST:
            raise Refused(f"tuples of it are nested deeper than {_DEEPEST} levels")
        self.stack[-1] = value

    def find_class(self, module: str, name: str) -> type[_Stand]:
        """A stand-in: nothing is imported."""
        if (module, name) not in self.stands:
            members = {"module": module, "name": name, "reader": self}
            self.stands[module, name] = type("_Named", (_Stand,), members)
        return self.stands[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, which has to be as long in the file as the pickle says."""
        _, kind, key, _, elements, *views = pid
        if not (isinstance(kind, type) and issubclass(kind, _Stand)) or not _is_count(elements):
            raise Refused("a storage of it states no size")
        if any(view is not None for view in views):
            raise Refused("a storage of it is a part of another, as no version of PyTorch in use writes it")
        if key in self.storages:
            return self.storages[key]
        bits = _BITS.get(kind.name.removesuffix("Storage"), _WIDEST)
        stated = elements * bits // 8
        held = self.room if self.entries is None else self.entries.get(str(key).casefold(), 0)
        if stated > held:
            raise Refused(f"a storage of it states {stated:,} bytes, and has {held:,}")
        if self.entries is None:
            self.room -= stated
        storage = object.__new__(_Storage)
        storage.elements, storage.bits = elements, bits
        self.storages[key] = storage
        return storage

    def called(self, cls: type[_Stand], args: tuple[Any, ...]) -> Any:
        """What stands for the result of a call."""
        if cls.module == "torch._utils" and cls.name.startswith("_rebuild"):
            return self._rebuilt(cls, args)
        if cls.name == "_rebuild_from_type_v2":  # what a tensor with attributes is wrapped in
            function, _, inner, *_ = args
            return function(*inner)
        if cls.name == "encode" and args[1:] not in ((), ("latin1",), ("latin-1",)):
            raise Refused(f"it encodes text as {args[1]!r}")  # 'hex' doubles it, again and again
        makes = cls.name == "bytearray" or (cls.module.startswith("torch") and cls.name.endswith(_MAKERS))
        if makes and any(isinstance(part, int) and not isinstance(part, bool) for part in args):
            raise Refused(f"it calls {cls.name} with a number")
        if cls.module.partition(".")[0] in _COPIERS and not cls.name.startswith("_"):
            self._copied(args)
        return object.__new__(cls)

    def _copied(self, args: Sequence[Any]) -> None:
        """Copies of copies grow by themselves: all together may not be longer than a pickle."""
        self.copies -= sum(len(part) for part in args if hasattr(part, "__len__"))
        if self.copies < 0:
            raise Refused("it copies what it holds again and again")

    def _rebuilt(self, cls: type[_Stand], args: tuple[Any, ...]) -> Any:
        if cls.name in _WRAPPERS:
            return args[0]
        if cls.name not in _REBUILDS:
            raise Refused(f"it holds tensors of a kind that no method has ({cls.name})")
        storage, offset, shape, stride, *rest = args
        whole = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or not all(map(_is_count, whole)) or len(shape) != len(stride):
            raise Refused("a tensor of it states no sizes")
        typed = rest[2].name if cls.name == "_rebuild_tensor_v3" else ""
        found = re.search(r"\d+", typed)
        bits = max(8, int(found[0])) if found else _WIDEST if typed else storage.bits
        elements = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        if elements and last * bits > storage.elements * storage.bits:
            raise Refused(f"a tensor of it ({'x'.join(map(str, shape))}) is larger than its storage")
        self.most -= elements * bits // 8
        if self.most < 0:
            raise Refused("its tensors state to be many times as large as the file")
        return object.__new__(cls)


def _knowing_depth(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_tuple(reader: _Reader) -> None:
        load(reader)
        reader.tuple_made()

    return load_tuple


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Reader.dispatch[_code[0]] = _knowing_depth(_Reader.dispatch[_code[0]])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
