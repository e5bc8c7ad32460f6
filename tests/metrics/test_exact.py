"""Batches of images give what the plain code gives for one image at a time, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from metrics import reference
from torch import Tensor

from upbench.metrics import segmentation
from upbench.metrics.depth import DEPTH_METRICS, depth_discontinuities, depth_metrics, depth_values
from upbench.metrics.normals import angle_totals, angle_totals_of_images, angular_error

CASES = range(24)


@dataclass
class Maps:
    """Ground truth and answers for a batch, with pixels, images and classes missing now and then."""

    classes: int
    label: Tensor
    guess: Tensor
    depth: Tensor
    metres: Tensor
    normal: Tensor
    vectors: Tensor
    valid: Tensor

    def each(self) -> Iterator[int]:
        return iter(range(len(self.valid)))


@cache
def maps(seed: int) -> Maps:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def blobs(classes: int) -> Tensor:
        noise = torch.randn(batch, classes, height // 6 + 2, width // 6 + 2, generator=generator)
        return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").argmax(1)

    batch, height, width = 1 + seed % 4, *(int(n) for n in torch.randint(1, 70, (2,), generator=generator))
    classes = pick(1, 2, 5, 151, 254, 255, 300)
    label, guess = blobs(min(classes, 255)), blobs(classes)
    label = label.masked_fill(rand(batch, height, width) < pick(0, 0.02, 0.3), 255)
    guess = guess.masked_fill(guess == 255, 0)  # which the plain code takes for what is ignored
    label[:, : pick(0, 0, height)] = 255  # nothing is labelled
    valid = rand(batch, height, width) < pick(0.05, 0.9, 1.1)
    valid[0] &= pick(True, True, False)  # an empty image
    depth = 1 + pick(0.01, 0.3) * blobs(20) + 0.001 * rand(batch, height, width)
    depth[rand(batch, height, width) < 0.02] = 0
    metres = depth * torch.exp(0.3 * torch.randn(batch, height, width, generator=generator))
    metres[..., 0] = -1
    normal = torch.randn(batch, 3, height, width, generator=generator)
    vectors = pick(0, 1, 2) * normal + pick(0.01, 1) * torch.randn(normal.shape, generator=generator)
    normal.movedim(1, -1)[rand(batch, height, width) < 0.1] = 0
    vectors.movedim(1, -1)[rand(batch, height, width) < 0.02] = 0
    return Maps(classes, label, guess, depth, metres, normal, vectors, valid)


def same(found: float, expected: float) -> bool:
    return found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("ratio", [0.02, 0.2, 1.0])
def test_label_counts(seed: int, ratio: float) -> None:
    case = maps(seed)
    target = case.label.masked_fill(~case.valid, 255)
    counts = segmentation.label_counts(case.guess, target, case.classes, ratio)
    mask, band = (segmentation.areas_of_counts(c) for c in (counts.mask, counts.band))
    own = segmentation.mean_iou_of_images(mask)
    assert not counts.wrong
    for i in case.each():
        pair = case.guess[i], target[i], case.classes
        confusion = reference.confusion_matrix(*pair)
        assert torch.equal(segmentation.confusion_matrix(*pair), confusion)
        assert torch.equal(mask[i], reference.areas(confusion))
        assert torch.equal(band[i], reference.boundary_areas(*pair, ratio))
        assert torch.equal(segmentation.boundary_areas(*pair, ratio), band[i])
        assert same(float(own[i]), reference.mean_iou(mask[i]))
    assert torch.equal(
        segmentation.boundary_areas(case.guess, target, case.classes, ratio), band.sum(0)
    )  # of a batch


@pytest.mark.parametrize("seed", CASES)
def test_depth_values(seed: int) -> None:
    case = maps(seed)
    values, wrong = depth_values(case.metres, case.depth, case.valid)
    assert values.dtype == torch.float64
    assert not wrong
    edges = depth_discontinuities(case.depth, case.valid)
    for i in case.each():
        one = case.metres[i], case.depth[i], case.valid[i]
        expected = reference.depth_metrics(*one)
        assert torch.equal(edges[i], reference.depth_discontinuities(*one[1:]))
        public = depth_metrics(*one)
        for name, value in zip(DEPTH_METRICS, values[i].tolist(), strict=True):
            assert same(value, expected[name]), name
            assert same(public[name], expected[name]), name


@pytest.mark.parametrize("seed", CASES)
def test_angle_totals(seed: int) -> None:
    case = maps(seed)
    totals, wrong = angle_totals_of_images(case.vectors, case.normal, case.valid)
    assert not wrong
    expected = [reference.angle_totals(case.vectors[i], case.normal[i], case.valid[i]) for i in case.each()]
    assert torch.equal(totals.sums, torch.stack([one.sums for one in expected]))
    assert torch.equal(totals.under, torch.stack([one.under for one in expected]))
    assert torch.equal(totals.histogram, torch.stack([one.histogram for one in expected]).sum(0))
    whole, pooled = (
        module(case.vectors, case.normal, case.valid) for module in (angle_totals, reference.angle_totals)
    )
    for name in ("sums", "under", "histogram"):
        assert torch.equal(getattr(whole, name), getattr(pooled, name)), name
    for dtype in (torch.float32, torch.float64):
        pair = case.vectors.to(dtype), case.normal.to(dtype)
        assert torch.equal(angular_error(*pair), reference.angular_error(*pair))


def test_labels_of_any_type_that_holds_them() -> None:
    case = maps(4)
    target = case.label.clamp(max=120)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        for update in (segmentation.confusion_matrix, segmentation.boundary_areas):
            expected = update(case.guess.clamp(max=120), target, 300)
            assert torch.equal(update(case.guess.clamp(max=120).to(dtype), target.to(dtype), 300), expected)


def test_angles_keep_their_gradient() -> None:
    a = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    angular_error(a, torch.randn(3, 4, 4, dtype=torch.float64)).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
