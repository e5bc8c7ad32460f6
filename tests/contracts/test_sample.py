"""Samples and cameras."""

from __future__ import annotations

import pytest
import torch

from upbench.contracts.sample import Camera, Framed, Sample
from upbench.contracts.task import Truth
from upbench.errors import UpbenchError


def test_a_sample_has_the_size_of_its_image() -> None:
    assert Sample("one", torch.zeros(3, 5, 7, dtype=torch.uint8)).size == (5, 7)


@pytest.mark.parametrize(
    ("intrinsics", "pose", "message"),
    [
        (torch.ones(4), None, r"camera intrinsics must be \[B, 4\], got \[4\]"),
        (torch.ones(2, 3), None, r"got \[2, 3\]"),
        (torch.ones(2, 4), torch.eye(4)[None], r"camera pose must be \[2, 4, 4\], got \[1, 4, 4\]"),
        (torch.ones(1, 4), torch.eye(3)[None], r"camera pose must be \[1, 4, 4\], got \[1, 3, 3\]"),
    ],
)
def test_cameras_of_another_shape_are_refused(intrinsics, pose, message: str) -> None:
    with pytest.raises(UpbenchError, match=message):
        Camera(intrinsics, pose)


def test_cameras_move_as_tensors_do() -> None:
    camera = Camera(torch.ones(2, 4), torch.eye(4).repeat(2, 1, 1))
    moved = camera.to(torch.float64)
    assert moved.intrinsics.dtype == moved.pose.dtype == torch.float64
    assert camera.intrinsics.dtype == torch.float32
    assert Camera(torch.ones(2, 4)).to("cpu").pose is None


def framed(name: str, height: int, width: int, **fields) -> Framed:
    valid = torch.ones(height, width, dtype=torch.bool)
    return Framed(name, torch.zeros(3, height, width), valid, **fields)


def test_truth_of_several_sizes_is_padded_with_what_counts_nowhere() -> None:
    label = [torch.randint(5, (3, 4)), torch.randint(5, (2, 6))]
    depth = [torch.rand(3, 4), torch.rand(2, 6)]
    normal = [torch.randn(3, 3, 4), torch.randn(3, 2, 6)]
    each = [
        framed(n, *x.shape, label=x, depth=y, normal=z)
        for n, x, y, z in zip("ab", label, depth, normal, strict=True)
    ]
    truth = Truth.stack(each)
    assert len(truth) == 2
    assert truth.names == ("a", "b")
    assert truth.valid.sum() == 24
    assert truth.label.shape == (2, 3, 6)
    for row, (h, w) in enumerate(((3, 4), (2, 6))):
        assert torch.equal(truth.label[row, :h, :w], label[row])
        assert torch.equal(truth.depth[row, :h, :w], depth[row])
        assert torch.equal(truth.normal[row, :, :h, :w], normal[row])
    assert (truth.label[~truth.valid] == 255).all()
    assert not truth.depth[~truth.valid].any()
    part = truth.rows(1, 2)
    assert part.names == ("b",)
    assert torch.equal(part.label, truth.label[1:])
    assert torch.equal(part.normal, truth.normal[1:])


def test_truth_that_some_images_lack_is_nobodys() -> None:
    truth = Truth.stack([framed("a", 2, 2, depth=torch.ones(2, 2)), framed("b", 2, 2)])
    assert truth.depth is None
    assert truth.rows(0, 1).depth is None
    for name in ("depth", "colour"):
        with pytest.raises(UpbenchError, match=f"image 'a' does not have {name}"):
            truth.target(name)
    assert truth.target("valid") is truth.valid
