"""Evaluation of probes: at the size of the output, of the frame, of the stored image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_probe import CLASSES, World
from probing import CHANNELS, Attending, Bent, Gallery, Resized, probe, protocol, split, view
from torch import Tensor

from upbench.contracts.protocol import Output, Recipe, Scoring
from upbench.contracts.sample import IGNORE
from upbench.contracts.task import Evaluator, Truth
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate import score as score_module
from upbench.evaluate.probe import Probe, View
from upbench.evaluate.score import Evaluation, evaluate_probes
from upbench.features.images import SplitImages
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Windows
from upbench.registry import find_task
from upbench.testing import assert_close


class Keeping(Evaluator):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.predictions: list[Tensor] = []
        self.truths: list[Truth] = []

    def update(self, prediction: Tensor, truth: Truth) -> Tensor:
        self.predictions.append(prediction.clone())
        self.truths.append(truth)
        return torch.arange(len(truth), dtype=torch.float32)

    def compute(self) -> dict[str, float]:
        return {"count": float(sum(len(truth) for truth in self.truths))}


class Plainly:
    """A task whose answers are the outputs themselves."""

    def decode(self, prediction: Tensor) -> Tensor:
        return prediction


def a_probe(outputs: int = CLASSES) -> Probe:
    weight, bias = (part.detach() for part in probe(outputs))
    return Probe(weight, bias, 0.0, 1)


def kept(world: World, one: Probe, task=None) -> tuple[Keeping, Evaluation]:
    """What an evaluator is given."""
    evaluator = Keeping()
    view = View(world.samples("val"), world.dense("val"))
    (found,) = evaluate_probes(task or Plainly(), [one], [evaluator], view, world.protocol)
    return evaluator, found


SIZES = [(24, 32), (28, 24), (41, 30)]


class TestAtOutput:
    @pytest.mark.parametrize("method", [Resized, Attending, Bent])
    @pytest.mark.parametrize("geometry", [SquareCrop(24), NativeAspect(), Windows(16, 10)])
    @pytest.mark.parametrize("strip", [1, 1 << 20])
    def test_answers_are_those_of_whole_frames(self, method, geometry, strip, monkeypatch):
        """However few rows are computed at a time."""
        monkeypatch.setattr(score_module, "_STRIP_BYTES", strip)
        world, one = World(protocol(geometry=geometry), method(), SIZES), a_probe()
        keeping, found = kept(world, one)
        images, dense = world.samples("val"), world.dense("val")
        assert found.names == images.names
        assert len(keeping.truths) == len(images)
        for index, (made, truth) in enumerate(zip(keeping.predictions, keeping.truths, strict=True)):
            assert_close(made, dense.batch([index]).project(one.weight, one.bias))
            framed = images.framed(index)
            assert truth.names == (images.names[index],)
            assert torch.equal(truth.label[0], framed.label)
            assert torch.equal(truth.valid[0], framed.valid)
        assert found.metrics == {"count": len(images)}
        assert found.per_image == [0.0] * len(images)

    def test_labels_are_at_the_outputs_size(self):
        for output, sampling in ((Output("features"), "floor"), (Output("image", 0.5), "centre")):
            world = World(
                protocol(geometry=SquareCrop(24), output=output, sampling=sampling), Resized(), SIZES
            )
            keeping, _ = kept(world, a_probe())
            assert {tuple(t.label.shape[1:]) for t in keeping.truths} == {output.size((24, 24), (6, 6))}
            assert {tuple(p.shape[2:]) for p in keeping.predictions} == {output.size((24, 24), (6, 6))}

    def test_all_probes_are_evaluated_in_one_pass(self):
        method = Attending()
        world = World(protocol(geometry=SquareCrop(24)), method, SIZES, budget=10**9)
        probes, evaluators = [a_probe() for _ in range(3)], [Keeping() for _ in range(3)]
        found = evaluate_probes(
            Plainly(), probes, evaluators, View(world.samples("val"), world.dense("val")), world.protocol
        )
        assert len(found) == 3
        for one, evaluator in zip(probes, evaluators, strict=True):
            alone, _ = kept(world, one)
            for a, b in zip(evaluator.predictions, alone.predictions, strict=True):
                assert torch.equal(a, b)

    def test_a_class_token_is_added(self):
        recipe = Recipe(cls_token="unit")
        world = World(protocol(geometry=SquareCrop(24), recipe=recipe), Resized(), SIZES)
        one = replace(a_probe(), token_weight=torch.randn(CLASSES, CHANNELS))
        store = world.features("val", token=True)
        evaluator = Keeping()
        tokens = lambda indices: torch.stack([store.token(i) for i in indices])  # noqa: E731
        view_of = View(world.samples("val"), world.dense("val"), tokens)
        evaluate_probes(Plainly(), [one], [evaluator], view_of, world.protocol)
        for index, made in enumerate(evaluator.predictions):
            plain = world.dense("val").batch([index]).project(one.weight, one.bias)
            assert_close(made, plain + (one.token_weight @ store.token(index))[:, None, None])


class TestAtFrame:
    @pytest.mark.parametrize("enlarge", ["logits", "labels"])
    def test_answers_are_enlarged_to_the_image_that_is_seen(self, enlarge):
        scoring = Scoring(at="frame", enlarge=enlarge)
        rules = protocol(
            geometry=SquareCrop(24), output=Output("features"), sampling="floor", scoring=scoring
        )
        world, one, task = World(rules, Attending(), SIZES), a_probe(), find_task("seg")()
        keeping, found = kept(world, one, task)
        dense, images = world.dense("val"), world.samples("val")
        for index, (made, truth) in enumerate(zip(keeping.predictions, keeping.truths, strict=True)):
            logits = dense.batch([index]).project(one.weight, one.bias)
            assert logits.shape[-2:] == (6, 6)
            if enlarge == "logits":
                expected = F.interpolate(logits, (24, 24), mode="bilinear").argmax(1)
            else:
                small = logits.argmax(1, keepdim=True).float()
                expected = F.interpolate(small, (24, 24), mode="nearest")[:, 0].long()
            assert torch.equal(made, expected)
            assert torch.equal(truth.label[0], images.framed(index, (24, 24)).label)
            assert truth.valid.shape == (1, 24, 24)
        assert found.names == images.names

    def test_windows_of_an_image_are_scored_one_by_one(self):
        rules = protocol(geometry=Windows(16, 10), output=Output("features"), scoring=Scoring(at="frame"))
        world = World(rules, Resized(), SIZES)
        keeping, found = kept(world, a_probe())
        assert found.names == world.samples("val").names
        assert len(found.per_image) == len(found.names) > 3
        assert all(p.shape[-2:] == (16, 16) for p in keeping.predictions)

    def test_frames_of_several_sizes(self):
        rules = protocol(geometry=NativeAspect(), output=Output("features"), scoring=Scoring(at="frame"))
        world = World(rules, Resized(), SIZES)
        keeping, _ = kept(world, a_probe())
        assert [tuple(p.shape[-2:]) for p in keeping.predictions] == [(24, 32), (28, 24), (40, 28)]


class TestAtStored:
    @pytest.mark.parametrize("enlarge", ["logits", "labels"])
    @pytest.mark.parametrize(
        "geometry",
        [SquareCrop(24), NativeAspect(), PaddedSquare(24), Windows(16, 10)],
        ids=lambda g: type(g).__name__,
    )
    @pytest.mark.parametrize("output", [Output(), Output("features")], ids=lambda o: o.of)
    def test_answers_are_those_of_the_assembled_image(self, geometry, output, enlarge):
        scoring = Scoring(at="stored", enlarge=enlarge)
        rules = protocol(geometry=geometry, output=output, scoring=scoring)
        world, one = World(rules, Attending(), SIZES), a_probe()
        keeping, found = kept(world, one)
        images, dense = world.samples("val"), world.dense("val")
        assert found.names == [f"photo {i}" for i in range(3)]
        for index, (made, truth) in enumerate(zip(keeping.predictions, keeping.truths, strict=True)):
            windows = images.windows(index)
            logits = [dense.batch([i]).project(one.weight, one.bias)[0] for i in windows]
            frames = [images.frame(i) for i in windows]
            whole, seen = geometry.assemble(frames, logits, nearest=enlarge == "labels")
            assert_close(made[0], whole)
            sample = world.dataset.samples[index]
            assert torch.equal(truth.label[0], sample.label.long())
            assert torch.equal(truth.valid[0], sample.valid & seen)
            if enlarge == "labels" and len(windows) == 1:
                values = {round(v, 4) for v in logits[0].flatten().tolist()}
                assert {
                    round(v, 4) for v in made[0][:, seen].flatten().tolist()
                } <= values  # none was averaged

    def test_what_no_frame_saw_is_not_scored(self):
        rules = protocol(geometry=SquareCrop(24), scoring=Scoring(at="stored"))
        world = World(rules, Resized(), [(24, 48)])
        keeping, _ = kept(world, a_probe())
        (truth,) = keeping.truths
        assert not truth.valid[..., :12].any()
        assert not truth.valid[..., 36:].any()
        assert torch.equal(truth.valid[0, :, 12:36], world.dataset.samples[0].valid[:, 12:36])

    def test_progress_is_told_of_every_frame(self):
        class Counter:
            done = 0

            def advance(self, steps: int = 1) -> None:
                self.done += steps

        rules = protocol(geometry=Windows(16, 10), scoring=Scoring(at="stored"))
        world, counter = World(rules, Resized(), SIZES), Counter()
        view_of = View(world.samples("val"), world.dense("val"))
        evaluate_probes(Plainly(), [a_probe()] * 2, [Keeping(), Keeping()], view_of, rules, counter)
        assert counter.done == 2 * len(view_of.images)


class TestOther:
    """A dataset's class "other": counted, left out of the mean, or ignored altogether."""

    def evaluated(self, **parameters) -> tuple[dict[str, float], Tensor, Tensor]:
        """Metrics, and the confusion that they are of: predictions and labels of all scored pixels."""
        rules = protocol(geometry=SquareCrop(24), **parameters)
        world, task = World(rules, Resized(), [(24, 24)] * 3), find_task("seg")()
        world.dataset.other_class = 0
        outputs = task.outputs(world.dataset, rules)
        torch.manual_seed(4)
        one = a_probe(outputs)
        keeping, _ = kept(world, one, task)
        view_of = View(world.samples("val"), world.dense("val"))
        (found,) = evaluate_probes(task, [one], [task.evaluator(world.dataset, rules)], view_of, rules)
        label = torch.cat([t.label.masked_fill(~t.valid, IGNORE).flatten() for t in keeping.truths])
        prediction = torch.cat([p.flatten() for p in keeping.predictions])
        return found.metrics, prediction[label != IGNORE], label[label != IGNORE]

    @staticmethod
    def iou(prediction: Tensor, label: Tensor, classes: range) -> float:
        each = []
        for k in classes:
            union = ((prediction == k) | (label == k)).sum()
            if union:
                each.append(float(((prediction == k) & (label == k)).sum() / union))
        return 100 * sum(each) / len(each)

    def test_counts_as_all_do(self):
        metrics, prediction, label = self.evaluated()
        assert set(label.tolist()) == {0, 1, 2, 3}
        assert metrics["miou"] == pytest.approx(self.iou(prediction, label, range(4)), rel=1e-5)
        assert metrics["pixel_accuracy"] == pytest.approx(
            100 * float((prediction == label).float().mean()), rel=1e-5
        )

    def test_is_left_out_of_the_mean(self):
        metrics, prediction, label = self.evaluated(scoring=Scoring(other=False))
        assert metrics["miou"] == pytest.approx(self.iou(prediction, label, range(1, 4)), rel=1e-5)
        assert metrics["miou"] != pytest.approx(self.evaluated()[0]["miou"], rel=1e-3)
        assert metrics["pixel_accuracy"] == self.evaluated()[0]["pixel_accuracy"]

    def test_is_ignored(self):
        metrics, prediction, label = self.evaluated(labels="without_other")
        assert set(label.tolist()) == {0, 1, 2}
        assert set(prediction.tolist()) <= {0, 1, 2}
        assert metrics["miou"] == pytest.approx(self.iou(prediction, label, range(3)), rel=1e-5)


class TestErrors:
    def test_the_culprit_is_named(self):
        class Broken(Bent):
            """Not finite from the eighth image on."""

            def forward(self, image, features, output_size):
                made = super().forward(image, features, output_size)
                return made * math.nan if self.asked >= 8 else made

        Broken.name = "broken"
        images, maps = split(40)
        up = UpsampledSplit(MethodCall(Broken()), images, maps, budget=-1)
        with pytest.raises(UpbenchError, match="'broken' gives features that are not finite for image"):
            self.evaluate(up, a_probe())
        up = view(Resized(), 40)
        up.low.maps[35][0, 0, 0] = math.nan
        with pytest.raises(UpbenchError, match="features of image 'image35' are not finite"):
            self.evaluate(up, a_probe())

    def test_a_probe_that_diverged_is_said_to_have(self):
        one = a_probe()
        for value in (math.nan, math.inf):
            broken = replace(one, weight=one.weight * value)
            with pytest.raises(
                UpbenchError, match="the probe's weights are not finite: its training diverged"
            ):
                self.evaluate(view(Resized()), broken)

    def test_large_outputs_are_not_mistaken_for_infinite_ones(self):
        one = a_probe()
        self.evaluate(view(Resized()), replace(one, weight=one.weight.sign() * 1e36))

    def test_missing_ground_truth_is_named(self):
        images, maps = split(2)
        bare = Gallery([replace(s, label=None) for s in images.dataset.samples])
        up = UpsampledSplit(MethodCall(Resized()), SplitImages(bare, "val", protocol(), stride=4), maps)
        with pytest.raises(UpbenchError, match="image 'image0' does not have label"):
            self.evaluate(up, a_probe(), find_task("seg")())

    def evaluate(self, up: UpsampledSplit, one: Probe, task=None) -> None:
        rules = up.images.protocol
        evaluator = Keeping() if task is None else task.evaluator(up.images.dataset, rules)
        evaluate_probes(task or Plainly(), [one], [evaluator], View(up.images, up), rules)


def test_a_task_trains_and_scores_every_seed_on_every_split() -> None:
    """`ProbeTask.evaluate`, through all parts: flips, a class token, windows, and a task's own settings."""
    recipe = Recipe(epochs=3, batch_size=2, flip=0.5, cls_token="unit", shrinkage=None, crop=1.0, init="conv")
    rules = protocol(
        geometry=Windows(16, 10),
        recipe=recipe,
        task_recipes=False,
        scoring=Scoring(at="stored", enlarge="labels"),
    )
    world = World(rules, Attending(), SIZES, seeds=(0, 1, 2))
    world.dataset.eval_splits = ("val", "test")
    scores = find_task("seg")().evaluate(world)
    assert set(scores.metrics) == {"val", "test"}
    for split_name in ("val", "test"):
        assert {len(values) for values in scores.metrics[split_name].values()} == {3}
        assert scores.per_image[split_name]["names"] == ["photo 0", "photo 1", "photo 2"]
        assert [len(values) for values in scores.per_image[split_name]["values"]] == [3, 3, 3]
    assert scores.metrics["val"] == scores.metrics["test"]  # the same images
    assert len(set(scores.metrics["val"]["miou"])) > 1
    assert World(rules, Attending(), SIZES).recipe({"epochs": 120}).epochs == 3


def test_tasks_that_see_the_same_batches_are_trained_together_and_score_as_alone() -> None:
    recipe = Recipe(epochs=3, batch_size=2, crop=0.5, order="shared", flip=0.5)
    rules = protocol(geometry=SquareCrop(24), recipe=recipe, task_recipes=False)
    tasks = [find_task("seg")(), find_task("depth")()]

    def scores(*together) -> list[dict[str, dict[str, list[float]]]]:
        world = World(rules, Attending(), SIZES, seeds=(0, 1))
        world.tasks = together
        found = [task.evaluate(world).metrics for task in (together or tasks)]
        assert len([key for key in world._held if key[0] == "method"]) == (len(together) > 1)
        return found

    assert scores(*tasks) == scores()
    assert scores(*tasks[::-1])[::-1] == scores()
