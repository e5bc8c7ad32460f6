"""Checkpoints that hold anything: a method or one line, by fuzzing, and what is a checkpoint still loads."""

from __future__ import annotations

import io
import json
import pickle
import re
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from drill.cases import weights as made
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.system.checkpoint.read import read_checkpoint
from upbench.weights.load import load_method

pytestmark = pytest.mark.drill("checkpoints: fuzzed")

BUDGETS = [150, pytest.param(4500, marks=pytest.mark.whole)]


class Fuzzed(Upsampler):
    """Reads its width from the checkpoint, as methods do, and trusts what it finds there."""

    def __init__(self, channels: int = 384, dim: int = 4, gain: float = 1.0) -> None:
        super().__init__(channels)
        self.gain = gain
        self.mix = nn.Conv2d(channels, dim, 1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        dim, channels = state["mix.weight"].shape[:2]
        return {"dim": dim, "channels": channels}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = next(iter(state.values()))
        return {name.removeprefix("up."): tensor + 0 * first.flatten()[0] for name, tensor in state.items()}


Fuzzed.name = "fuzzed"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Upsampler.registered, "fuzzed", Fuzzed)


def _state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in Fuzzed(channels=8, dim=6).state_dict().items()}


def _saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def _originals() -> dict[str, bytes]:
    state = _state()
    return {
        "zip.pth": _saved(state),
        "wrapped.ckpt": _saved(
            {"state_dict": OrderedDict(state), "epoch": 3, "lr": [0.1], "cfg": {"a": None}}
        ),
        "old.pt": _saved(state, _use_new_zipfile_serialization=False),
        "s.safetensors": save(state, {"method": "fuzzed", "options": json.dumps({"gain": 2.0})}),
    }


ORIGINALS = _originals()


def _load(path: Path) -> str:
    """What becomes of a file: "" for a method, else the line."""
    try:
        module = load_method("fuzzed", path, channels=8)
    except UpbenchError as error:
        text = str(error)
        assert "\n" not in text
        assert text.isprintable()
        assert path.name in text
        assert len(text) < 600 + len(str(path)), text
        return text
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in module.state_dict().values())
    return ""


@pytest.mark.parametrize("name", ORIGINALS)
def test_what_is_a_checkpoint_loads(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(ORIGINALS[name])
    assert _load(path) == ""


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(4, 4).t(), "b": torch.arange(3), "c": torch.zeros(0), "d": torch.zeros(())},
        {"a": nn.Parameter(torch.zeros(3)), "b": torch.zeros(8, dtype=torch.bfloat16)[2:5]},
        {"a": torch.zeros(5, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.zeros(5, dtype=torch.uint16), "b": torch.zeros(3, dtype=torch.float8_e4m3fn)},
        {"model": {"a": torch.zeros(1)}, "bytes": b"x" * 10, "array": bytearray(5), "set": {1, 2}, "z": 1j},
        OrderedDict(a=torch.zeros(1), rng=torch.get_rng_state(), size=torch.Size([1, 2])),
        {"device": torch.device("cuda", 0), "dtype": torch.float16, "a": torch.zeros(1).expand(9)},
    ],
    ids=["views", "parameters", "kinds", "new kinds", "plain values", "state of generators", "devices"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(content: dict[str, Any], zipped: bool, tmp_path: Path):
    path = tmp_path / "c.pth"
    try:
        path.write_bytes(_saved(content, _use_new_zipfile_serialization=zipped))
        expected = torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, KeyError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"torch itself does not: {error}")
    found = read_checkpoint(path)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(*(t if t.is_complex() else t.float() for t in (found[name], value)))
        assert type(found[name]) is type(value)


# -------------------- fuzzing --------------------


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "drop", "put", "number", "swap"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def _edited(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, at, more in changes:
        index = int(at * len(data))
        if kind == "flip" and index < len(data):
            data = data[:index] + bytes([data[index] ^ (1 << more[0] % 8)]) + data[index + 1 :]
        elif kind == "cut":
            data = data[:index]
        elif kind == "drop":
            data = data[:index] + data[index + len(more) :]
        elif kind == "put":
            data = data[:index] + more + data[index:]
        elif kind == "number":
            data = data[:index] + struct.pack("<I", 2**32 - 1 - more[0]) + data[index + 4 :]
        elif kind == "swap":
            data = data[index:] + data[:index]
    return data


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A checkpoint of which bytes were changed: anywhere, or in its pickle with the archive made anew."""
    name = draw(st.sampled_from(list(ORIGINALS)))
    data, changes = ORIGINALS[name], draw(edits)
    if zipfile.is_zipfile(io.BytesIO(data)) and draw(st.booleans()):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for info in old.infolist():
                content = old.read(info)
                edited = _edited(content, changes) if info.filename.endswith("data.pkl") else content
                new.writestr(info.filename, edited)
        return name, buffer.getvalue()
    if draw(st.booleans()):  # the head, where sizes and kinds stand
        half = min(len(data), 700)
        return name, _edited(data[:half], changes) + data[half:]
    return name, _edited(data, changes)


@pytest.mark.parametrize("examples", BUDGETS)
def test_whatever_a_file_holds(examples: int, tmp_path: Path):
    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(files())
    def try_one(file: tuple[str, bytes]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        _load(path)

    try_one()


_OPCODES = b"()]}\x8f.0\x85\x86\x87aetsubRN\x88\x89\x81Q2e"
_pieces = st.one_of(
    st.sampled_from([_OPCODES[i : i + 1] for i in range(len(_OPCODES))]),
    st.sampled_from(["a", "storage", "0", "cpu", "latin1", "mix.weight", "model"]).map(made.text),
    st.sampled_from([0, 1, -1, 4, 2**31, 2**62, 10**30]).map(made.number),
    st.sampled_from([(0, b"q"), (0, b"h"), (1, b"q"), (1, b"h")]).map(
        lambda pair: pair[1] + bytes([pair[0]])
    ),
    st.sampled_from(
        [
            *(
                ("torch._utils", f"_rebuild_{kind}")
                for kind in ("tensor_v2", "tensor_v3", "parameter", "qtensor")
            ),
            ("torch._tensor", "_rebuild_from_type_v2"),
            *(("torch", kind) for kind in ("FloatStorage", "FloatTensor", "Size", "device", "Tensor")),
            *(("collections", kind) for kind in ("OrderedDict", "Counter")),
            *(("builtins", kind) for kind in ("bytearray", "set", "complex", "eval", "print")),
            *(("_codecs", "encode"), ("os", "system"), ("torch.nn.parameter", "Parameter")),
        ]
    ).map(lambda pair: made.named(*pair)),
    st.just(made.storage(4)),
    st.just(made.tensor(made.storage(4), (4,), (1,))),
)


@pytest.mark.parametrize("examples", BUDGETS)
def test_whatever_a_pickle_does(examples: int, tmp_path: Path):
    """Programs of random opcodes, in the archive and in the old format."""
    path = tmp_path / "c.pth"

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(_pieces, max_size=30), st.booleans())
    def try_one(pieces: list[bytes], zipped: bool) -> None:
        content = b"\x80\x02" + b"".join(pieces) + b"."
        if zipped:
            made.archive(path, content, {"0": bytes(16)})
        else:
            path.write_bytes(made.legacy(content, ["0"], struct.pack("<q", 4) + bytes(16)))
        assert _load(path)

    try_one()


# -------------------- what they ask for is not given --------------------


@pytest.mark.parametrize("case", made.BOMBS, ids=lambda case: case.name)
def test_no_memory_is_given_to_what_asks_for_it(case: Any, tmp_path: Path):
    """The peak of the process hardly moves, whatever the file asks for."""
    case.given(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UpbenchError):
        read_checkpoint(tmp_path / made.FILE)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 300_000_000


# -------------------- what tensors are, and what metadata says --------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({3: torch.zeros(1)}, "'3' is no name of one"),
        ({"mix.weight": torch.zeros(6, 8, 1, 1, device="meta")}, "not dense"),
        ({"mix.weight": torch.zeros(6, 8).to_sparse()}, "not dense"),
        ({"mix.weight": torch.zeros(6, 8, 1, 1, dtype=torch.int64)}, "torch.int64"),
        ({"mix.weight": torch.zeros(6, 8, 1, 1, dtype=torch.complex64)}, "torch.complex64"),
        ({"mix.weight": torch.zeros(())}, "no sizes can be read"),
        ({"mix.weight": "text"}, "is a str"),
        ({"a\x1b[2J": torch.zeros(1)}, r"a\x1b[2J"),
    ],
)
def test_mappings_that_are_no_state(change: dict[Any, Any], text: str):
    with pytest.raises(UpbenchError) as caught:
        load_method("fuzzed", {**_state(), **change}, channels=8)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        "[]",
        "3",
        "{",
        "[" * 100_000,
        '{"dim": "x"}',
        '{"dim": -1}',
        '{"dim": 1e300}',
        '{"gain": {}, "dim": []}',
        "null",
    ],
)
def test_whatever_metadata_says(options: str, tmp_path: Path):
    path = tmp_path / "c.safetensors"
    save_file(_state(), path, {"method": "fuzzed", "options": options, "images_seen": "9" * 5000})
    _load(path)


def test_nothing_that_a_pickle_names_is_imported(tmp_path: Path):
    path = tmp_path / "c.pth"
    made.archive(path, made.mapping(a=made.called(made.named("antigravity", "fly"))), {})
    assert type(read_checkpoint(path)["a"]).__name__ == "Opaque"
    assert "antigravity" not in sys.modules


OWN = {"upbench/dense/spill.py", "upbench/cost/peakmemory.py"}
"""They read what this process wrote a moment ago, into a file or a pipe that is its own."""


def test_every_reader_of_files_is_weights_only(root: Path):
    found = set()
    for folder in ("upbench", "methods", "tasks"):
        for file in (root / folder).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                if re.search(r"(=|return) torch\.load\(", line) and "weights_only=True)" not in line:
                    found.add(file.relative_to(root).as_posix())
    assert found == OWN
