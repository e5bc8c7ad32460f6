"""Probes trained on upsampled views."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from probing import (
    CHANNELS,
    Attending,
    Bent,
    Gallery,
    Maps,
    Resized,
    protocol,
    samples,
    split,
    trained_on,
    view,
)
from torch import Tensor

from upbench.contracts.operator import FunctionOperator
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.sample import Framed
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate.conditioning import Conditioning, learning_rate_scale
from upbench.evaluate.probe import Head, Probe, TrainingSet, View, train_probes
from upbench.evaluate.schedule import training_steps
from upbench.evaluate.score import Evaluation, evaluate_probes
from upbench.features.images import SplitImages
from upbench.registry import find_task
from upbench.testing import assert_close


def train(up: UpsampledSplit, recipe: Recipe, seed: int = 0, task=None, progress=None) -> Probe:
    task = find_task("seg")() if task is None else task
    outputs = task.outputs(up.images.dataset, up.images.protocol)
    ((probe,),) = train_probes([Head(task, outputs, recipe)], trained_on(up), [seed], progress)
    return probe


def evaluate(
    task, probe: Probe, up: UpsampledSplit, rules: Protocol | None = None, progress=None
) -> Evaluation:
    rules = rules or up.images.protocol
    evaluator = task.evaluator(up.images.dataset, rules)
    (found,) = evaluate_probes(task, [probe], [evaluator], View(up.images, up), rules, progress)
    return found


class Counter:
    """A progress bar that counts."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps


class TestConditioning:
    @pytest.mark.parametrize("shrinkage", [0.0, 1.0, 30.0])
    def test_is_folded_exactly(self, shrinkage):
        generator = torch.Generator().manual_seed(1)
        mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
        x = torch.einsum("dc,nchw->ndhw", mixing, torch.randn(3, CHANNELS, 9, 9, generator=generator)) + 4
        conditioning = Conditioning.of(Maps(list(x)).moments(), shrinkage)
        flat = x.transpose(0, 1).flatten(1)
        z = conditioning.scale @ (flat - conditioning.mean[:, None])
        weight, bias = torch.randn(5, CHANNELS), torch.randn(5)
        folded_weight, folded_bias = conditioning.fold(weight, bias)
        found = folded_weight @ flat + folded_bias[:, None]
        assert_close(found, weight @ z + bias[:, None])
        variances, axes = torch.linalg.eigh(torch.cov(flat, correction=0))
        expected = axes @ torch.diag(variances / (variances + shrinkage * variances.mean())) @ axes.T
        assert_close(torch.cov(z, correction=0), expected, terms=1024)  # of an inverse
        assert_close(z.mean(1), torch.zeros(CHANNELS), scale=z)

    def test_several_probes_are_folded_at_once(self):
        conditioning = Conditioning.of(samples_moments(), 1.0)
        weight, bias = torch.randn(3, 5, CHANNELS), torch.randn(3, 5)
        folded = conditioning.fold(weight, bias)
        for s in range(3):
            one = conditioning.fold(weight[s], bias[s])
            assert_close(folded[0][s], one[0])
            assert_close(folded[1][s], one[1])

    def test_a_constant_channel_does_no_harm(self):
        x = torch.randn(2, 3, 4, 4)
        x[:, 1] = 7
        for features in (x, torch.ones(2, 3, 4, 4)):
            conditioning = Conditioning.of(Maps(list(features)).moments(), 0)
            weight, bias = conditioning.fold(torch.randn(2, 3), torch.zeros(2))
            assert weight.isfinite().all()
            assert bias.isfinite().all()

    def test_the_bias_learns_as_fast_as_all_weights_together(self):
        assert learning_rate_scale(384) == pytest.approx(math.sqrt(384))


def samples_moments():
    return Maps(list(samples()[1])).moments()


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
            recipe = Recipe(epochs=epochs, batch_size=5, lr=0.05, crop=0.5, weight_decay=0.01)
            return evaluate(task, train(up, recipe, task=task), up)

        start, end = after(1), after(60)
        assert good(end.metrics)
        assert not good(start.metrics)
        assert end.names == up.images.names
        assert len(end.per_image) == 5

    @pytest.mark.parametrize("init", ["small", "conv"])
    def test_the_seed_decides_and_nothing_else(self, init):
        up = view(Attending())
        recipe = Recipe(epochs=3, batch_size=2, init=init)
        first = train(up, recipe, 7)
        torch.rand(9)  # the global generator plays no part
        second = train(up, recipe, 7)
        other = train(up, recipe, 8)
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.bias, second.bias)
        assert first.loss == second.loss
        assert not torch.equal(first.weight, other.weight)

    def test_operator_and_dense_training_give_the_same_probe(self):
        class NoOperator(Attending):
            def operator(self, image, features, output_size, camera=None):
                return None

            def forward(self, image, features, output_size):
                return Attending().forward(image, features, output_size)

        recipe = Recipe(epochs=5, batch_size=2)
        one, two = (train(view(method), recipe) for method in (Attending(), NoOperator()))
        assert_close(one.weight, two.weight, terms=2**20)  # steps amplify roundings

    def test_the_loss_is_the_mean_of_the_last_tenth(self):
        class Recording(type(find_task("seg")())):
            seen: list[float] = []

            def loss(self, prediction, target, valid):
                value = super().loss(prediction, target, valid)
                self.seen.append(value.item())
                return value

        task = Recording()
        probe = train(view(Resized()), Recipe(epochs=20, batch_size=2), task=task)
        assert probe.steps == len(task.seen) == 60
        assert probe.loss == pytest.approx(sum(task.seen[-6:]) / 6)
        assert probe.loss < task.seen[0]

    def test_progress_is_told_of_every_step_and_every_image(self):
        task, up, recipe, counter = (
            find_task("seg")(),
            view(Resized()),
            Recipe(epochs=2, batch_size=2),
            Counter(),
        )
        probe = train(up, recipe, progress=counter)
        assert counter.done == probe.steps == training_steps(5, recipe) == 6
        evaluate(task, probe, up, progress=counter)
        assert counter.done == 11

    def test_flips_show_the_method_the_mirrored_image(self):
        """Features of the mirrored image, which are not the mirrored features."""
        task, up = find_task("seg")(), view(Attending())
        images, _ = split(5, mirrored=True)
        low = [torch.randn(CHANNELS, 6, 6) for _ in range(5)]
        mirrored = UpsampledSplit(MethodCall(Attending()), images, Maps(low))
        data = replace(trained_on(up), mirrored=lambda: View(images, mirrored))
        always = Recipe(epochs=2, batch_size=2, flip=1.0)
        ((probe,),) = train_probes([Head(task, 4, always)], data, [0])
        alone = replace(trained_on(mirrored), moments=up.low.moments)
        ((expected,),) = train_probes([Head(task, 4, replace(always, flip=0.0))], alone, [0])
        assert torch.equal(probe.weight, expected.weight)
        with pytest.raises(UpbenchError, match="a recipe with flips needs mirrored images"):
            train_probes([Head(task, 4, always)], trained_on(up), [0])

    def test_tokens_are_seen_everywhere(self):
        up = view(Resized(), 2)
        tokens = torch.randn(2, 3)
        probe = Probe(torch.randn(4, CHANNELS), torch.randn(4), 0.0, 1, torch.randn(4, 3))
        batch = up.batch([0, 1])
        found = probe.outputs(batch, tokens)
        expected = batch.project(probe.weight, probe.bias) + (tokens @ probe.token_weight.T)[:, :, None, None]
        assert_close(found, expected)


class TestErrors:
    def test_bad_ground_truth_is_named(self):
        found, features = samples()
        bare = SplitImages(
            Gallery([replace(found[0], name="bare", label=None), *found[1:]]), "train", protocol(), stride=4
        )
        up = UpsampledSplit(MethodCall(Resized()), bare, Maps(list(features)))
        with pytest.raises(UpbenchError, match=r"image '\w+' does not have label"):
            train(up, Recipe(batch_size=5))

        class Small(SplitImages):
            def _read(self, index: int, size=None) -> tuple[Framed, bool]:
                framed, usual = super()._read(index, size)
                return replace(framed, valid=framed.valid[:9], label=framed.label[:9]), usual

        images = Small(Gallery(found), "train", protocol(), stride=4)
        with pytest.raises(
            UpbenchError, match=r"ground truth of image 'image\d' is \[9, 24\], less than the out"
        ):
            train(UpsampledSplit(MethodCall(Resized()), images, Maps(list(features))), Recipe(crop=1.0))

    def test_views_that_do_not_go_together_are_refused(self):
        up, (four, _) = view(Resized()), split(4)
        data = TrainingSet(View(four, up), CHANNELS, up.low.moments)
        with pytest.raises(UpbenchError, match="5 upsampled images do not go with 4 samples"):
            train_probes([Head(find_task("seg")(), 4, Recipe())], data, [0])

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_divergence_is_an_error(self, value):
        class Exploding(type(find_task("seg")())):
            calls = 0

            def loss(self, prediction, target, valid):
                self.calls += 1
                return super().loss(prediction, target, valid) * (value if self.calls == 53 else 1)

        with pytest.raises(
            UpbenchError, match=f"loss of task 'seg' is {value} at step 52: training diverged"
        ):
            train(view(Resized()), Recipe(epochs=60, batch_size=2), task=Exploding())

    def test_features_that_are_not_finite_are_named(self):
        class BrokenOperator(Resized):
            def operator(self, image, features, output_size, camera=None):
                return FunctionOperator(lambda v: self(image, v, output_size) * math.nan, output_size)

        class BrokenLater(Bent):
            def forward(self, image, features, output_size):
                made = super().forward(image, features, output_size)
                return made * math.nan if self.asked == 4 else made

        BrokenOperator.name, BrokenLater.name = "broken_operator", "broken_later"
        with pytest.raises(
            UpbenchError, match="'broken_operator': its operator gives values that are not finite"
        ):
            train(view(BrokenOperator()), Recipe())
        with pytest.raises(UpbenchError, match="'broken_later' gives features that are not finite for image"):
            train(view(BrokenLater()), Recipe())
        up = view(Resized())
        data = trained_on(up)
        moments = up.low.moments()
        up.low.maps[3][0, 0, 0] = math.inf
        data = replace(data, moments=lambda: moments)
        with pytest.raises(UpbenchError, match="features of image 'image3' are not finite"):
            train_probes([Head(find_task("seg")(), 4, Recipe())], data, [0])

    def test_a_culprit_among_the_mirrored_is_named_too(self):
        up, (images, maps) = view(Resized()), split(5, mirrored=True)
        maps.maps[2] = torch.full_like(maps.maps[2], math.nan)
        mirrored = UpsampledSplit(MethodCall(Resized()), images, maps)
        data = replace(trained_on(up), mirrored=lambda: View(images, mirrored))
        with pytest.raises(UpbenchError, match="features of image 'image2' are not finite"):
            train_probes([Head(find_task("seg")(), 4, Recipe(epochs=8, flip=0.5))], data, [0, 1])


class TestTogether:
    """Heads of several tasks in one pass over the batches."""

    SHARED = Recipe(epochs=3, batch_size=2, crop=0.5, order="shared")

    def heads(self) -> list[Head]:
        """They differ in whatever may differ."""
        return [
            Head(find_task("seg")(), 4, self.SHARED),
            Head(find_task("depth")(), 256, replace(self.SHARED, lr=0.03, shrinkage=None, init="conv")),
            Head(find_task("normals")(), 3, replace(self.SHARED, schedule="constant", optimizer="adam")),
        ]

    @pytest.mark.parametrize("method", [Resized, Attending, Bent])
    def test_each_is_what_it_is_alone(self, method):
        data, heads = trained_on(view(method())), self.heads()
        together = train_probes(heads, data, [3, 5])
        assert [len(probes) for probes in together] == [2, 2, 2]
        for head, probes in zip(heads, together, strict=True):
            (alone,) = train_probes([head], data, [3, 5])
            for one, two in zip(probes, alone, strict=True):
                assert torch.equal(one.weight, two.weight)
                assert torch.equal(one.bias, two.bias)
                assert one.loss == two.loss

    def test_they_share_the_upsampling(self):
        class Counting(Attending):
            crops = 0

            def operator(self, image, features, output_size, camera=None):
                Counting.crops += 1
                return super().operator(image, features, output_size, camera)

        counts = []
        for heads in (self.heads()[:1], self.heads()):
            Counting.crops = 0
            train_probes(heads, trained_on(view(Counting(), budget=-1)), [0])
            counts.append(Counting.crops)
        assert counts[0] == counts[1] > 0

    @pytest.mark.parametrize(
        "change",
        [
            {"order": "own"},
            {"epochs": 4},
            {"batch_size": 3},
            {"crop": 1.0},
            {"flip": 0.5},
            {"cls_token": "unit"},
        ],
    )
    def test_heads_that_see_other_batches_are_refused(self, change):
        first, *others = self.heads()
        assert all(first.goes_with(other) for other in others)
        other = replace(first, recipe=replace(self.SHARED, **change))
        assert not other.goes_with(first) or not first.goes_with(other)
        with pytest.raises(UpbenchError, match="do not see the same batches"):
            train_probes([first, other], trained_on(view(Resized())), [0])

    def test_heads_with_orders_of_their_own_do_not_go_together(self):
        own = Head(find_task("seg")(), 4, Recipe())
        assert not own.goes_with(own)
        with pytest.raises(UpbenchError, match="do not see the same batches"):
            train_probes([own, own], trained_on(view(Resized())), [0])


def test_tasks_may_have_losses_of_other_kinds() -> None:
    """Whatever has a name, a target and a loss can be trained."""

    class Mean:
        name, target = "mean", "depth"

        def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
            return (prediction[:, 0] - target).square()[valid].mean()

    recipe = Recipe(epochs=200, batch_size=5, lr=0.05, crop=1.0, weight_decay=0.0)
    ((probe,),) = train_probes([Head(Mean(), 1, recipe)], trained_on(view(Resized())), [0])
    depth = torch.stack([s.depth for s in samples()[0]])
    assert probe.loss < 0.5 * float(depth.var())
