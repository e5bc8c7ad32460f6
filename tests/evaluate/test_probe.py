"""Probes trained on upsampled views."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probing import CHANNELS, SIZE, Attending, Resized, Toy, view

from upbench.contracts.sample import Sample
from upbench.errors import UpbenchError
from upbench.evaluate.probe import (
    Conditioning,
    Evaluation,
    _batches,
    evaluate,
    grid,
    learning_rate_factor,
    train_probe,
    training_steps,
)
from upbench.evaluate.protocol import PRESETS, ProbeConfig, find_preset
from upbench.registry import find_task


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
