"""Every registered task keeps the contract, tasks that train no probe can, and what breaks it is found."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from upbench.contracts.protocol import Recipe, Scoring
from upbench.contracts.sample import Sample
from upbench.contracts.task import Context, Metric, Scores, Task
from upbench.errors import UpbenchError
from upbench.protocols.geometry import Squash
from upbench.registry import find_method, find_task, plugins
from upbench.testing import (
    TASK_CHECKS,
    ContractError,
    NotApplicable,
    TaskCase,
    ToyContext,
    check_task,
    toy_case,
)
from upbench.testing.toys.context import ToyProtocol
from upbench.testing.toys.samples import TOYS, ToyDataset, toy_sample


@cache
def case(name: str) -> TaskCase:
    return toy_case(find_task(name))


@pytest.mark.parametrize("check", TASK_CHECKS)
@pytest.mark.parametrize("name", sorted(plugins("task")))
def test_contract(name: str, check: str) -> None:
    try:
        TASK_CHECKS[check](case(name))
    except NotApplicable as reason:
        pytest.skip(str(reason))


def named(cls: Any, name: str) -> Any:
    """After the class body, so that the registry does not see it."""
    cls.name = name
    return cls


class Sharpness(Task):
    """The example of `upbench.contracts.task`."""

    metrics = (Metric("gradient", "Gradient", higher_is_better=True),)
    primary = "gradient"

    def evaluate(self, context: Context) -> Scores:
        scores = Scores()
        for split in context.dataset.eval_splits:
            dense = context.dense(split)
            own = [dense.batch([i]).dense().diff(dim=-1).abs().mean() for i in range(len(dense))]
            scores.add(split, {"gradient": sum(own) / len(own)}, context.samples(split).names, own)
        return scores


class Motion(Task):
    """On sequences: how far features of a frame are from those of the first one."""

    metrics = (Metric("change", "Change", higher_is_better=False),)
    primary = "change"
    content = "video"

    def evaluate(self, context: Context) -> Scores:
        scores, dataset = Scores(), context.dataset
        for split in dataset.eval_splits:
            own = []
            for index in range(len(dataset.names(split))):
                frames = [dataset.frame(split, index, t) for t in range(dataset.length(split, index))]
                images = torch.stack([frame.image for frame in frames]).float() / 255
                dense = context.upsample(images, context.encode(images), frames[0].size)
                own.append((dense[1:] - dense[:1]).abs().mean())
            scores.add(split, {"change": torch.stack(own).mean()}, dataset.names(split), own)
        return scores


class Matching(Task):
    """On pairs: how often the nearest feature lies within a tenth of the extent."""

    metrics = (Metric("pck", "PCK", higher_is_better=True, unit="%"),)
    primary = "pck"
    content = "pairs"

    def evaluate(self, context: Context) -> Scores:
        scores, dataset = Scores(), context.dataset
        for split in dataset.eval_splits:
            own = []
            for index in range(len(dataset.names(split))):
                pair = dataset.pair(split, index)
                images = torch.stack([pair.source.image, pair.target.image]).float() / 255
                a, b = context.upsample(images, context.encode(images), pair.source.size)
                x, y = pair.source_points.long().unbind(1)
                nearest = torch.cdist(a[:, y, x].T, b.flatten(1).T).argmin(1)
                width = b.shape[-1]
                found = torch.stack([nearest % width, nearest // width], 1) + 0.5
                error = (found - pair.target_points).norm(dim=1)
                own.append(100 * (error < 0.1 * pair.extent).double().mean())
            scores.add(split, {"pck": torch.stack(own).mean()}, dataset.names(split), own)
        return scores


FREE = [named(Sharpness, "sharpness"), named(Motion, "motion"), named(Matching, "matching")]


@pytest.mark.parametrize("task", FREE)
def test_tasks_that_train_no_probe_keep_the_contract(task: type[Task]) -> None:
    outcome = check_task(task)
    everyone = ["declarations", "skip reason", "settings", "evaluation", "repeatable"]
    assert [name for name, result in outcome.items() if result == "ok"] == everyone
    assert {outcome[name] for name in set(outcome) - set(everyone)} == {"skipped: trains no probe"}


def test_toys_stay_out_of_the_registry() -> None:
    assert not {"toy", "toy-video", "toy-pairs"} & {*plugins("dataset"), *plugins("method"), *plugins("task")}
    assert not {task.name for task in FREE} & set(plugins("task"))


@pytest.mark.parametrize("content", TOYS)
def test_toys_are_what_they_say(content: str) -> None:
    dataset = TOYS[content]()
    assert dataset.content == content
    with pytest.raises(UpbenchError, match="split of dataset 'toy"):
        dataset.names("nowhere")
    for split in dataset.eval_splits:
        for index, _ in enumerate(dataset.names(split)):
            sample = dataset.read(split, index)
            assert sample.size == dataset.size(split, index)
            assert sample.image.dtype == torch.uint8
            for target in dataset.targets:
                assert getattr(sample, target) is not None
    fresh, again = toy_sample(3), toy_sample(3)
    assert torch.equal(fresh.image, again.image)


def test_a_toy_pair_belongs_together() -> None:
    pair = TOYS["pairs"]().pair("val", 0)
    for (x, y), (u, v) in zip(pair.source_points.long(), pair.target_points.long(), strict=True):
        assert torch.equal(pair.source.image[:, y, x], pair.target.image[:, v, u])


def _broken(**changes: Any) -> Any:
    return named(type("Broken", (Sharpness,), changes), "broken")


def _draws(self: Task, context: Context) -> Scores:
    scores = Scores()
    scores.add("val", {"gradient": float(torch.rand(()))})
    return scores


def _other_split(self: Task, context: Context) -> Scores:
    scores = Scores()
    scores.add("train", {"gradient": 1.0})
    return scores


def _nan(self: Task, context: Context) -> Scores:
    scores = Scores()
    scores.add("val", {"gradient": float("nan")})
    return scores


def _more(self: Task, context: Context) -> Scores:
    scores = Scores()
    scores.add("val", {"gradient": 1.0, "more": 1.0})
    return scores


@pytest.mark.parametrize(
    ("changes", "checks"),
    [
        ({"evaluate": _draws}, {"repeatable"}),
        ({"evaluate": _other_split}, {"evaluation"}),
        ({"evaluate": _nan}, {"evaluation"}),
        ({"evaluate": _more}, {"evaluation"}),
        ({"primary": "sharp"}, {"declarations"}),
        ({"needs": ("depths",)}, {"declarations", "skip reason"}),
        ({"settings": lambda self: {"list": {1}}}, {"settings"}),
        ({"skip_reason": lambda self, dataset, protocol=None: None}, {"skip reason"}),
    ],
)
def test_broken_tasks_are_found(changes: dict[str, Any], checks: set[str]) -> None:
    with pytest.raises(ContractError) as caught:
        check_task(_broken(**changes))
    failed = {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert checks <= failed
    assert failed - checks <= {"repeatable"}  # nan, for one, equals itself there


class Window(find_task("depth")):  # type: ignore[misc]
    """Decodes a pixel by its image's mean."""

    def decode(self, prediction: Tensor) -> Tensor:
        decoded = super().decode(prediction)
        return decoded - decoded.mean((1, 2), keepdim=True) + 3


def test_answers_that_need_the_whole_image_are_found() -> None:
    with pytest.raises(
        ContractError, match="strips: AssertionError: decode, which looks at more than its strip"
    ):
        check_task(named(Window, "window"))


def test_abstract_methods_are_named() -> None:
    class Unfinished(Task):
        metrics = Sharpness.metrics
        primary = "gradient"

    with pytest.raises(ContractError, match="declarations: ContractError: does not define evaluate"):
        check_task(named(Unfinished, "unfinished"))


class Flips(ToyProtocol):
    recipe = Recipe(epochs=3, batch_size=3, flip=0.5, order="shared", shrinkage=None)
    scoring = Scoring(at="stored")
    geometry = Squash(20, 36)


@pytest.mark.parametrize("name", sorted(plugins("task")))
def test_tasks_under_another_protocol(name: str) -> None:
    case = TaskCase(find_task(name), lambda: ToyContext(protocol=Flips(), method=find_method("nearest")(8)))
    for check in ("evaluation", "repeatable"):
        TASK_CHECKS[check](case)


class Ragged(ToyDataset):
    """Every other image is lower."""

    def read(self, split: str, index: int) -> Sample:
        whole = super().read(split, index)
        height = whole.size[0] - 4 * (index % 2)
        parts = {f.name: getattr(whole, f.name) for f in fields(whole)}
        cut = {name: part[..., :height, :] for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(whole, **cut)

    def size(self, split: str, index: int) -> tuple[int, int]:
        return self.read(split, index).size


@pytest.mark.parametrize("name", sorted(plugins("task")))
def test_images_of_different_sizes(name: str) -> None:
    TASK_CHECKS["evaluation"](TaskCase(find_task(name), lambda: ToyContext(named(Ragged, "ragged")())))


def test_a_context_of_ones_own() -> None:
    context = ToyContext(seeds=(5,))
    scores = find_task("seg")().evaluate(context)
    assert [len(values) for values in scores.metrics["val"].values()] == [1, 1, 1, 1]
    made = [context.shared(("a", 1), lambda: []) for _ in range(2)]
    assert made[0] is made[1]
    assert set(check_task(find_task("normals"), lambda: ToyContext(seeds=(5,))).values()) - {"ok"} <= {
        "skipped: no GPU on this machine"
    }


def test_a_task_that_is_trained_with_another_does_not_fail_with_it() -> None:
    class Exploding(find_task("normals")):  # type: ignore[misc]
        name = None

        def loss(self, prediction, target, valid):
            return super().loss(prediction, target, valid) * torch.nan

    Exploding.name = "exploding"
    protocol = ToyProtocol()
    protocol.recipe = replace(protocol.recipe, order="shared")
    alone, beside = (ToyContext(protocol=protocol) for _ in range(2))
    seg, exploding = find_task("seg")(), Exploding()
    alone.tasks, beside.tasks = (seg,), (seg, exploding)
    assert seg.evaluate(beside).metrics == seg.evaluate(alone).metrics
    with pytest.raises(UpbenchError, match="the loss of task 'exploding' is nan at step 0"):
        exploding.evaluate(beside)
