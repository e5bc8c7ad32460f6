"""Upsampled views: classes first or dense is the same, and what is kept where."""

from __future__ import annotations

import math

import pytest
import torch
from probing import CHANNELS, CROPS, SIZE, Attending, Bent, Filming, Resized, probe, split, view
from torch import Tensor

from upbench.contracts.operator import FunctionOperator
from upbench.dense import spill as store
from upbench.dense.view import Upsampled
from upbench.errors import UpbenchError
from upbench.registry import find_method
from upbench.system.cache import cache_dir


@pytest.fixture
def full_disk(monkeypatch):
    """No file has room: what is not kept in memory is computed anew."""
    monkeypatch.setattr(store, "DISK_RESERVE", 1 << 62)


class TestUpsampled:
    @pytest.mark.parametrize("method", [Resized(), Attending(), Bent()], ids=lambda m: type(m).__name__)
    @pytest.mark.parametrize("crop", CROPS)
    def test_classes_first_equals_dense_first_in_value_and_gradient(self, method, crop):
        up = view(method)
        weight, bias = probe()
        expected = torch.einsum("kc,chw->khw", weight, up.dense(2)) + bias[:, None, None]
        if crop:
            expected = expected[:, crop[0], crop[1]]
        found = up.logits(2, weight, bias, crop)
        rtol = 2e-3 if isinstance(method, Bent) else 1e-5
        assert torch.allclose(found, expected, rtol=rtol, atol=rtol)
        upstream = torch.randn_like(expected)
        for got, wanted in zip(
            torch.autograd.grad(found, (weight, bias), upstream),
            torch.autograd.grad(expected, (weight, bias), upstream),
            strict=True,
        ):
            assert torch.allclose(got, wanted, rtol=rtol, atol=20 * rtol)

    @pytest.mark.parametrize(
        "name", ["nearest", "bilinear", "bicubic", "lanczos", "jbu", "guided_filter", "anyup", "raysup"]
    )
    def test_classes_first_equals_dense_first_for_built_in_methods(self, name):
        method = find_method(name).build(channels=CHANNELS)
        up = view(method, 1)
        weight, bias = probe()
        with torch.no_grad():
            expected = torch.einsum("kc,chw->khw", weight, up.dense(0)) + bias[:, None, None]
            assert torch.allclose(up.logits(0, weight, bias), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("method", [Resized(), Attending(), Bent()], ids=lambda m: type(m).__name__)
    def test_strips_without_gradient_equal_the_whole_with_it(self, method):
        up = view(method)
        weight, bias = probe()
        with torch.no_grad():
            strips = up.logits(1, weight, bias)
        assert torch.allclose(strips, up.logits(1, weight, bias), rtol=1e-5, atol=1e-5)

    def test_operators_are_made_once_and_kept_as_the_budget_allows(self, full_disk):
        weight, bias = probe()
        results, kept = [], []
        size = view(Attending())._view(0).nbytes()
        for budget in (100 * size, 5 * size // 2, 6 * size // 4, 0):
            method = Attending()
            up = view(method, budget=budget)
            for _ in range(3):
                results.append(torch.stack([up.logits(i, weight, bias) for i in range(5)]))
            kept.append((method.asked, up.nbytes()))
        assert kept == [(5, 5 * size), (5, 5 * size // 2), (3 + 3 * 2, 3 * size // 2), (15, 0)]
        exact, half = results[0], results[3:]
        assert torch.equal(results[1], exact)
        for result in half:
            assert torch.equal(result, half[0])  # whether it fits or not, it is rounded alike
        assert 0 < (half[0] - exact).abs().max() < 5e-3 * exact.abs().max()

    def test_dense_maps_are_kept_too(self, full_disk):
        weight, bias = probe()
        for budget, calls in ((10**9, 5), (0, 10)):
            method = Bent()
            up = view(method, budget=budget)
            for _ in range(2):
                for i in range(5):
                    up.logits(i, weight, bias)
            assert method.asked == calls

    @pytest.mark.parametrize("make", [Attending, Bent], ids=["operators", "maps"])
    def test_what_memory_has_no_room_for_goes_to_files_without_a_name(self, make, full_disk, monkeypatch):
        weight, bias = probe()
        crop = (slice(3, 11), slice(0, 24))
        without = view(make(), budget=0)
        expected = [without.logits(i, weight, bias, crop) for i in range(5)]
        monkeypatch.setattr(store, "DISK_RESERVE", 0)
        method = make()
        up = view(method, budget=0)
        for _ in range(2):
            for i in range(5):
                assert torch.equal(up.logits(i, weight, bias, crop), expected[i])
        assert method.asked == 5
        assert up.nbytes() == 0
        assert up._store.spilled > 0
        assert list(cache_dir("scratch").iterdir()) == []

    def test_a_disk_that_cannot_be_written_costs_time_only(self, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        method = Attending()
        up = view(method, budget=0)
        weight, bias = probe()
        for _ in range(2):
            up.logits(0, weight, bias)
        assert method.asked == 2
        assert list(cache_dir("scratch").iterdir()) == []

    def test_preparing_computes_what_will_be_kept_and_no_more(self, full_disk):
        size = view(Attending())._view(0).nbytes()
        for budget, asked in ((100 * size, 5), (3 * size // 2, 4), (0, 1)):
            method = Attending()
            up = view(method, budget=budget)
            up.prepare("test")
            assert method.asked == asked
            used = up.nbytes()
            up.prepare("again")
            assert up.nbytes() == used

    def test_values_too_large_for_float16_stay_in_float32(self):
        class Large(Bent):
            def forward(self, image, features, output_size):
                return 1e6 * super().forward(image, features, output_size)

        up = view(Large(), budget=5 * CHANNELS * SIZE * SIZE * 2)
        weight, bias = probe()
        expected = torch.einsum("kc,chw->khw", weight, up.dense(0)) + bias[:, None, None]
        assert torch.allclose(up.logits(0, weight, bias), expected, rtol=1e-4)

    def test_cameras_go_to_methods_that_use_them_when_asked(self):
        for camera, expected in (("dataset", 22.0), (None, None)):
            method = Filming()
            method.cameras = []
            view(method, camera=camera).logits(2, *probe())
            assert [c and c.intrinsics[0, 0].item() for c in method.cameras] == [expected]
        view(Bent(), camera="dataset").logits(2, *probe())  # does not take one and is not given one

    def test_the_guidance_image_is_normalised_as_the_method_declares(self):
        class Plain(Resized):
            mean, std = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)
            seen: list[Tensor] = []

            def operator(self, image, features, output_size, camera=None):
                self.seen.append(image)
                return super().operator(image, features, output_size, camera)

        up = view(Plain())
        up.logits(3, *probe())
        assert torch.allclose(Plain.seen[0][0], 2 * up.samples[3].image)

    def test_what_is_not_finite_is_an_error_that_names_the_culprit(self):
        class Broken(Bent):
            def forward(self, image, features, output_size):
                return super().forward(image, features, output_size) * math.nan

        class BrokenOperator(Resized):
            def operator(self, image, features, output_size, camera=None):
                return FunctionOperator(lambda v: self(image, v, output_size) * math.nan, output_size)

        Broken.name, BrokenOperator.name = "broken", "broken_operator"
        weight, bias = probe()
        with pytest.raises(
            UpbenchError, match="'broken' gives features that are not finite for image 'image1'"
        ):
            view(Broken()).logits(1, weight, bias)
        with pytest.raises(
            UpbenchError, match="'broken_operator': its operator gives values that are not finite"
        ):
            view(BrokenOperator()).logits(1, weight, bias)
        with pytest.raises(UpbenchError, match="training diverged"):
            view(Resized()).logits(1, weight * math.nan, bias)
        samples, features = split()
        features[3, 0, 0, 0] = math.inf
        with pytest.raises(UpbenchError, match="features of image 'image3' are not finite"):
            Upsampled(Resized(), samples, features, (SIZE, SIZE))

    def test_large_outputs_are_not_mistaken_for_infinite_ones(self):
        weight, bias = probe()
        assert view(Resized()).logits(0, weight * 1e37, bias).isfinite().all()

    def test_wrong_shapes_are_named(self):
        class Short(Bent):
            def forward(self, image, features, output_size):
                return super().forward(image, features, output_size)[:, :, 1:]

        Short.name = "short"
        with pytest.raises(UpbenchError, match=r"'short' returns \[1, 8, 23, 24\] where \[1, 8, 24, 24\]"):
            view(Short()).logits(0, *probe())
        samples, features = split()
        with pytest.raises(UpbenchError, match="4 images do not go with"):
            Upsampled(Resized(), samples[:4], features, (SIZE, SIZE))
        with pytest.raises(UpbenchError, match="unknown camera 'mine'"):
            Upsampled(Resized(), samples, features, (SIZE, SIZE), camera="mine")
