"""The papers' protocols, trained the fast way and the plain one: every loss of a whole small training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain_losses
import pytest
import torch
from plain_probe import CHANNELS, CLASSES, Plain, World, fast_training
from probing import Attending, Bent, Resized, protocol
from torch import Tensor

from upbench.contracts.protocol import Protocol
from upbench.contracts.task import Truth
from upbench.evaluate import strips
from upbench.evaluate.task import ProbeTask, _view
from upbench.registry import find_method, find_protocol, find_task, plugins
from upbench.system.progress import Bar
from upbench.testing import assert_close

SIDE = 24
METHODS = {"resized": Resized, "attending": Attending, "bent": Bent}
LINEAR = sorted(
    name
    for name, cls in plugins("protocol").items()
    if cls.tasks and cls.recipe.head == "linear" and cls.recipe.trained_on == "method"
)
SEGMENTATION = [name for name in LINEAR if find_protocol(name).tasks == ("seg",)]
GEOMETRIC = [name for name in LINEAR if name not in SEGMENTATION]


def small(name: str, **recipe: Any) -> Protocol:
    """A registered protocol with all its parameters, on images of 24 pixels, with few epochs."""
    rules = find_protocol(name)()
    given = {parameter: getattr(rules, parameter) for parameter in rules.PARAMETERS}
    given["geometry"] = replace(rules.geometry, side=SIDE)
    given["recipe"] = replace(rules.recipe, **{"epochs": 4, **recipe})
    return protocol(**given)


@pytest.fixture
def in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are computed a few rows at a time, however small they are."""
    monkeypatch.setattr(strips, "WORTH_BYTES", 0)
    monkeypatch.setattr(strips, "STRIP_BYTES", 4096)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SEGMENTATION)
@pytest.mark.usefixtures("in_strips")
def test_segmentation(name: str, method: str) -> None:
    world = World(small(name), METHODS[method](), [(30, 41)] * 6)
    losses, _ = fast_training(world, find_task("seg")(), CLASSES, [3])
    expected, *_ = Plain(world).train(CLASSES, 3)
    assert len(losses) >= 4
    assert float((losses[:, 0] - expected).abs().max()) < 1e-6 * float(expected.max())


def test_both_normalisations_are_told_apart() -> None:
    """The backbone's statistics for the method, as RaysUp's code has them, and ImageNet's, as NAF's."""
    found = {}
    for statistics in ("backbone", "imagenet"):
        rules = small("naf-seg")
        type(rules).guidance_statistics = statistics
        world = World(rules, Attending())
        world.backbone = world.backbone.with_statistics((0.5,) * 3, (0.5,) * 3)
        losses, _ = fast_training(world, find_task("seg")(), CLASSES, [3])
        expected, *_ = Plain(world).train(CLASSES, 3)
        assert float((losses[:, 0] - expected).abs().max()) < 1e-6 * float(expected.max())
        found[statistics] = losses
    assert not torch.equal(found["backbone"], found["imagenet"])


@pytest.mark.parametrize("order", ["own", "shared", "stored"])
@pytest.mark.parametrize("method", [*METHODS, "raysup", "anyup", "bilinear"])
@pytest.mark.usefixtures("in_strips")
def test_strips_of_several_seeds(order: str, method: str) -> None:
    """Kept, of one size, with whole crops; each seed is the training that it would be alone."""
    made = METHODS[method]() if method in METHODS else find_method(method).build(channels=CHANNELS)
    world = World(small("raysup-seg", order=order, epochs=2), made.eval(), seeds=(3, 0, 7))
    losses, probes = fast_training(world, find_task("seg")(), CLASSES, [3, 0, 7])
    for place, seed in enumerate((3, 0, 7)):
        expected, weight, _ = Plain(world).train(CLASSES, seed)
        assert_close(losses[:, place], expected, terms=100)
        assert_close(probes[place].weight, weight, terms=10_000)


@pytest.mark.usefixtures("in_strips")
def test_strips_of_images_without_a_label() -> None:
    task = find_task("seg")()
    world = World(small("raysup-seg", flip=0.0, order="stored", epochs=1), Resized(), [(30, 41)] * 4)
    for sample in world.dataset.samples[:2]:
        sample.valid[:] = False
    losses, (probe,) = fast_training(world, task, CLASSES, [0])
    assert losses[0] == 0
    assert losses[1] > 0
    assert bool(probe.weight.isfinite().all())


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 151, 3, 40)])
def test_the_slope_of_summed_losses_is_that_of_the_loss(shape: tuple[int, ...]) -> None:
    task = find_task("seg")()
    generator = torch.Generator().manual_seed(0)
    z = (5 * torch.randn(shape, generator=generator)).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    valid = torch.rand(target.shape, generator=generator) > 0.2
    loss = task.loss(z, target, valid)
    loss.backward()
    count = int(task.counted(target, valid).sum())
    slope = z.detach().clone()
    assert_close(task.summed(slope, target, valid).float() / count, loss.detach(), terms=1000)
    assert z.grad is not None
    assert_close(slope / count, z.grad, terms=100)


class Sharper(type(find_task("seg")())):  # type: ignore[misc]
    """A subclass with a loss of its own, which nothing adds up."""

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return super().loss(3 * prediction, target, valid)


@pytest.mark.usefixtures("in_strips")
def test_a_subclass_with_another_loss_is_trained_by_it() -> None:
    rules = small("raysup-seg", epochs=2)
    sharper, _ = fast_training(World(rules, Resized()), Sharper(), CLASSES, [3])
    plain, _ = fast_training(World(rules, Resized()), find_task("seg")(), CLASSES, [3])
    assert not torch.isclose(sharper, plain).any()
    assert strips.by_pixel(find_task("seg")())
    assert not strips.by_pixel(Sharper())
    assert not strips.by_pixel(find_task("depth")())


# ------------------------------------------------------------------------------------- heads that are shared


def trained(world: World, task: ProbeTask) -> list[Any]:
    recipe = world.recipe()
    return task._probes(world, _view(world, "train", recipe), Bar("", 1))


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_head_is_that_of_the_backbones_own_features(method: str) -> None:
    world = World(small("vitup-seg-frozen-head"), METHODS[method](), seeds=(3, 0))
    probes = trained(world, find_task("seg")())
    for seed, probe in zip((3, 0), probes, strict=True):
        _, weight, bias = Plain(world, own=True).train(CLASSES, seed)
        assert_close(probe.weight, weight, terms=10_000)
        assert_close(probe.bias, bias, terms=10_000, scale=weight)
    assert world.shared(("head", *_key(world)), lambda: None) == probes, "made once for all methods"


def _key(world: World) -> tuple[Any, ...]:
    rules = world.recipe()
    recipe = replace(rules, trained_on="method", lr=rules.first_lr or rules.lr, first_lr=0.0)
    return recipe, world.seeds


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_goes_on_from_it(method: str, conditioned: bool) -> None:
    own = {"shrinkage": 1.0} if conditioned else {}
    world = World(small("vitup-seg-finetune", **own), METHODS[method](), seeds=(3,))
    (probe,) = trained(world, find_task("seg")())
    first = World(small("vitup-seg", **own), METHODS[method]())
    _, weight, bias = Plain(first, own=True).train(CLASSES, 3)
    _, weight, bias = Plain(world).train(CLASSES, 3, start=(weight, bias))
    plain = Plain(world)
    frame = plain.frames[False][0]
    wanted = torch.einsum("kc,chw->khw", weight, plain.seen(frame).dense) + bias[:, None, None]
    found = torch.einsum("kc,chw->khw", probe.weight.double(), frame.dense)
    found = found + probe.bias.double()[:, None, None]
    assert_close(found.float(), wanted, terms=10_000)


def test_frozen_heads_are_scored_on_the_methods_features() -> None:
    """Bilinear's features under a frozen head are what the head was trained on."""
    frozen = World(small("vitup-seg-frozen-head"), find_method("bilinear").build(channels=CHANNELS))
    own = World(small("vitup-seg"), find_method("bilinear").build(channels=CHANNELS))
    other = World(small("vitup-seg-frozen-head"), Attending())
    scores = [find_task("seg")().evaluate(world).metrics["val"]["miou"] for world in (frozen, own, other)]
    assert scores[0] == scores[1] != scores[2]


# --------------------------------------------------------------------------------------- depth and normals


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_depth_and_normals(name: str, method: str) -> None:
    rules = small(name, epochs=40 if name == "jafar-depth" else 4)
    world = World(rules, METHODS[method](), [(30, 41)] * 6)
    task = find_task(find_protocol(name).tasks[0])().under(rules)
    outputs = task.outputs(world.dataset, rules)
    assert outputs == (256 if task.name == "depth" else 4)
    losses, _ = fast_training(world, task, outputs, [3])
    plain = plain_losses.LOSSES[rules.objective] if task.name == "depth" else plain_losses.likelihood
    expected, *_ = Plain(world, task.target, loss=plain).train(outputs, 3)
    assert len(losses) >= 4
    if name == "jafar-depth":
        assert len(losses) > 100, "the variance joins in after a hundred steps"
    assert_close(losses[:, 0], expected, terms=100)


def test_every_linear_protocol_is_among_them() -> None:
    assert {"raysup-seg", "jafar-seg", "anyup-seg", "loftup-seg", "vitup-seg"} <= set(SEGMENTATION)
    assert {"anyup-depth", "anyup-normals", "jafar-depth", "probe3d-depth-linear"} <= set(GEOMETRIC)
    assert find_protocol("naf-seg") is find_protocol("raysup-seg")


def maps(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = 12 * torch.rand(count, 20, 30, generator=generator)
    target[:, :2] = 0
    prediction = 0.3 * target + 1 + torch.randn(target.shape, generator=generator)
    return prediction, target, torch.rand(target.shape, generator=generator) > 0.2


def test_aligned_depth() -> None:
    prediction, target, valid = maps()
    valid[1] = False
    prediction[2] = 3.0  # nothing to scale
    task = find_task("depth")()
    evaluator = task.evaluator(None, None)
    evaluator.update(prediction, Truth(("",) * 5, valid, depth=target))
    found = evaluator.compute()
    kept = valid & (target > 0) & (target <= 10)
    plain = [plain_losses.aligned_depth(prediction[i][kept[i]], target[i][kept[i]]) for i in (0, 2, 3, 4)]
    assert found["rmse_aligned"] == pytest.approx(sum(rmse for rmse, _ in plain) / 4)
    for n in (1, 2, 3):
        own = 100 * sum(within[n - 1] for _, within in plain) / 4
        assert found[f"delta{n}_aligned"] == pytest.approx(own)
    assert found["rmse_aligned"] < found["rmse"]


def test_normals_of_each_image() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.nn.functional.normalize(torch.randn(4, 3, 20, 30, generator=generator), dim=1)
    prediction = target + 0.4 * torch.randn(target.shape, generator=generator)
    valid = torch.rand(4, 20, 30, generator=generator) > 0.3
    valid[1] = False
    valid[2, 5:] = False  # images count alike, whatever they show
    evaluator = find_task("normals")().evaluator(None, None)
    for part in (slice(0, 3), slice(3, 4)):
        evaluator.update(prediction[part], Truth(("",) * 3, valid[part], normal=target[part]))
    found = evaluator.compute()
    each = [plain_losses.angles(prediction[i][:, valid[i]], target[i][:, valid[i]]) for i in (0, 2, 3)]
    assert found["image_rmse"] == pytest.approx(sum(float(a.square().mean().sqrt()) for a in each) / 3)
    for limit in (11.25, 22.5, 30):
        own = 100 * sum(float((a < limit).double().mean()) for a in each) / 3
        assert found[f"image_under_{limit:g}"] == pytest.approx(own)
    assert found["image_rmse"] != pytest.approx(found["rmse"]), "pooled it is another number"


def test_150_classes_out_of_151() -> None:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 151, (3, 40, 50), generator=generator)
    answer = torch.where(torch.rand(label.shape, generator=generator) < 0.5, label, 0)
    label[:, :3] = 255
    world = World(small("raysup-seg"), Resized())
    world.dataset.classes, world.dataset.other_class = tuple(f"{n}" for n in range(151)), 0
    evaluator = find_task("seg")().evaluator(world.dataset, world.protocol)
    evaluator.update(answer, Truth(("",) * 3, torch.ones_like(label, dtype=torch.bool), label=label))
    found = evaluator.compute()
    kept = label != 255
    matrix = torch.zeros(151, 151, dtype=torch.int64)
    matrix.index_put_((label[kept], answer[kept]), torch.tensor(1), accumulate=True)
    assert found["miou_named"] == pytest.approx(100 * plain_losses.named_iou(matrix, 0))
    assert found["miou"] == pytest.approx(100 * plain_losses.named_iou(matrix, -1))
