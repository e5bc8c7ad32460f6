"""Upsampled views: classes first or dense is the same, and what is kept where."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from probing import (
    CHANNELS,
    CROPS,
    SIZE,
    Attending,
    Bent,
    Filming,
    Gallery,
    Maps,
    Resized,
    dense_logits,
    logits,
    probe,
    protocol,
    samples,
    split,
    view,
)
from torch import Tensor

from upbench.contracts.operator import FunctionOperator
from upbench.contracts.protocol import Output
from upbench.dense import spill
from upbench.dense import view as view_module
from upbench.dense.method import MethodCall
from upbench.dense.spill import size_of
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.features.images import SplitImages
from upbench.protocols.geometry import NativeAspect
from upbench.registry import find_method
from upbench.system.cache import cache_dir
from upbench.testing import assert_close

METHODS = [Resized, Attending, Bent]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has room: what is not kept in memory is computed anew."""
    set_reserve(monkeypatch, 1 << 62)


def set_reserve(monkeypatch: pytest.MonkeyPatch, reserve: int) -> None:
    for module in (spill, view_module):
        monkeypatch.setattr(module, "DISK_RESERVE", reserve)


def operator_size() -> int:
    return size_of(view(Attending())._view(0))


def ragged(method, **options) -> UpsampledSplit:
    """Frames of three sizes, of which the first is the smallest."""
    found, _ = samples(5)
    widths = (16, 24, 24, 20, 16)
    cut = [
        replace(s, image=s.image[..., :w], label=s.label[:, :w], depth=None, normal=None)
        for s, w in zip(found, widths, strict=True)
    ]
    images = SplitImages(Gallery(cut), "train", protocol(geometry=NativeAspect()), stride=4)
    maps = Maps([torch.randn(CHANNELS, 6, w // 4) for w in widths])
    return UpsampledSplit(MethodCall(method), images, maps, **options)


class TestProjections:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("crop", CROPS)
    @pytest.mark.parametrize("kept", [True, False])
    def test_classes_first_equals_dense_first_in_value_and_gradient(self, method, crop, kept, full_disk):
        up = view(method(), budget=10**9 if kept else -1)
        weight, bias = probe()
        expected = dense_logits(up, 2, weight, bias, crop)
        found = logits(up, 2, weight, bias, crop)
        assert up.keeps() == kept
        assert_close(found, expected)
        upstream = torch.randn_like(expected)
        for got, wanted in zip(
            torch.autograd.grad(found, (weight, bias), upstream),
            torch.autograd.grad(expected, (weight, bias), upstream),
            strict=True,
        ):
            assert_close(got, wanted, terms=SIZE * SIZE)

    @pytest.mark.parametrize(
        "name", ["nearest", "bilinear", "bicubic", "lanczos", "jbu", "guided_filter", "anyup", "raysup"]
    )
    def test_classes_first_equals_dense_first_for_built_in_methods(self, name):
        method = find_method(name).build(channels=CHANNELS)
        up = view(method, 1)
        weight, bias = probe()
        with torch.no_grad():
            assert_close(logits(up, 0, weight, bias), dense_logits(up, 0, weight, bias))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kept", [True, False])
    def test_a_batch_is_its_frames_one_by_one(self, method, kept, full_disk):
        """Each with a crop and a probe of its own; a frame may come twice."""
        up = view(method(), budget=10**9 if kept else -1)
        indices, crops = [3, 0, 3, 1], [(slice(2, 14), slice(r, r + 9)) for r in (0, 5, 3, 0)]
        weight = torch.randn(4, 5, CHANNELS, requires_grad=True)
        bias = torch.randn(4, 5, requires_grad=True)
        found = up.batch(indices, crops).project(weight, bias)
        each = [logits(up, i, weight[p], bias[p], crops[p]) for p, i in enumerate(indices)]
        assert_close(found, torch.stack(each))
        upstream = torch.randn_like(found)
        for got, wanted in zip(
            torch.autograd.grad(found, (weight, bias), upstream),
            torch.autograd.grad(torch.stack(each), (weight, bias), upstream),
            strict=True,
        ):
            assert_close(got, wanted)
        shared = torch.randn(5, CHANNELS, requires_grad=True)
        found = up.batch(indices, crops).project(shared)
        each = [logits(up, i, shared, None, crops[p]) for p, i in enumerate(indices)]
        assert_close(found, torch.stack(each))
        (got,), (wanted,) = (torch.autograd.grad(x.sum(), shared) for x in (found, torch.stack(each)))
        assert_close(got, wanted, terms=1024)

    @pytest.mark.parametrize("method", METHODS)
    def test_no_gradient_is_kept_where_none_is_asked_for(self, method):
        up = view(method())
        weight, bias = probe()
        with torch.no_grad():
            without = logits(up, 1, weight, bias)
        assert not without.requires_grad
        assert_close(without, logits(up, 1, weight, bias).detach())
        (got,) = torch.autograd.grad(logits(up, 1, weight.detach(), bias).sum(), bias)
        assert_close(got, torch.full((5,), float(SIZE * SIZE)))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kept", [True, False])
    def test_dense_batches_and_single_pixels(self, method, kept, full_disk):
        up = view(method(), budget=10**9 if kept else -1)
        batch = up.batch([4, 2])
        dense = batch.dense()
        assert_close(dense, torch.cat([up.batch([4]).dense(), up.batch([2]).dense()]))
        points = torch.randint(SIZE, (2, 7, 2))
        expected = torch.stack([dense[b][:, points[b, :, 0], points[b, :, 1]] for b in range(2)])
        assert_close(batch.at(points), expected)
        assert batch.at(points[:, :0]).shape == (2, CHANNELS, 0)
        with pytest.raises(UpbenchError, match="points lie outside of an output of 24x24"):
            batch.at(torch.tensor([[[0, 24]], [[0, 0]]]))
        with pytest.raises(UpbenchError, match=r"points must be \[2, P, 2\]"):
            batch.at(torch.zeros(1, 1, 2, dtype=torch.long))
        crop = (slice(3, 9), slice(0, 24))
        assert_close(batch.crop(crop).dense(), dense[:, :, 3:9])

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("kept", [True, False])
    def test_frames_of_several_sizes_are_padded_with_zeros(self, method, kept, full_disk):
        up = ragged(method(), budget=10**9 if kept else -1)
        weight, bias = probe()
        batch = up.batch([0, 1, 3])
        assert batch.sizes == [(24, 16), (24, 24), (24, 20)]
        found, dense = batch.project(weight, bias), batch.dense()
        assert found.shape == (3, 5, 24, 24)
        for place, (index, width) in enumerate(((0, 16), (1, 24), (3, 20))):
            assert_close(found[place, :, :, :width], dense_logits(up, index, weight, bias))
            assert not found[place, :, :, width:].any()
            assert not dense[place, :, :, width:].any()
        upstream = torch.randn_like(found)
        expected = sum(
            (dense_logits(up, i, weight, bias) * upstream[p, :, :, :w]).sum()
            for p, (i, w) in enumerate(((0, 16), (1, 24), (3, 20)))
        )
        for got, wanted in zip(
            torch.autograd.grad(found, (weight, bias), upstream),
            torch.autograd.grad(expected, (weight, bias)),
            strict=True,
        ):
            assert_close(got, wanted, terms=2048)

    def test_outputs_of_other_sizes_and_guidance_of_the_outputs_size(self):
        for output, guidance, seen in (
            (Output(factor=0.5), "image", (24, 24)),
            (Output("features", 3), "output", (18, 18)),
            (Output("fixed", side=31), "output", (31, 31)),
        ):

            class Looking(Bent):
                sizes: list[tuple[int, ...]] = []

                def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
                    self.sizes.append(tuple(image.shape[-2:]))
                    return super().forward(image, features, output_size)

            Looking.sizes = []
            images, maps = split(2, protocol(output=output))
            up = UpsampledSplit(MethodCall(Looking()), images, maps, guidance_size=guidance)
            expected = output.size((24, 24), (6, 6))
            assert up.output_size(0) == expected
            assert logits(up, 0, *probe()).shape[-2:] == expected
            assert set(Looking.sizes) == {seen}

    def test_large_outputs_are_left_as_they_are(self):
        weight, bias = probe()
        assert logits(view(Resized()), 0, weight * 1e37, bias).isfinite().all()


class TestKeeping:
    def test_operators_are_made_once_and_kept_as_the_budget_allows(self, full_disk):
        weight, bias = probe()
        results, kept = [], []
        size = operator_size()
        for budget in (100 * size, 5 * size // 2, 6 * size // 4, 0):
            method = Attending()
            up = view(method, budget=budget)
            for _ in range(3):
                results.append(torch.stack([logits(up, i, weight, bias) for i in range(5)]))
            kept.append((method.asked, up.nbytes()))
        assert kept == [(5, 5 * size), (5, 5 * size // 2), (1 + 15, 0), (1 + 15, 0)]
        exact, half = results[0], results[3]
        assert torch.equal(results[1], exact)
        assert torch.equal(results[4], half)
        assert 0 < (half - exact).abs().max() < 5e-3 * exact.abs().max()
        assert_close(
            torch.stack(results[6:]), exact.expand(6, *exact.shape)
        )  # computed each time: not rounded

    def test_what_does_not_fit_is_rounded_as_its_neighbours(self, full_disk):
        """The first frame is the smallest: it was thought that all would fit."""
        size = size_of(ragged(Attending())._view(0))
        budget = 5 * size // 2
        up = ragged(Attending(), budget=budget)
        weight, bias = probe()
        assert up.keeps()
        once = [logits(up, i, weight, bias) for i in range(5)]
        assert [i in up._store for i in range(5)] != [True] * 5
        assert up.nbytes() <= budget
        exact = [logits(ragged_again, i, weight, bias) for ragged_again in [roomy(up)] for i in range(5)]
        for i in range(5):
            assert torch.equal(logits(up, i, weight, bias), once[i])
            assert 0 < (once[i] - exact[i]).abs().max() < 5e-3 * exact[i].abs().max()

    def test_dense_maps_are_kept_too(self, full_disk):
        weight, bias = probe()
        for budget, calls in ((10**9, 5), (0, 1 + 10)):
            method = Bent()
            up = view(method, budget=budget)
            for _ in range(2):
                for i in range(5):
                    logits(up, i, weight, bias)
            assert method.asked == calls

    def test_a_large_split_is_said_to_be_computed_each_time(self, full_disk, capsys):
        method = Bent()
        up = view(method, budget=0, title="gallery/train")
        assert not up.keeps()
        up.prepare("upsampling")
        assert method.asked == 1
        assert "bent: operators of 5 images of gallery/train would take 0 GB" in capsys.readouterr().err

    def test_frames_that_are_computed_each_time_share_an_operator(self, full_disk):
        method = Attending()
        up = view(method, budget=0)
        assert not up.keeps()
        method.asked = 0
        crop = (slice(0, 12), slice(0, 12))
        other = (slice(12, 24), slice(0, 12))
        up.batch([0, 1, 2, 3], [crop, other, crop, other]).project(*probe())
        assert method.asked == 2  # one a crop

    @pytest.mark.parametrize("make", [Attending, Bent], ids=["operators", "maps"])
    def test_what_memory_has_no_room_for_goes_to_files_without_a_name(self, make, monkeypatch):
        weight, bias = probe()
        crop = (slice(3, 11), slice(0, 24))
        size = size_of(view(make())._view(0))
        without = view(make(), budget=5 * size // 2)  # in float16, in memory
        expected = [logits(without, i, weight, bias, crop) for i in range(5)]
        set_reserve(monkeypatch, 0)
        method = make()
        up = view(method, budget=0)
        for _ in range(2):
            for i in range(5):
                assert torch.equal(logits(up, i, weight, bias, crop), expected[i])
        assert method.asked == 5
        assert up.nbytes() == 0
        assert up._store.spilled == 5 * size // 2
        assert list(cache_dir("scratch").iterdir()) == []

    def test_a_disk_that_cannot_be_written_costs_time_only(self, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        set_reserve(monkeypatch, 0)
        method = Attending()
        up = view(method, budget=0)
        weight, bias = probe()
        assert up.keeps()
        method.asked = 0
        first, second = (logits(up, 0, weight, bias) for _ in range(2))
        assert torch.equal(first, second)
        assert method.asked == 2
        assert list(cache_dir("scratch").iterdir()) == []

    def test_preparing_computes_what_will_be_kept_and_no_more(self, full_disk):
        size = operator_size()
        for budget, asked in ((100 * size, 5), (5 * size // 2, 5), (0, 1)):
            method = Attending()
            up = view(method, budget=budget)
            up.prepare("test")
            assert method.asked == asked
            used = up.nbytes()
            up.prepare("again")
            assert (method.asked, up.nbytes()) == (asked, used)

    def test_values_too_large_for_float16_stay_in_float32(self, full_disk):
        class Large(Bent):
            def forward(self, image, features, output_size):
                return 1e6 * super().forward(image, features, output_size)

        up = view(Large(), budget=5 * CHANNELS * SIZE * SIZE * 2)
        weight, bias = probe()
        assert up.keeps()
        exact = view(Large())
        assert_close(logits(up, 0, weight, bias), dense_logits(exact, 0, weight, bias))


def roomy(up: UpsampledSplit) -> UpsampledSplit:
    """The same view with room for everything."""
    return UpsampledSplit(up.call, up.images, up.low)


class TestCalls:
    @pytest.mark.parametrize("kept", [True, False])
    def test_cameras_go_to_methods_that_use_them_when_asked(self, kept, full_disk):
        for camera, expected in (("dataset", [20.0, 22.0]), ("", [])):
            method = Filming()
            method.cameras = []
            view(method, camera=camera, budget=10**9 if kept else 0).batch([2]).project(*probe())
            given = [c.intrinsics[0, 0].item() for c in method.cameras if c is not None]
            assert given == expected  # of the first frame, which tells the size, and of the one asked for
        view(Bent(), camera="dataset").batch([2]).project(*probe())  # takes none and is given none

    def test_cameras_of_a_batch_are_joined(self, full_disk):
        method = Filming()
        up = view(method, camera="dataset", budget=0)
        up.keeps()
        method.cameras = []
        up.batch([4, 1, 3]).project(*probe())
        assert [c.intrinsics[:, 0].tolist() for c in method.cameras] == [[24.0, 21.0, 23.0]]

    def test_a_frame_without_a_camera_is_named(self):
        found, features = samples(2)
        bare = Gallery([found[0], replace(found[1], camera=None)])
        images = SplitImages(bare, "train", protocol(), stride=4)
        up = UpsampledSplit(view(Filming(), camera="dataset").call, images, Maps(list(features)))
        with pytest.raises(UpbenchError, match="image 'image1' has no camera"):
            up.batch([1])

    def test_the_guidance_image_is_normalised_as_the_method_declares(self):
        class Plain(Resized):
            mean, std = (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)
            seen: list[Tensor] = []

            def operator(self, image, features, output_size, camera=None):
                self.seen.append(image)
                return super().operator(image, features, output_size, camera)

        up = view(Plain())
        logits(up, 3, *probe())
        assert_close(Plain.seen[-1][0], 2 * up.images.framed(3).image)


class TestErrors:
    def test_what_is_not_finite_names_the_culprit(self):
        class Broken(Bent):
            def forward(self, image, features, output_size):
                return super().forward(image, features, output_size) * math.nan

        class BrokenOperator(Resized):
            def operator(self, image, features, output_size, camera=None):
                return FunctionOperator(lambda v: self(image, v, output_size) * math.nan, output_size)

        Broken.name, BrokenOperator.name = "broken", "broken_operator"
        with pytest.raises(
            UpbenchError, match="'broken' gives features that are not finite for image 'image0'"
        ):
            view(Broken()).batch([1])
        cause = view(BrokenOperator()).explain([3, 1])
        assert "'broken_operator': its operator gives values that are not finite for image 'image3'" in str(
            cause
        )
        assert view(Resized()).explain([0, 1, 2, 3, 4]) is None
        up = view(Resized())
        up.low.maps[3][0, 0, 0] = math.inf
        assert str(up.explain([0, 3])) == "features of image 'image3' are not finite"

    def test_maps_that_are_computed_each_time_are_explained_too(self, full_disk):
        class Sometimes(Bent):
            def forward(self, image, features, output_size):
                made = super().forward(image, features, output_size)
                return made * math.nan if self.broken else made

        Sometimes.name = "sometimes"
        method = Sometimes()
        method.broken = False
        up = view(method, budget=0)
        up.keeps()
        method.broken = True
        assert logits(up, 2, *probe()).isnan().all()
        with pytest.raises(
            UpbenchError, match="'sometimes' gives features that are not finite for image 'image2"
        ):
            up.explain([2])

    def test_wrong_shapes_are_named(self):
        class Short(Bent):
            def forward(self, image, features, output_size):
                return super().forward(image, features, output_size)[:, :, 1:]

        Short.name = "short"
        with pytest.raises(UpbenchError, match=r"'short' returns \[1, 8, 23, 24\] where \[1, 8, 24, 24\]"):
            logits(view(Short()), 0, *probe())
        images, maps = split()
        with pytest.raises(UpbenchError, match="5 images do not go with features of 4"):
            UpsampledSplit(MethodCall(Resized()), images, Maps(maps.maps[:4]))
        with pytest.raises(UpbenchError, match="2 frames do not go with 1 crops"):
            view(Resized()).batch([0, 1], [CROPS[1]])

    def test_the_low_resolution_map_may_have_any_grid(self):
        up = view(Resized())
        up.low.maps = [F.interpolate(m[None], (5, 7))[0] for m in up.low.maps]
        assert logits(up, 0, *probe()).shape == (5, SIZE, SIZE)
