"""The built-in tasks: losses against their definitions, metrics through evaluators, edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from metrics import reference
from pretend_gpu import pretend_gpu
from torch import Tensor
from waiting import Waited, no_waiting

from upbench.contracts.protocol import Protocol, Scoring
from upbench.contracts.task import Truth
from upbench.errors import UpbenchError
from upbench.metrics.depth import ALIGNED_METRICS
from upbench.metrics.normals import IMAGE_METRICS
from upbench.protocols.geometry import Squash
from upbench.registry import find_task
from upbench.tasks.depth import (
    BINS,
    FLOOR,
    MAX_DEPTH,
    MIN_DEPTH,
    depth_from_bins,
    gradient_loss,
    scale_invariant_loss,
)
from upbench.tasks.normals import NormalsEvaluator
from upbench.tasks.seg import SegmentationEvaluator, highest
from upbench.testing import assert_close

SIZE = 24
NAMES = ("seg", "depth", "normals")
OF_PAPERS = {"seg": ("miou_named",), "depth": ALIGNED_METRICS, "normals": IMAGE_METRICS}


class ThreeClasses:
    """What tasks ask of a dataset."""

    name = "three"
    content = "images"
    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c")
    other_class: int | None = None


class Plain(Protocol):
    """Everything as by default."""

    geometry = Squash(SIZE, SIZE)


def truth(count: int = 1, seed: int = 0, valid: Tensor | None = None, size: int = SIZE) -> Truth:
    generator = torch.Generator().manual_seed(seed)
    if valid is None:
        valid = torch.ones(count, size, size, dtype=torch.bool)
    return Truth(
        names=tuple(f"image {i}" for i in range(count)),
        valid=valid,
        label=torch.randint(3, (count, size, size), generator=generator),
        depth=0.5 + 4 * torch.rand(count, size, size, generator=generator),
        normal=F.normalize(torch.randn(count, 3, size, size, generator=generator), dim=1),
    )


def rows(whole: Truth, which: slice) -> Truth:
    parts = (whole.valid, whole.label, whole.depth, whole.normal)
    return Truth(whole.names[which], *(part[which] for part in parts))


@pytest.fixture
def dataset() -> ThreeClasses:
    return ThreeClasses()


@pytest.fixture
def protocol() -> Plain:
    return Plain()


def noise(task, dataset, protocol, count: int = 1, seed: int = 0, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, task.outputs(dataset, protocol), size, size, generator=generator)


@pytest.mark.parametrize("name", NAMES)
class TestEveryTask:
    def test_primary_metric_is_computed_and_first(self, name, dataset, protocol):
        task = find_task(name)()
        evaluator = task.evaluator(dataset, protocol)
        own = evaluator.update(task.decode(noise(task, dataset, protocol)), truth())
        values = evaluator.compute()
        assert list(values) == [metric.name for metric in task.metrics]
        assert task.metrics[0].name == task.primary
        assert own.dtype == torch.float64
        assert own.tolist() == [values[task.primary]]  # one image: its own value is the split's

    def test_nothing_valid_is_nan_in_metrics_and_zero_in_the_loss(self, name, dataset, protocol):
        task = find_task(name)()
        nothing = truth(valid=torch.zeros(1, SIZE, SIZE, dtype=torch.bool))
        prediction = noise(task, dataset, protocol).requires_grad_()
        loss = task.loss(prediction, nothing.target(task.target), nothing.valid)
        loss.backward()
        assert 0 <= loss.item() < 2e-3
        assert prediction.grad is not None
        assert not prediction.grad.any()
        evaluator = task.evaluator(dataset, protocol)
        assert all(math.isnan(value) for value in evaluator.compute().values())
        assert math.isnan(evaluator.update(task.decode(prediction.detach()), nothing))
        assert all(math.isnan(value) for value in evaluator.compute().values())

    def test_masked_pixels_change_nothing(self, name, dataset, protocol):
        task = find_task(name)()
        valid = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
        valid[:, :9] = False
        whole = truth(valid=valid)
        target = whole.target(task.target)
        prediction = noise(task, dataset, protocol)
        other_target, other_prediction = target.clone(), prediction.clone()
        other_target[..., :9, :] = 1
        other_prediction[..., :9, :] = 3
        expected = task.loss(prediction, target, valid)
        assert_close(task.loss(other_prediction, other_target, valid), expected)
        scores = [
            task.evaluator(dataset, protocol).update(task.decode(p), whole)
            for p in (prediction, other_prediction)
        ]
        assert torch.equal(*scores)

    def test_a_step_downhill_lowers_the_loss(self, name, dataset, protocol):
        task = find_task(name)()
        one = truth()
        prediction = noise(task, dataset, protocol).requires_grad_()
        target = one.target(task.target)
        loss = task.loss(prediction, target, one.valid)
        (grad,) = torch.autograd.grad(loss, prediction)
        assert task.loss(prediction - 1e-2 * grad / grad.norm(), target, one.valid) < loss

    def test_is_skipped_without_its_ground_truth(self, name, dataset, protocol):
        assert find_task(name)().skip_reason(dataset, protocol) is None
        dataset.targets = frozenset()
        assert find_task(name).target in find_task(name)().skip_reason(dataset, protocol)

    @pytest.mark.parametrize("batch", [1, 2, 3, 4])
    def test_batches_play_no_part_and_numbers_are_those_of_the_plain_code(
        self, name, dataset, protocol, batch
    ):
        task = find_task(name)()
        whole = truth(7)
        generator = torch.Generator().manual_seed(1)
        whole = replace(whole, valid=torch.rand(whole.valid.shape, generator=generator) < 0.8)
        whole.valid[3] = False
        whole.label[:, :2] = 255
        whole.depth[:, 5:7] = torch.tensor([0.0, 12.0])[:, None]
        whole.normal[:, :, 4] = 0
        answers = task.decode(noise(task, dataset, protocol, 7))
        plain = {
            "seg": lambda: reference.SegmentationEvaluator(3),
            "depth": reference.DepthEvaluator,
            "normals": reference.NormalsEvaluator,
        }[name]()
        truths = zip(answers, whole.target(task.target), whole.valid, strict=True)
        expected = torch.tensor([plain.update(*one) for one in truths], dtype=torch.float64)
        evaluator = task.evaluator(dataset, protocol)
        parts = [slice(i, i + batch) for i in range(0, 7, batch)]
        own = torch.cat([evaluator.update(answers[part], rows(whole, part)) for part in parts])
        assert torch.equal(own.nan_to_num(-1), expected.nan_to_num(-1))
        assert own.isnan().tolist() == [i == 3 for i in range(7)]
        values = plain.compute()
        found = evaluator.compute()
        assert {metric: found[metric] for metric in values} == values
        assert set(found) - set(values) == set(OF_PAPERS[name]), "those are held to test_papers.py"
        alone = task.evaluator(dataset, protocol)
        alone.update(answers, whole)
        assert alone.compute() == found

    def test_decode_does_not_depend_on_strips(self, name, dataset, protocol):
        task = find_task(name)()
        prediction = noise(task, dataset, protocol, 2)
        strips = [task.decode(prediction[:, :, top : top + 5]) for top in range(0, SIZE, 5)]
        assert_close(torch.cat(strips, -2), task.decode(prediction))

    def test_nothing_waits_for_the_device(self, name, dataset, protocol, monkeypatch):
        """And the code for GPUs gives what that for CPUs does."""
        if torch.cuda.is_available() or not torch.backends.cuda.is_built():
            pytest.skip("needs a GPU that is not there")
        task = find_task(name)()
        whole = truth(3)
        whole.valid[1] = False
        prediction = noise(task, dataset, protocol, 3)
        here = task.evaluator(dataset, protocol)
        with torch.no_grad():
            loss = task.loss(prediction, whole.target(task.target), whole.valid)
            own = here.update(task.decode(prediction), whole)
            with pretend_gpu(monkeypatch):
                there = prediction.to("cuda")
                parts = (whole.valid, whole.label, whole.depth, whole.normal)
                moved = Truth(whole.names, *(part.to("cuda") for part in parts))
                evaluator = task.evaluator(dataset, protocol)
                with no_waiting(monkeypatch):
                    loss_there = task.loss(there, moved.target(task.target), moved.valid)
                    own_there = evaluator.update(task.decode(there), moved)
                    evaluator.update(task.decode(there), moved)
                assert_close(loss_there.cpu(), loss)
                assert torch.equal(own_there.cpu().isnan(), own.isnan())
                assert_close(own_there.cpu().nan_to_num(), own.nan_to_num())
                values = evaluator.compute()
        for key, value in here.compute().items():
            assert values[key] == pytest.approx(value)

    def test_waiting_would_be_found(self, name, monkeypatch):
        if torch.cuda.is_available() or not torch.backends.cuda.is_built():
            pytest.skip("needs a GPU that is not there")
        with pretend_gpu(monkeypatch):
            there = torch.ones(3).to("cuda")
            for step in (
                lambda: float(there.sum()),
                lambda: there[there > 0],
                lambda: there.nonzero(),
                lambda: torch.bincount(there.long()),
                lambda: there.cpu(),
                lambda: there.tolist(),
                lambda: there.new_tensor([1.0, 2.0]),
            ):
                with pytest.raises(Waited), no_waiting(monkeypatch):
                    step()


# ------------------------------------------------------------------------------------------ segmentation


def test_segmentation_loss_is_cross_entropy_over_labelled_pixels(dataset, protocol):
    task = find_task("seg")()
    one = truth()
    one.label[:, :4] = 255
    one.valid[:, :, :4] = False
    prediction = noise(task, dataset, protocol)
    expected = F.cross_entropy(prediction[:, :, 4:, 4:], one.label[:, 4:, 4:])
    assert_close(task.loss(prediction, one.label, one.valid), expected)
    assert torch.equal(
        task.loss(prediction, one.label, one.valid), reference.cross_entropy(prediction, one.label, one.valid)
    )


@pytest.mark.parametrize("wrong", [3, 254, -1])
def test_labels_out_of_range_are_never_counted(dataset, protocol, wrong):
    task = find_task("seg")()
    one = truth()
    one.label[0, 0, 0] = wrong
    prediction = noise(task, dataset, protocol)
    with pytest.raises((IndexError, RuntimeError)):
        task.loss(prediction, one.label, one.valid)
    answer = task.decode(prediction)
    for label, guess in ((one.label, answer), (answer, one.label)):
        evaluator = task.evaluator(dataset, protocol)
        evaluator.update(guess, replace(one, label=label))
        evaluator.update(answer, truth())  # and nothing makes up for it
        with pytest.raises(UpbenchError, match="out of range: 3 classes are numbered 0 to 2"):
            evaluator.compute()
    one.valid[0, 0, 0] = False
    evaluator = task.evaluator(dataset, protocol)
    evaluator.update(answer, one)
    assert evaluator.compute()["miou"] > 0  # where it does not count, it may be anything


def test_miou_is_of_the_split_and_not_the_mean_over_images(dataset, protocol):
    evaluator = find_task("seg")().evaluator(dataset, protocol)
    both = truth(2)
    both.label[1] = 0
    answer = both.label.clone()
    answer[1] = 1  # all of the second image is wrong
    assert evaluator.update(answer, both).tolist() == [100, 0]
    values = evaluator.compute()
    assert 0 < values["miou"] < 100
    assert values["miou"] != pytest.approx(50)


def test_perfect_prediction_is_perfect(dataset, protocol):
    one = truth()
    task = find_task("seg")()
    seg = task.evaluator(dataset, protocol)
    assert seg.update(task.decode(F.one_hot(one.label, 3).movedim(-1, 1).float()), one) == 100
    assert seg.compute() == {"miou": 100, "pixel_accuracy": 100, "boundary_iou": 100, "miou_named": 100}
    normals = find_task("normals")().evaluator(dataset, protocol)
    assert normals.update(7 * one.normal, one) < 1e-4
    assert normals.compute()["under_5"] == 100


def with_other(labels: str = "all", other: bool = True) -> Plain:
    protocol = Plain()
    protocol.labels, protocol.scoring = labels, Scoring(other=other)
    return protocol


def test_other_is_a_class_unless_the_protocol_says_otherwise(dataset):
    task = find_task("seg")()
    assert task.outputs(dataset, with_other("without_other")) == 3  # there is none
    dataset.other_class = 1
    assert task.outputs(dataset, with_other()) == 3
    assert task.outputs(dataset, with_other(other=False)) == 3
    assert task.outputs(dataset, with_other("without_other")) == 2
    assert task.outputs(dataset, with_other("without_other", other=False)) == 2
    one = truth(size=48)
    one.label[:] = torch.arange(48) // 16
    answer = one.label.clone()
    answer[..., 8:24] = 0  # a half of "other", too, is taken for class 0
    answer[..., 8:16] = 1
    scores = {}
    for other in (True, False):
        evaluator = task.evaluator(dataset, with_other(other=other))
        own = evaluator.update(answer, one)
        scores[other] = evaluator.compute()
        assert own.tolist() == [scores[other]["miou"]]
    assert scores[True]["pixel_accuracy"] == scores[False]["pixel_accuracy"] == pytest.approx(100 * 32 / 48)
    zero = 8 / 24  # 16 columns of truth, 16 of prediction, 8 of both: those on "other" are in the union
    assert scores[False]["miou"] == pytest.approx(100 * (zero + 1) / 2)
    assert scores[True]["miou"] == pytest.approx(100 * (zero + zero + 1) / 3)
    confusion = reference.confusion_matrix(answer, one.label, 3)
    ious = reference.iou(reference.areas(confusion))
    assert scores[False]["miou"] == 100 * float(ious[[0, 2]].mean())
    bands = reference.iou(reference.boundary_areas(answer, one.label, 3))
    assert scores[False]["boundary_iou"] == 100 * float(bands[[0, 2]].mean())


def test_an_image_of_nothing_but_other_has_no_value():
    evaluator = SegmentationEvaluator(3, left_out=1)
    one = truth()
    one.label[:] = 1
    assert evaluator.update(one.label, one).isnan().all()
    assert math.isnan(evaluator.compute()["miou"])
    assert evaluator.compute()["pixel_accuracy"] == 100


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 151, 40, 448), (1, 300, 3, 4)])
@pytest.mark.parametrize("levels", [2, 10_000])
def test_the_highest_class_is_the_first_of_equals(shape, levels):
    prediction = torch.randint(-levels, levels, shape).float()
    assert torch.equal(highest(prediction), prediction.argmax(1))
    assert torch.equal(highest(prediction.double()), prediction.argmax(1))
    assert highest(torch.full(shape, math.nan)).max() < shape[1]
    sideways = prediction.transpose(2, 3)  # not contiguous
    assert torch.equal(highest(sideways), sideways.argmax(1))


# ------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("shape", [(2, BINS, 7, 9), (1, 5, 1, 3), (1, BINS, 40, 33), (2, BINS, 70, 65)])
def test_bin_average_equals_the_formula_in_value_and_gradient(shape):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape[0], *shape[2:], dtype=torch.float64)
    fast, slow = depth_from_bins(z), reference.depth_from_bins(z)
    assert_close(fast, slow)
    (got,) = torch.autograd.grad(fast, z, upstream)
    (expected,) = torch.autograd.grad(slow, z, upstream)
    assert_close(got, expected)
    single = torch.autograd.grad(depth_from_bins(z.float()), z, upstream.float())[0]
    assert_close(single.float(), expected.float())


def test_bin_average_passes_gradcheck():
    z = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    z = (z + 0.05 * z.sign()).requires_grad_()  # away from the kink
    assert torch.autograd.gradcheck(depth_from_bins, z)


def test_depth_is_within_its_bins_whatever_the_probe_says():
    z = torch.cat([torch.full((1, BINS, 2, 2), -1e4), 1e4 * torch.randn(1, BINS, 2, 2)])
    metres = depth_from_bins(z)
    assert FLOOR > 0
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


@pytest.mark.parametrize("shape", [(2, 24, 32), (1, 1, 9), (3, 7, 1), (4, 33, 17)])
def test_gradient_loss_has_the_value_and_the_gradient_of_plain_steps(shape):
    log = torch.randn(shape)
    valid = torch.rand(shape) < 0.8
    log[~valid & (torch.rand(shape) < 0.5)] = math.nan  # where nothing counts
    found, expected = (log.clone().requires_grad_() for _ in range(2))
    value, plain = gradient_loss(found, valid), reference.gradient_loss(expected, valid)
    assert torch.equal(value, plain)
    (3 * value).backward()
    (3 * plain).backward()
    assert_close(found.grad, expected.grad)


def test_gradient_loss_ignores_a_factor_and_sees_a_blur():
    target = torch.ones(1, 32, 32)
    target[..., 16:] = 2
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    assert gradient_loss((3 * target).log() - target.log(), valid).item() < 1e-4
    blurred = F.avg_pool1d(F.pad(target, (4, 4), mode="replicate"), 9, 1)
    assert gradient_loss(blurred.log() - target.log(), valid) > 0.1


def test_depth_gradient_is_finite_where_the_loss_is_zero():
    log = torch.zeros(1, 8, 8, requires_grad=True)
    scale_invariant_loss(log, torch.ones(1, 8, 8, dtype=torch.bool)).backward()
    assert log.grad is not None
    assert log.grad.isfinite().all()


@pytest.mark.parametrize("name", ["depth", "normals"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_answers_that_are_not_finite_are_never_counted(name, value, dataset, protocol):
    task = find_task(name)()
    one = truth()
    answer = task.decode(noise(task, dataset, protocol))
    answer[..., 3, 4] = value
    evaluator = task.evaluator(dataset, protocol)
    evaluator.update(answer, one)
    evaluator.update(answer.nan_to_num(1), one)
    with pytest.raises(UpbenchError, match="not finite"):
        evaluator.compute()
    one.valid[:, 3, 4] = False
    evaluator = task.evaluator(dataset, protocol)
    evaluator.update(answer, one)
    assert all(math.isfinite(number) for number in evaluator.compute().values() if not math.isnan(number))


# ----------------------------------------------------------------------------------------------- normals


def test_normal_loss_is_the_mean_angle_and_ignores_length():
    one = truth()
    prediction = torch.randn(1, 3, SIZE, SIZE)
    task = find_task("normals")()
    cosine = F.cosine_similarity(prediction, one.normal, dim=1)
    expected = cosine.double().arccos().mean().item()
    for factor in (1, 9):
        loss = task.loss(factor * prediction, one.normal, one.valid)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_normal_gradient_is_finite_at_both_ends(sign):
    target = F.normalize(torch.randn(1, 3, 4, 4), dim=1)
    prediction = (sign * target).requires_grad_()
    find_task("normals")().loss(prediction, target, torch.ones(1, 4, 4, dtype=torch.bool)).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_evaluators_share_no_state():
    first, second = NormalsEvaluator(), NormalsEvaluator()
    first.update(torch.randn(1, 3, SIZE, SIZE), truth())
    assert all(math.isnan(value) for value in second.compute().values())
