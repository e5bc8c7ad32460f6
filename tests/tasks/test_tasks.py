"""The built-in tasks: losses against their definitions, metrics through evaluators, edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import Sample
from upbench.errors import UpbenchError
from upbench.registry import find_task
from upbench.tasks import depth as depth_task
from upbench.tasks.depth import BINS, FLOOR, MAX_DEPTH, MIN_DEPTH, depth_from_bins, gradient_loss

SIZE = 24


class ThreeClasses(Dataset):
    """What tasks ask of a dataset."""

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c")


def sample(name: str = "one", seed: int = 0, valid: Tensor | None = None) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        name=name,
        image=torch.rand(3, SIZE, SIZE, generator=generator),
        valid=torch.ones(SIZE, SIZE, dtype=torch.bool) if valid is None else valid,
        label=torch.randint(3, (SIZE, SIZE), generator=generator),
        depth=0.5 + 4 * torch.rand(SIZE, SIZE, generator=generator),
        normal=F.normalize(torch.randn(3, SIZE, SIZE, generator=generator), dim=0),
    )


@pytest.fixture
def dataset() -> ThreeClasses:
    return ThreeClasses()


@pytest.mark.parametrize("name", ["seg", "depth", "normals"])
class TestEveryTask:
    def test_primary_metric_is_computed_and_first(self, name, dataset):
        task = find_task(name)()
        evaluator = task.evaluator(dataset)
        prediction = torch.randn(task.probe_channels(dataset), SIZE, SIZE)
        own = evaluator.update(prediction, sample())
        values = evaluator.compute()
        assert list(values) == [metric.name for metric in task.metrics]
        assert task.metrics[0].name == task.primary
        assert math.isfinite(own)
        assert own == pytest.approx(values[task.primary])  # one image: its own value is the split's

    def test_nothing_valid_is_nan_in_metrics_and_zero_in_the_loss(self, name, dataset):
        task = find_task(name)()
        nothing = sample(valid=torch.zeros(SIZE, SIZE, dtype=torch.bool))
        prediction = torch.randn(1, task.probe_channels(dataset), SIZE, SIZE, requires_grad=True)
        loss = task.loss(prediction, getattr(nothing, task.target)[None], nothing.valid[None])
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=2e-3)
        assert prediction.grad is not None
        assert not prediction.grad.any()
        evaluator = task.evaluator(dataset)
        assert all(math.isnan(value) for value in evaluator.compute().values())
        assert math.isnan(evaluator.update(prediction[0].detach(), nothing))
        assert math.isnan(evaluator.compute()[task.primary])

    def test_masked_pixels_change_nothing(self, name, dataset):
        task = find_task(name)()
        one = sample()
        valid = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
        valid[:, :9] = False
        target = getattr(one, task.target)[None]
        prediction = torch.randn(1, task.probe_channels(dataset), SIZE, SIZE)
        other_target, other_prediction = target.clone(), prediction.clone()
        other_target[..., :9, :] = 1
        other_prediction[..., :9, :] = 3
        expected = task.loss(prediction, target, valid)
        assert torch.allclose(task.loss(other_prediction, other_target, valid), expected, rtol=1e-5)
        scores = [
            task.evaluator(dataset).update(p[0], sample(valid=valid[0]))
            for p in (prediction, other_prediction)
        ]
        assert scores[0] == scores[1]

    def test_a_step_downhill_lowers_the_loss(self, name, dataset):
        task = find_task(name)()
        one = sample()
        prediction = torch.randn(1, task.probe_channels(dataset), SIZE, SIZE, requires_grad=True)
        target, valid = getattr(one, task.target)[None], one.valid[None]
        loss = task.loss(prediction, target, valid)
        (grad,) = torch.autograd.grad(loss, prediction)
        assert task.loss(prediction - 1e-2 * grad / grad.norm(), target, valid) < loss

    def test_is_skipped_without_its_ground_truth(self, name, dataset):
        dataset.name, dataset.targets = "bare", frozenset()
        assert find_task(name).target in find_task(name)().skip_reason(dataset)


def test_segmentation_loss_is_cross_entropy_over_labelled_pixels(dataset):
    task = find_task("seg")()
    one = sample()
    target = one.label.clone()
    target[:4] = 255
    valid = one.valid.clone()
    valid[:, :4] = False
    prediction = torch.randn(1, 3, SIZE, SIZE)
    expected = F.cross_entropy(prediction[0, :, 4:, 4:][None], target[4:, 4:][None])
    assert torch.allclose(task.loss(prediction, target[None], valid[None]), expected)


def test_labels_out_of_range_are_named(dataset):
    task = find_task("seg")()
    one = sample()
    one.label[0, 0] = 3
    prediction = torch.randn(3, SIZE, SIZE)
    with pytest.raises(UpbenchError, match="0 to 3 are out of range: the dataset names 3 classes"):
        task.loss(prediction[None], one.label[None], one.valid[None])
    with pytest.raises(UpbenchError, match="target label 3 is out of range"):
        task.evaluator(dataset).update(prediction, one)


def test_miou_is_of_the_split_and_not_the_mean_over_images(dataset):
    evaluator = find_task("seg")().evaluator(dataset)
    images = [sample(seed=s) for s in range(2)]
    images[1].label[:] = 0
    predictions = [F.one_hot(i.label, 3).permute(2, 0, 1).float() for i in images]
    predictions[1] = predictions[1][[1, 0, 2]]  # all of the second image is wrong
    per_image = [evaluator.update(p, i) for p, i in zip(predictions, images, strict=True)]
    values = evaluator.compute()
    assert per_image == [100, 0]
    assert 0 < values["miou"] < 100
    assert values["miou"] != pytest.approx(50)


def test_perfect_prediction_is_perfect(dataset):
    one = sample()
    seg = find_task("seg")().evaluator(dataset)
    assert seg.update(F.one_hot(one.label, 3).permute(2, 0, 1).float(), one) == 100
    assert seg.compute() == {"miou": 100, "pixel_accuracy": 100, "boundary_iou": 100}
    normals = find_task("normals")().evaluator(dataset)
    assert normals.update(7 * one.normal, one) == pytest.approx(0, abs=1e-4)
    assert normals.compute()["under_5"] == 100


# ------------------------------------------------------------------------------------------------- depth


def written_out(z: Tensor) -> Tensor:
    """Depth from bins as the formula has it."""
    edges = torch.linspace(MIN_DEPTH, MAX_DEPTH, z.shape[1] + 1, dtype=z.dtype)
    centres = (edges[1:] + edges[:-1]) / 2
    r = z.relu() + FLOOR
    return (r * centres[:, None, None]).sum(1) / r.sum(1)


@pytest.mark.parametrize("shape", [(2, BINS, 7, 9), (1, 5, 1, 3), (1, BINS, 40, 33)])
def test_bin_average_equals_the_formula_in_value_and_gradient(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    fast, slow = depth_from_bins(z), written_out(z)
    assert torch.allclose(fast, slow, rtol=1e-6)
    (got,) = torch.autograd.grad(fast, z, upstream)
    (expected,) = torch.autograd.grad(slow, z, upstream)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-12)


def test_bin_average_passes_gradcheck():
    z = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    z = (z + 0.05 * z.sign()).requires_grad_()  # away from the kink
    assert torch.autograd.gradcheck(depth_from_bins, z)


def test_depth_is_within_its_bins_whatever_the_probe_says():
    z = torch.cat([torch.full((1, BINS, 2, 2), -1e4), 1e4 * torch.randn(1, BINS, 2, 2)])
    metres = depth_from_bins(z)
    assert metres[0].eq(metres[0, 0, 0]).all()
    assert metres[0, 0, 0].item() == pytest.approx((MIN_DEPTH + MAX_DEPTH) / 2, rel=1e-5)
    assert ((metres > MIN_DEPTH) & (metres < MAX_DEPTH)).all()


def literal_depth_loss(predicted: Tensor, target: Tensor, valid: Tensor) -> float:
    """Both terms with loops."""
    g = predicted.log() - target.log()
    values = g[valid]
    sig = math.sqrt(float((values**2).mean() - 0.85 * values.mean() ** 2))
    gradient = 0.0
    for scale in range(4):
        rows, cols = range(0, g.shape[1], 2**scale), range(0, g.shape[2], 2**scale)
        total, count = 0.0, 0
        for b in range(len(g)):
            for i in rows:
                for j in cols:
                    count += int(valid[b, i, j])
                    for k, m in ((i + 2**scale, j), (i, j + 2**scale)):
                        if k < g.shape[1] and m < g.shape[2] and valid[b, i, j] and valid[b, k, m]:
                            total += abs(float(g[b, k, m] - g[b, i, j]))
        gradient += total / count
    return 10 * sig + 0.5 * gradient


def test_depth_loss_equals_its_definition():
    prediction = torch.randn(2, BINS, 11, 13)
    target = 0.5 + 12 * torch.rand(2, 11, 13)
    target[0, 3] = 0
    valid = torch.rand(2, 11, 13) < 0.9
    counted = valid & (target >= MIN_DEPTH) & (target <= MAX_DEPTH)
    assert 0 < counted.sum() < valid.sum()
    loss = find_task("depth")().loss(prediction, target, valid)
    assert loss.item() == pytest.approx(
        literal_depth_loss(depth_from_bins(prediction), target, counted), rel=1e-4
    )


def test_gradient_loss_ignores_a_factor_and_sees_a_blur():
    target = torch.ones(1, 32, 32)
    target[..., 16:] = 2
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    assert gradient_loss((3 * target).log() - target.log(), valid).item() == pytest.approx(0, abs=1e-4)
    blurred = F.avg_pool1d(F.pad(target, (4, 4), mode="replicate"), 9, 1)
    assert gradient_loss(blurred.log() - target.log(), valid) > 0.1


def test_depth_gradient_is_finite_where_the_loss_is_zero():
    log = torch.zeros(1, 8, 8, requires_grad=True)
    depth_task.scale_invariant_loss(log, torch.ones(1, 8, 8, dtype=torch.bool)).backward()
    assert log.grad is not None
    assert log.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------- normals


def test_normal_loss_is_the_mean_angle_and_ignores_length():
    one = sample()
    prediction = torch.randn(1, 3, SIZE, SIZE)
    task = find_task("normals")()
    cosine = F.cosine_similarity(prediction, one.normal[None], dim=1)
    expected = cosine.double().arccos().mean().item()
    loss = task.loss(prediction, one.normal[None], one.valid[None])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert task.loss(9 * prediction, one.normal[None], one.valid[None]).item() == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_normal_gradient_is_finite_at_both_ends(sign):
    target = F.normalize(torch.randn(1, 3, 4, 4), dim=1)
    prediction = (sign * target).requires_grad_()
    find_task("normals")().loss(prediction, target, torch.ones(1, 4, 4, dtype=torch.bool)).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
