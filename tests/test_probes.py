"""Upsampled views (classes first or dense: the same), and probes trained on them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from upbench import store
from upbench.base import Camera, Upsampler
from upbench.cache import cache_dir
from upbench.datasets.base import Dataset, Sample
from upbench.errors import UpbenchError
from upbench.ops.operator import FunctionOperator
from upbench.ops.window import window_operator
from upbench.ops.windows import neighbourhood_table
from upbench.probes import (
    Conditioning,
    Evaluation,
    _batches,
    evaluate,
    grid,
    learning_rate_factor,
    train_probe,
    training_steps,
)
from upbench.protocol import PRESETS, ProbeConfig, find_preset
from upbench.registry import find_method, find_task
from upbench.upsampled import Upsampled

SIZE, CELLS, CHANNELS = 24, 6, 8


# Methods without a name are not registered: these stay in this file.


class Resized(Upsampler):
    """Linear, with the operator that its `forward` implies."""

    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size, mode="bicubic")


class Attending(Upsampler):
    """Two heads that average different channels with different weights, from an operator."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        operator = self.operator(image, features, output_size)
        heads = features.unflatten(1, (2, -1))
        zero = torch.zeros_like(heads[:, :1])
        each = [
            operator(torch.cat([heads[:, :1], zero], 1)),
            operator(torch.cat([zero, heads[:, 1:]], 1)),
        ]
        return torch.cat(each, 1)

    def operator(self, image, features, output_size, camera=None):
        self.asked += 1
        queries = F.interpolate(image, output_size).repeat(1, 2, 1, 1) * torch.arange(1, 7).view(1, 6, 1, 1)
        keys = F.adaptive_avg_pool2d(image, features.shape[-2:]).repeat(1, 2, 1, 1)
        tables = (neighbourhood_table(n, c, 3) for n, c in zip(output_size, features.shape[-2:], strict=True))
        return window_operator(queries, keys, *tables, heads=2)


class Bent(Upsampler):
    """Not linear: has no operator."""

    asked = 0

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        self.asked += 1
        return F.interpolate(features, output_size, mode="bilinear").tanh() * image.mean(1, keepdim=True)


class Filming(Bent):
    """Notes the camera that it is given."""

    uses_camera = True
    cameras: list[Camera | None] = []

    def forward(self, image, features, output_size, camera=None):
        self.cameras.append(camera)
        return super().forward(image, features, output_size)


class Toy(Dataset):
    """Four classes that can be told apart by the sign of the first two channels."""

    targets = frozenset({"label", "depth", "normal"})
    classes = ("a", "b", "c", "d")


def split(count: int = 5) -> tuple[list[Sample], Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count, CHANNELS, CELLS, CELLS, generator=generator)
    dense = F.interpolate(features, (SIZE, SIZE), mode="bicubic")
    samples = [
        Sample(
            name=f"image{i}",
            image=torch.rand(3, SIZE, SIZE, generator=generator),
            valid=torch.ones(SIZE, SIZE, dtype=torch.bool),
            label=(x[0] > 0).long() + 2 * (x[1] > 0).long(),
            depth=2 + x[0].tanh(),
            normal=F.normalize(x[:3], dim=0),
            camera=Camera(torch.tensor([[20.0 + i, 20.0, 12.0, 12.0]])),
        )
        for i, x in enumerate(dense)
    ]
    return samples, features


def view(method: Upsampler, count: int = 5, **options) -> Upsampled:
    samples, features = split(count)
    return Upsampled(method.eval(), samples, features, (SIZE, SIZE), **options)


def probe(outputs: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, CHANNELS, requires_grad=True), torch.randn(outputs, requires_grad=True)


CROPS = [None, (slice(0, 12), slice(12, 24)), (slice(5, 6), slice(0, 24)), (slice(3, 20), slice(7, 9))]


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
        with pytest.raises(UpbenchError, match="camera must be"):
            Upsampled(Resized(), samples, features, (SIZE, SIZE), camera="mine")


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 30.0])
def test_conditioning_is_folded_exactly(shrinkage):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    x = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(3, CHANNELS, 9, 9, generator=generator)) + 4
    conditioning = Conditioning.of(x, shrinkage)
    flat = x.transpose(0, 1).flatten(1)
    z = conditioning.scale @ (flat - conditioning.mean[:, None])
    weight, bias = torch.randn(5, CHANNELS), torch.randn(5)
    folded_weight, folded_bias = conditioning.fold(weight, bias)
    found = folded_weight @ flat + folded_bias[:, None]
    assert torch.allclose(found, weight @ z + bias[:, None], atol=1e-3)
    variances, axes = torch.linalg.eigh(torch.cov(flat, correction=0))
    expected = axes @ torch.diag(variances / (variances + shrinkage * variances.mean())) @ axes.T
    assert torch.allclose(torch.cov(z, correction=0), expected, atol=1e-3)
    assert torch.allclose(z.mean(1), torch.zeros(CHANNELS), atol=1e-4)


def test_a_constant_channel_does_no_harm():
    x = torch.randn(2, 3, 4, 4)
    x[:, 1] = 7
    for features in (x, torch.ones(2, 3, 4, 4)):
        weight, bias = Conditioning.of(features, 0).fold(torch.randn(2, 3), torch.zeros(2))
        assert weight.isfinite().all()
        assert bias.isfinite().all()


@given(height=st.integers(1, 60), width=st.integers(1, 60), share=st.floats(0.05, 1))
def test_the_grid_covers_every_pixel_with_crops_of_one_size(height, width, share):
    seen = torch.zeros(height, width, dtype=torch.long)
    cells = grid((height, width), share)
    for rows, cols in cells:
        seen[rows, cols] += 1
    assert (seen >= 1).all()
    assert len({(r.stop - r.start, c.stop - c.start) for r, c in cells}) == 1
    if share == 1:
        assert cells == [(slice(0, height), slice(0, width))]


def test_every_pixel_of_every_image_is_seen_equally_often():
    config = ProbeConfig(epochs=32, batch_size=4, crop=0.25)
    seen = torch.zeros(6, SIZE, SIZE, dtype=torch.long)
    batches = list(_batches(6, (SIZE, SIZE), config, torch.Generator().manual_seed(0)))
    assert len(batches) == training_steps(6, config) == 64
    for batch in batches:
        for image, (rows, cols) in batch:
            seen[image, rows, cols] += 1
    assert (seen == 2).all()


def test_learning_rate_rises_and_falls():
    config = ProbeConfig(warmup=0.1)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert learning_rate_factor(99, 100, ProbeConfig(schedule="constant")) == 1
    assert learning_rate_factor(0, 1, ProbeConfig(warmup=0)) == 1


class TestTraining:
    @pytest.mark.parametrize(
        ("name", "good"),
        [
            ("seg", lambda m: m["miou"] > 80),
            ("depth", lambda m: m["rmse"] < 0.6),
            ("normals", lambda m: m["mean"] < 12),
        ],
    )
    def test_a_probe_learns_what_is_linear_in_the_features(self, name, good):
        task, up = find_task(name)(), view(Resized())

        def after(epochs: int) -> Evaluation:
            config = ProbeConfig(epochs=epochs, batch_size=5, lr=0.05, crop=0.5, weight_decay=0.01)
            trained = train_probe(task, Toy(), up, up.samples, config, 0)
            return evaluate(task, Toy(), trained, up, up.samples)

        start, end = after(1), after(60)
        assert good(end.metrics)
        assert not good(start.metrics)
        assert end.names == [sample.name for sample in up.samples]
        assert len(end.per_image) == 5

    def test_the_seed_decides_and_nothing_else(self):
        task, up = find_task("seg")(), view(Attending())
        config = ProbeConfig(epochs=3, batch_size=2)
        first = train_probe(task, Toy(), up, up.samples, config, 7)
        torch.rand(9)  # the global generator plays no part
        second = train_probe(task, Toy(), up, up.samples, config, 7)
        other = train_probe(task, Toy(), up, up.samples, config, 8)
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.bias, second.bias)
        assert not torch.equal(first.weight, other.weight)

    def test_operator_and_dense_training_give_the_same_probe(self):
        class NoOperator(Attending):
            def operator(self, image, features, output_size, camera=None):
                return None

            def forward(self, image, features, output_size):
                return Attending().forward(image, features, output_size)

        task, config = find_task("seg")(), ProbeConfig(epochs=5, batch_size=2)
        probes = []
        for method in (Attending(), NoOperator()):
            up = view(method)
            probes.append(train_probe(task, Toy(), up, up.samples, config, 0))
        assert torch.allclose(probes[0].weight, probes[1].weight, atol=2e-2)

    def test_progress_is_told_of_every_step(self):
        class Counter:
            done = 0
            texts: list[str] = []

            def advance(self, steps: int = 1) -> None:
                self.done += steps

            def note(self, text: str) -> None:
                self.texts.append(text)

        task, up, config, counter = (
            find_task("seg")(),
            view(Resized()),
            ProbeConfig(epochs=2, batch_size=2),
            Counter(),
        )
        trained = train_probe(task, Toy(), up, up.samples, config, 0, counter)
        assert counter.done == trained.steps == training_steps(5, config) == 6
        evaluate(task, Toy(), trained, up, up.samples, counter)
        assert counter.done == 11
        assert counter.texts[0].startswith("loss ")

    def test_bad_ground_truth_is_named(self):
        task, up = find_task("seg")(), view(Resized())
        bare = [Sample("bare", s.image, s.valid) for s in up.samples]
        with pytest.raises(UpbenchError, match="'seg' needs label, which image 'bare' does not have"):
            train_probe(task, Toy(), up, bare, ProbeConfig(), 0)
        small = [Sample("small", s.image, s.valid, label=s.label[:9]) for s in up.samples]
        with pytest.raises(UpbenchError, match=r"'small' is \[9, 24\], the output \[24, 24\]"):
            train_probe(task, Toy(), up, small, ProbeConfig(), 0)
        with pytest.raises(UpbenchError, match="5 upsampled images do not go with 4 samples"):
            train_probe(task, Toy(), up, up.samples[:4], ProbeConfig(), 0)

    def test_divergence_is_an_error(self):
        class Exploding(type(find_task("seg")())):
            def loss(self, prediction, target, valid):
                return super().loss(prediction, target, valid) * math.inf

        up = view(Resized())
        with pytest.raises(UpbenchError, match="training diverged"):
            train_probe(Exploding(), Toy(), up, up.samples, ProbeConfig(), 0)


class TestProtocol:
    def test_presets(self):
        assert {name: (p.protocol, p.image_size, p.output_size) for name, p in PRESETS.items()} == {
            "quick": ("quick-v1", 224, 224),
            "standard": ("standard-v1", 448, 448),
        }

    def test_overrides_replace_single_settings(self):
        preset = find_preset("quick")
        changed = preset.probe_for({"epochs": 3})
        assert changed.epochs == 3
        assert changed.lr == preset.probe.lr
        assert preset.probe_for() == preset.probe

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"epoch": 3}, "unknown probe setting 'epoch'; did you mean 'epochs'"),
            ({"epochs": 0}, "epochs must be at least 1"),
            ({"crop": 0.0}, r"crop must be in \(0, 1\]"),
            ({"crop": 1.5}, r"crop must be in \(0, 1\]"),
            ({"warmup": -0.1}, r"warmup must be in \[0, 1\]"),
            ({"lr": 0.0}, "lr must be in"),
            ({"schedule": "cosin"}, "unknown probe schedule 'cosin'; did you mean 'cosine'"),
            ({"shrinkage": -1.0}, r"shrinkage must be in \[0, 1000\]"),
        ],
    )
    def test_bad_settings_are_named(self, settings, message):
        with pytest.raises(UpbenchError, match=message):
            find_preset("quick").probe_for(settings)

    def test_an_unknown_preset_is_named(self):
        with pytest.raises(UpbenchError, match="unknown preset 'quik'; did you mean 'quick'"):
            find_preset("quik")
