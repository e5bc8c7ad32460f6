"""Metrics against third parties' or slow, literal implementations, and at their edges."""

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upbench import metrics as M
from upbench.errors import UpbenchError
from upbench.testing import assert_close


def blobs(classes: int, height: int, width: int, seed: int, ignored: float = 0.0) -> Tensor:
    """Label maps with regions of some size rather than noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, classes, height // 6 + 2, width // 6 + 2, generator=generator)
    labels = torch.nn.functional.interpolate(noise, (height, width), mode="bilinear").argmax(1)[0]
    hole = torch.rand(height, width, generator=generator) < ignored
    return labels.masked_fill(hole, 255)


# ------------------------------------------------------------------------------------------ segmentation


@pytest.fixture(scope="module")
def iou_metric():
    """MMSegmentation's metric, quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = pytest.importorskip("mmseg.evaluation", reason="extra 'mmseg' is not installed")
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    return evaluation.IoUMetric


@pytest.mark.parametrize("classes", [2, 7, 19])
def test_miou_and_accuracy_equal_mmseg(iou_metric, classes: int):
    images = [(blobs(classes, 60, 45, 2 * i), blobs(classes, 60, 45, 2 * i + 1, 0.1)) for i in range(4)]
    # a class that nobody has, and one that is only predicted
    images = [
        (p.clamp(max=max(1, classes - 2)), t.clamp(max=max(1, classes - 3)).where(t != 255, t))
        for p, t in images
    ]
    theirs = iou_metric(iou_metrics=["mIoU"])
    theirs.dataset_meta = {"classes": [str(c) for c in range(classes)]}
    theirs.results = [theirs.intersect_and_union(p, t, classes, 255) for p, t in images]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it divides by zero for absent classes
        expected = theirs.compute_metrics(theirs.results)  # per cent, rounded to two digits
    confusion = sum(M.confusion_matrix(p, t, classes) for p, t in images)
    intersection, union = (sum(part) for part in list(zip(*theirs.results, strict=True))[:2])
    assert torch.equal(M.areas(confusion).float(), torch.stack([intersection, union]))
    assert 100 * M.mean_iou(M.areas(confusion)) == pytest.approx(expected["mIoU"], abs=0.00501)
    assert 100 * M.pixel_accuracy(confusion) == pytest.approx(expected["aAcc"], abs=0.00501)


def test_dataset_miou_is_not_the_mean_over_images():
    images = [
        (torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0])),
        (torch.tensor([1]), torch.tensor([1])),
    ]
    total = sum(M.confusion_matrix(p, t, 2) for p, t in images)
    per_image = [M.mean_iou(M.areas(M.confusion_matrix(p, t, 2))) for p, t in images]
    assert M.mean_iou(M.areas(total)) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert sum(per_image) / 2 == pytest.approx((3 / 8 + 1) / 2)


def test_absent_classes_are_left_out_and_predicted_ones_are_not():
    confusion = M.confusion_matrix(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]), 5)
    assert M.iou(M.areas(confusion))[:3].tolist() == [1.0, 0.5, 0.0]
    assert M.iou(M.areas(confusion))[3:].isnan().all()
    assert M.mean_iou(M.areas(confusion)) == pytest.approx(0.5)


def literal_boundary_areas(
    prediction: np.ndarray, target: np.ndarray, classes: int, ratio: float
) -> np.ndarray:
    """Cheng et al.'s procedure, class by class: a framed mask minus its erosion by a square."""
    radius = max(1, round(ratio * math.hypot(*target.shape)))
    prediction = np.where(target == 255, 255, prediction)

    def band(mask: np.ndarray) -> np.ndarray:
        framed = np.pad(mask, 1)
        found = np.zeros_like(mask)
        for i, j in np.argwhere(mask):
            rows = slice(max(0, i + 1 - radius), i + 2 + radius)
            found[i, j] = not framed[rows, max(0, j + 1 - radius) : j + 2 + radius].all()
        return found

    bands = [(band(target == c), band(prediction == c)) for c in range(classes)]
    return np.array([[(g & p).sum() for g, p in bands], [(g | p).sum() for g, p in bands]])


@settings(max_examples=20)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 50),
    classes=st.integers(1, 5),
    ratio=st.sampled_from([0.02, 0.05, 0.2, 1.0]),
    ignored=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 99),
)
def test_boundary_areas_equal_the_literal_procedure(height, width, classes, ratio, ignored, seed):
    prediction, target = (
        blobs(classes, height, width, seed),
        blobs(classes, height, width, seed + 100, ignored),
    )
    expected = literal_boundary_areas(prediction.numpy(), target.numpy(), classes, ratio)
    assert np.array_equal(M.boundary_areas(prediction, target, classes, ratio).numpy(), expected)


def test_boundary_areas_of_a_batch_are_the_sum():
    prediction, target = (torch.stack([blobs(4, 40, 40, s), blobs(4, 40, 40, s + 1)]) for s in (0, 10))
    each = [M.boundary_areas(p, t, 4) for p, t in zip(prediction, target, strict=True)]
    assert torch.equal(M.boundary_areas(prediction, target, 4), each[0] + each[1])


def test_boundary_iou_sees_what_iou_does_not():
    """A large object that is one pixel too wide keeps its IoU and loses its boundary."""
    target = torch.zeros(200, 200, dtype=torch.long)
    target[20:180, 20:180] = 1
    prediction = torch.zeros_like(target)
    prediction[16:184, 16:184] = 1
    mask = M.iou(M.areas(M.confusion_matrix(prediction, target, 2)))[1]
    band = M.iou(M.boundary_areas(prediction, target, 2))[1]
    assert mask > 0.9
    assert band < 0.25


@pytest.mark.parametrize("update", [M.confusion_matrix, M.boundary_areas])
@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 1]], [[0, 3]], "target label 3 is out of range"),
        ([[0, 5]], [[0, 1]], "predicted label 5 is out of range"),
        ([[0, 1]], [[0, -1]], "target label -1 is out of range"),
        ([[0, 255]], [[0, 1]], "predicted label 255 is out of range"),
        ([[0]], [[0, 1]], "same shape"),
        ([[0.0, 1.0]], [[0, 1]], "must be integers"),
    ],
)
def test_bad_labels_are_named(update, prediction, target, message):
    with pytest.raises(UpbenchError, match=message):
        update(torch.tensor(prediction), torch.tensor(target), 3)


def test_anything_may_be_predicted_where_the_target_is_ignored():
    confusion = M.confusion_matrix(torch.tensor([[0, 77]]), torch.tensor([[0, 255]]), 3)
    assert confusion.sum() == 1
    assert M.boundary_areas(torch.tensor([[0, 77]]), torch.tensor([[0, 255]]), 3)[1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("shape", [(8, 8), (0, 0)])
def test_segmentation_without_a_label_is_nan(shape):
    target = torch.full(shape, 255)
    prediction = torch.zeros_like(target)
    confusion = M.confusion_matrix(prediction, target, 3)
    assert math.isnan(M.pixel_accuracy(confusion))
    assert math.isnan(M.mean_iou(M.areas(confusion)))
    if target.numel():
        assert math.isnan(M.mean_iou(M.boundary_areas(prediction, target, 3)))


# ------------------------------------------------------------------------------------------------- depth


def literal_depth_metrics(p: np.ndarray, t: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """The definitions, pixel by pixel."""
    pairs = [
        (max(a, 1e-3), b) for a, b, v in zip(p.ravel(), t.ravel(), valid.ravel(), strict=True) if v and b > 0
    ]
    n = len(pairs)
    logs = [math.log(a) - math.log(b) for a, b in pairs]
    mean = sum(logs) / n
    return {
        **{f"delta{k}": sum(max(a / b, b / a) < 1.25**k for a, b in pairs) / n for k in (1, 2, 3)},
        "absrel": sum(abs(a - b) / b for a, b in pairs) / n,
        "rmse": math.sqrt(sum((a - b) ** 2 for a, b in pairs) / n),
        "log10": sum(abs(math.log10(a) - math.log10(b)) for a, b in pairs) / n,
        "silog": 100 * math.sqrt(sum(g * g for g in logs) / n - mean**2),
    }


@pytest.mark.parametrize("seed", range(3))
def test_depth_metrics_equal_their_definitions(seed: int):
    generator = torch.Generator().manual_seed(seed)
    target = 0.5 + 5 * torch.rand(23, 31, generator=generator)
    target[:2] = 0
    prediction = target * torch.exp(0.3 * torch.randn(23, 31, generator=generator)) + 0.1
    prediction[5] = -1.0  # counts as 1 mm
    valid = torch.rand(23, 31, generator=generator) < 0.8
    ours = M.depth_metrics(prediction, target, valid)
    literal = literal_depth_metrics(*(x.double().numpy() for x in (prediction, target)), valid.numpy())
    for name, value in literal.items():
        assert_close(ours[name], value, dtype=torch.float32, what=name)


def test_scale_does_not_change_silog_and_perfect_depth_has_no_error():
    target = 1 + torch.rand(20, 20)
    valid = torch.ones(20, 20, dtype=torch.bool)
    silog = M.depth_metrics(3 * target, target, valid)["silog"]
    assert_close(silog, 0.0, scale=100, dtype=torch.float32)  # 100 times a root of a difference
    perfect = M.depth_metrics(target, target, valid)
    assert perfect["delta1"] == 1
    assert perfect["rmse"] == perfect["absrel"] == perfect["log10"] == 0


def literal_discontinuities(depth: np.ndarray, valid: np.ndarray, jump: float, ratio: float) -> np.ndarray:
    height, width = depth.shape
    radius = max(1, round(ratio * math.hypot(height, width)))
    band = np.zeros_like(valid)
    for i in range(height):
        for j in range(width):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < height and m < width and valid[i, j] and valid[k, m]:
                    low, high = sorted((depth[i, j], depth[k, m]))
                    if high > (1 + jump) * low:
                        for a, b in ((i, j), (k, m)):
                            rows = slice(max(0, a - radius), a + radius + 1)
                            band[rows, max(0, b - radius) : b + radius + 1] = True
    return band


@pytest.mark.parametrize("ratio", [0.01, 0.05])
def test_discontinuities_equal_their_definition(ratio: float):
    depth = 1 + blobs(4, 36, 28, 3).float() * 0.3 + 0.001 * torch.arange(28)
    valid = torch.rand(36, 28) < 0.9
    expected = literal_discontinuities(depth.numpy(), valid.numpy(), 0.1, ratio)
    found = M.depth_discontinuities(depth, valid, 0.1, ratio)
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(found.numpy(), expected)


def test_a_slope_is_no_discontinuity_and_its_edge_error_is_nan():
    depth = torch.linspace(1, 3, 100).repeat(100, 1)
    values = M.depth_metrics(depth + 0.1, depth, torch.ones(100, 100, dtype=torch.bool))
    assert math.isnan(values["rmse_edge"])
    assert_close(values["rmse"], 0.1, scale=3, dtype=torch.float32)


def test_edge_rmse_sees_only_the_band():
    depth = torch.ones(100, 100)
    depth[:, 50:] = 2
    prediction = depth.clone()
    prediction[:, :20] += 1  # far from the step
    values = M.depth_metrics(prediction, depth, torch.ones(100, 100, dtype=torch.bool))
    assert values["rmse_edge"] == 0
    assert_close(values["rmse"], math.sqrt(0.2), dtype=torch.float32)


def test_depth_without_valid_pixels_is_nan_and_left_out_of_the_mean():
    depth = torch.ones(6, 6)
    empty = M.depth_metrics(depth, depth, torch.zeros(6, 6, dtype=torch.bool))
    assert all(math.isnan(value) for value in empty.values())
    full = M.depth_metrics(depth + 1, depth, torch.ones(6, 6, dtype=torch.bool))
    assert M.mean_over_images([empty, full])["rmse"] == 1
    assert M.mean_over_images([]) == {}


def test_bad_depth_is_named():
    depth, valid = torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(UpbenchError, match="same shape"):
        M.depth_metrics(depth[:3], depth, valid)
    with pytest.raises(UpbenchError, match=r"\[H, W\]"):
        M.depth_metrics(depth[None], depth[None], valid[None])
    with pytest.raises(UpbenchError, match="not finite"):
        M.depth_metrics(depth * math.nan, depth, valid)
    M.depth_metrics(
        torch.where(valid.triu(1), math.nan, depth), depth, ~valid.triu(1)
    )  # nan where nothing counts


# ----------------------------------------------------------------------------------------------- normals


@pytest.mark.parametrize("degrees", [0.0, 0.001, 1.0, 45.0, 90.0, 179.9])
def test_angle_of_rotated_vectors(degrees: float):
    angle = math.radians(degrees)
    target = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    prediction = 5 * torch.tensor([math.sin(angle), 0, math.cos(angle)], dtype=torch.float64).view(3, 1, 1)
    assert_close(M.angular_error(prediction, target).item(), degrees, scale=max(degrees, 1e-3))


def test_a_vector_of_no_length_is_at_a_right_angle():
    assert M.angular_error(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)).item() == 90


@pytest.mark.parametrize("seed", range(3))
def test_pooled_angles_equal_numpy(seed: int):
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(3):
        target = torch.nn.functional.normalize(torch.randn(3, 17, 19, generator=generator), dim=0)
        prediction = target + 0.3 * torch.randn(3, 17, 19, generator=generator)
        images.append((prediction, target, torch.rand(17, 19, generator=generator) < 0.7))
    images[0][1][:, :2] = 0  # no normal known
    cosines = []
    for p, t, v in images:
        keep = v.numpy() & (t.norm(dim=0) > 0).numpy()
        p, t = p.double().numpy()[:, keep], t.double().numpy()[:, keep]
        cosines.append((p * t).sum(0) / np.linalg.norm(p, axis=0) / np.linalg.norm(t, axis=0))
    degrees = np.degrees(np.arccos(np.clip(np.concatenate(cosines), -1, 1)))
    totals = M.angle_totals(*images[0])
    for image in images[1:]:
        totals = totals + M.angle_totals(*image)
    ours = M.angle_metrics(totals)
    assert_close(ours["mean"], float(degrees.mean()), dtype=torch.float32)
    assert ours["median"] == pytest.approx(
        np.median(degrees), abs=0.1
    )  # the gap between middle values is as large
    assert_close(ours["rmse"], float(np.sqrt((degrees**2).mean())), dtype=torch.float32)
    for threshold in M.ANGLE_THRESHOLDS:
        assert ours[M.angle_name(threshold)] == pytest.approx((degrees < threshold).mean()), threshold


def test_the_histogram_median_is_exact_to_its_bins():
    angles = torch.linspace(3, 100, 40001, dtype=torch.float64)
    rotated = torch.stack([angles.deg2rad().sin(), torch.zeros_like(angles), angles.deg2rad().cos()])[:, None]
    target = torch.tensor([0, 0, 1.0], dtype=torch.float64).view(3, 1, 1).expand_as(rotated)
    totals = M.angle_totals(rotated, target, torch.ones(1, 40001, dtype=torch.bool))
    assert M.angle_metrics(totals)["median"] == pytest.approx(51.5, abs=0.005)


@pytest.mark.parametrize("threshold", M.ANGLE_THRESHOLDS)
def test_shares_under_an_angle(threshold: float):
    angles = torch.tensor([[threshold - 0.01, threshold + 0.01, 100.0, 0.0]], dtype=torch.float64).deg2rad()
    prediction = torch.stack([angles.sin(), torch.zeros_like(angles), angles.cos()])
    target = torch.tensor([0.0, 0, 1], dtype=torch.float64).view(3, 1, 1).expand_as(prediction)
    totals = M.angle_totals(prediction, target, torch.ones(1, 4, dtype=torch.bool))
    assert M.angle_metrics(totals)[M.angle_name(threshold)] == 0.5


def test_normals_without_valid_pixels_are_nan():
    n = torch.ones(3, 4, 4)
    values = M.angle_metrics(M.angle_totals(n, n, torch.zeros(4, 4, dtype=torch.bool)))
    assert len(values) == 8
    assert all(math.isnan(value) for value in values.values())


def test_bad_normals_are_named():
    n, valid = torch.ones(3, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(UpbenchError, match="same shape"):
        M.angle_totals(n[:, :3], n, valid)
    with pytest.raises(UpbenchError, match="3, H, W"):
        M.angle_totals(n[:2], n[:2], valid)
    with pytest.raises(UpbenchError, match="not finite"):
        M.angle_totals(n * math.nan, n, valid)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_metrics_agree_on_a_gpu():
    prediction, target = blobs(5, 64, 64, 0), blobs(5, 64, 64, 1, 0.05)
    for update in (M.confusion_matrix, M.boundary_areas):
        assert torch.equal(update(prediction.cuda(), target.cuda(), 5).cpu(), update(prediction, target, 5))
    depth, valid = 1 + target.float(), target != 255
    assert M.depth_metrics((depth + 0.2).cuda(), depth.cuda(), valid.cuda()) == pytest.approx(
        M.depth_metrics(depth + 0.2, depth, valid), nan_ok=True
    )
    p, t = torch.randn(2, 3, 32, 32)
    here = M.angle_metrics(M.angle_totals(p, t, valid[:32, :32]))
    assert M.angle_metrics(M.angle_totals(p.cuda(), t.cuda(), valid[:32, :32].cuda())) == pytest.approx(here)
