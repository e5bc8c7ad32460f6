"""Numbers and plugins that are given in Python: what the command line's cases do not reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from upbench import Recipe, SquareCrop, Upsampler
from upbench.contracts.protocol import Output, Scoring
from upbench.contracts.sample import Camera
from upbench.errors import UpbenchError, shown, system_errors
from upbench.results.records import load_records
from upbench.run.loop import run
from upbench.system.environment import check_memory, check_sizes, memory_bytes
from upbench.train.config import TrainConfig, ViewConfig
from upbench.values import number, whole
from upbench.weights.load import load_method

NAN, INF = math.nan, math.inf


@pytest.mark.drill("numbers")
@pytest.mark.parametrize("value", [True, 1.0, "1", None, NAN, 0, 11, 10**5000, np.float64(1), [1]], ids=shown)
def test_whole_numbers(value):
    with pytest.raises(UpbenchError, match="n must be a whole number from 1 to 10, got "):
        whole("n", value, 1, 10)


@pytest.mark.drill("numbers")
@pytest.mark.parametrize(
    "value", [True, "1", None, NAN, INF, -INF, 0, -1e-300, 10.1, 10**400, [1], 1j], ids=shown
)
def test_numbers(value):
    with pytest.raises(UpbenchError, match="n must be a number above 0 and at most 10, got "):
        number("n", value, 0, 10, above=True)


@pytest.mark.drill("numbers")
def test_numbers_that_are_taken():
    assert whole("n", 1, 1, 1) == 1
    assert number("n", 0, 0) == 0
    assert number("n", -1e308) == -1e308
    with pytest.raises(UpbenchError, match="n must be a finite number, got nan"):
        number("n", NAN)


@pytest.mark.drill("cameras")
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [NAN, INF, 0.0, -5.0])
def test_cameras(place, value):
    values = torch.tensor([[50.0, 40.0, 20.0, 10.0], [50.0, 40.0, 20.0, 10.0]])
    values[1, place] = value
    if place >= 2 and math.isfinite(value):  # a centre may lie anywhere
        assert Camera(values).intrinsics is values
        return
    with pytest.raises(UpbenchError, match="camera intrinsics must be finite numbers with positive focal"):
        Camera(values)


@pytest.mark.drill("cameras")
def test_poses():
    pose = torch.eye(4)[None].clone()
    pose[0, 1, 3] = NAN
    with pytest.raises(UpbenchError, match="camera pose must have finite numbers"):
        Camera(torch.ones(1, 4), pose)


@pytest.mark.drill("sizes")
@pytest.mark.parametrize("channels", [-1, 0, 1.5, True, 10**18, "384"])
def test_channels(channels):
    with pytest.raises(UpbenchError, match="channels must be a whole number from 1 to 1000000"):
        load_method("bilinear", channels=channels)


@pytest.mark.drill("sizes")
def test_parameters_are_counted_before_they_are_made():
    class Square(Upsampler):
        made = 0

        def __init__(self, channels: int = 384) -> None:
            super().__init__(channels)
            self.weight = torch.nn.Parameter(torch.empty(channels, channels))
            Square.made += self.weight.device.type != "meta"

        def forward(self, image, features, output_size):
            return features

    from upbench.weights.load import load_resolved
    from upbench.weights.resolve import ResolvedWeights

    Square.name = "square"
    with pytest.raises(UpbenchError, match=r"method 'square' .*takes 4 TB of memory at least; there are"):
        load_resolved(Square, ResolvedWeights("none"), 1_000_000)
    assert Square.made == 0


@pytest.mark.drill("sizes")
def test_memory():
    there = memory_bytes()
    assert there is not None
    assert 2**28 < there < 2**50
    check_memory("all of it", there)
    with pytest.raises(UpbenchError, match=r"one byte more takes .* of memory at least; there are "):
        check_memory("one byte more", there + 1)
    from upbench.contracts.upsampler import Sizes

    check_sizes(Sizes(384, (448, 448), (32, 32), (448, 448)))
    with pytest.raises(
        UpbenchError, match=r"an output of 1 x 384 x 1000000 x 1000000 \(float32\) takes 1\.54 PB"
    ):
        check_sizes(Sizes(384, (448, 448), (32, 32), (1_000_000, 1_000_000)))


@pytest.mark.drill("protocols")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Recipe(lr=True), "probe lr must be a number"),
        (lambda: Recipe(lr=NAN), "probe lr must be a number"),
        (lambda: Recipe(epochs=True), "probe epochs must be a whole number"),
        (lambda: Recipe(epochs=10**400), "probe epochs must be a whole number"),
        (lambda: Recipe(schedule=["cosine"]), "unknown probe schedule"),
        (lambda: Recipe(decay_bias=1), "probe decay_bias must be true or false"),
        (lambda: Output(factor="2"), "output factor must be a number"),
        (lambda: Output(factor=INF), "output factor must be a number"),
        (lambda: Output("fixed", side=0), "output side must be a whole number from 1"),
        (lambda: Output("fixed", side=10**9), "output side must be a whole number"),
        (lambda: Scoring(other=1), "scoring 'other' must be true or false"),
        (lambda: Scoring(at=None), "unknown scoring 'at' 'None'"),
        (lambda: SquareCrop(10**7), "geometry: side must be a whole number"),
        (lambda: SquareCrop(224, filter=None), "unknown filter"),
        (lambda: ViewConfig(ratio=(0.5,)), "ratio must be two fractions"),
        (lambda: ViewConfig(ratio=(NAN, 1.0)), "ratio must be a number"),
        (lambda: ViewConfig(ratio=(0.6, 0.5)), "ratio must be two fractions"),
        (lambda: ViewConfig(view_seed=-1), "view-seed must be a whole number"),
        (lambda: TrainConfig("jafar", "photos", "a.safetensors"), "images must be a list, got 'photos'"),
        (lambda: TrainConfig("jafar", (), "a.safetensors"), "no folder of images"),
        (lambda: TrainConfig("jafar", ("p",), "a.safetensors", backbone="vit"), "backbone must be a list"),
        (lambda: TrainConfig("jafar", ("p",), "a.safetensors", micro_batch=True), "micro-batch must be"),
        (lambda: TrainConfig("jafar", ("p",), "a.safetensors", force=1), "force must be true or false"),
        (lambda: TrainConfig("jafar", ("p",), "a.safetensors", options={"a": {}}), "'a' must be a plain"),
    ],
)  # fmt: skip
def test_fields(make, words):
    with pytest.raises(UpbenchError, match=words):
        make()


@pytest.mark.drill("numbers")
def test_values_are_shown_in_one_short_line():
    loop: list[object] = []
    for _ in range(40):  # its repr has 2**40 parts
        loop = [loop, loop]
    for value in (loop, "x" * 10**6, 10**5000, {"a": "b\nc\x1b"}, object()):
        text = shown(value)
        assert len(text) <= 60
        assert text.isprintable()


@pytest.mark.drill("words")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (lambda path: path.read_text(), "there is no such file or folder"),
        (lambda path: path.parent.read_bytes(), "it is a folder, not a file"),
        (lambda path: path.with_name("x" * 300).touch(), "its name is too long for the file system"),
        (lambda path: type(path)(f"{path}\0").read_text(), "its name has a NUL character in it"),
        (lambda path: b"\xff".decode(), r"it is not text in UTF-8 \(byte 0\)"),
        (lambda path: "\ud800".encode(), "it has a character that cannot be written"),
        (lambda path: path.symlink_to(path) or path.read_text(), "its links lead in a circle"),
    ],
)  # fmt: skip
def test_what_the_system_refuses(tmp_path, what, reason):
    with (
        pytest.raises(UpbenchError, match=f"^cannot try '.*a': {reason}$") as caught,
        system_errors("try", tmp_path / "a"),
    ):
        what(tmp_path / "a")
    assert caught.value.__cause__ is not None


@pytest.mark.drill("words")
def test_faults_of_others_pass_through():
    with pytest.raises(ValueError, match="mine"), system_errors("try"):
        raise ValueError("mine")


class _Undecided(Upsampler):
    def forward(self, image, features, output_size):
        return torch.nn.functional.interpolate(features, output_size)


@pytest.mark.drill("plugins")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: True, "TypeError: skip_reason of 'undecided' must give text or None, got True"),
        (lambda: {"a": 1}["b"], "KeyError: 'b'"),
    ],
)
def test_a_skip_reason_that_fails_is_its_own_cell_s_business(toy, tmp_path, answer, reason):
    class Undecided(_Undecided):
        name = "undecided"

        @classmethod
        def skip_reason(cls, setting):
            return answer()

    records = run(toy.config(tmp_path, ["undecided", "toy_smooth"]))
    assert [(each.cell.method.name, each.status) for each in records] == [
        ("undecided", "failed"),
        ("toy_smooth", "ok"),
    ]
    assert records[0].reason == reason
    assert len(load_records(tmp_path)) == 2
