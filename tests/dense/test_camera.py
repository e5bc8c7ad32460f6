"""Which camera a row of a table is given, from the text to the method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from upbench.contracts.sample import Camera
from upbench.dense.camera import CameraChoice
from upbench.errors import UpbenchError
from upbench.results.cell import MethodSpec
from upbench.results.records import load_records, read_records
from upbench.results.report import render
from upbench.run.loop import run


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("identity", ""),
        ("dataset", "dataset"),
        ("dataset*1", "dataset"),
        (" dataset * 0.50 ", "dataset*0.5"),
        ("dataset at 0, -1.4,0", "dataset at 0,-1.4,0"),
        ("dataset*2 at 1,2,3", "dataset*2 at 1,2,3"),
    ],
)
def test_texts(text: str, canonical: str) -> None:
    choice = CameraChoice.parse(text)
    assert str(choice) == canonical
    assert CameraChoice.parse(canonical) == choice
    assert MethodSpec.parse({"name": "raysup", "camera": text}).camera == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datset*2", "unknown camera 'datset'; did you mean 'dataset'?"),
        ("identity*2", "only the camera 'dataset' can be changed"),
        ("dataset*x", "expected a number, got 'x'"),
        ("dataset*0", "positive factor"),
        ("dataset*inf", "expected a number"),
        ("dataset at 1,2", "three numbers"),
        ("dataset*", "unknown camera"),
    ],
)
def test_texts_that_stand_for_nothing(text: str, message: str) -> None:
    with pytest.raises(UpbenchError) as error:
        MethodSpec.parse({"name": "raysup", "camera": text})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_method_is_given() -> None:
    own = Camera(torch.tensor([[30.0, 40.0, 16.0, 12.0]]))
    assert CameraChoice.parse("").apply(own) is None
    assert CameraChoice.parse("dataset").apply(own).intrinsics.tolist() == [[30, 40, 16, 12]]
    wide = CameraChoice.parse("dataset*0.5").apply(own)
    assert wide.intrinsics.tolist() == [[15, 20, 16, 12]]
    assert wide.pose is None
    pose = torch.diag(torch.tensor([-1.0, 1, -1, 1]))[None]
    placed = CameraChoice.parse("dataset at 1,2,3").apply(Camera(own.intrinsics, pose))
    assert placed.pose[0, :3, 3].tolist() == [1, 2, 3]
    assert torch.equal(placed.pose[:, :3, :3], pose[:, :3, :3])
    assert pose[0, :3, 3].tolist() == [0, 0, 0], "the sample's own pose is left as it is"
    assert CameraChoice.parse("dataset at 1,2,3").apply(own).pose[0, :, 3].tolist() == [1, 2, 3, 1]


def test_identity_true_and_wrong_focal_lengths_are_rows_of_one_table(toy, tmp_path) -> None:
    methods = [{"name": "toy_posed", "camera": camera} for camera in ("identity", "dataset", "dataset*2")]
    records = run(toy.config(tmp_path, methods, tasks=["depth"], seeds=1))
    assert [record.status for record in records] == ["ok"] * 3
    assert len({record.metrics["val"]["absrel"][0] for record in records}) == 3
    assert [record.cell.method.title for record in records] == [
        "toy_posed",
        "toy_posed (camera=dataset)",
        "toy_posed (camera=dataset*2)",
    ]
    assert sorted(read_records([tmp_path])["camera"]) == ["", "dataset", "dataset*2"]
    table = render(load_records([tmp_path]))
    assert all(title in table for title in ("(camera=dataset)", r"(camera=dataset\*2)"))
    again = run(toy.config(tmp_path, methods, tasks=["depth"], seeds=1))
    assert [record.started for record in again] == [record.started for record in records], "nothing is redone"


def test_a_dataset_without_cameras_is_a_reason_to_skip(toy, tmp_path, monkeypatch) -> None:
    dataset = toy.find("toy", "dataset")
    read = dataset.read
    monkeypatch.setattr(dataset, "read", lambda *args: replace(read(*args), camera=None))
    methods = ["toy_posed", {"name": "toy_posed", "camera": "dataset"}]
    records = run(toy.config(tmp_path, methods, tasks=["depth"], seeds=1))
    assert [record.status for record in records] == ["ok", "skipped"]
    assert records[1].reason == "dataset 'toy' has no cameras"
