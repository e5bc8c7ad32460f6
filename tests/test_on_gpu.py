"""Every method and task keeps to the device that it is given: on a GPU that is pretended (`pretend_gpu`).

Where there is a GPU the contract's own check (`gpu`) says more.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_probe import CHANNELS, CLASSES, World, fast_training
from pretend_gpu import PretendTensor, can_pretend, pretend_gpu, to_gpu
from probing import Attending, Bent, protocol

from upbench.contracts.protocol import Output, Recipe, Scoring
from upbench.contracts.sample import Camera
from upbench.contracts.task import Truth
from upbench.contracts.upsampler import Upsampler
from upbench.dense import spill
from upbench.dense import view as view_module
from upbench.dense.tiles import upsample_tiles
from upbench.evaluate.task import ProbeTask
from upbench.protocols.geometry import SquareCrop
from upbench.registry import find_method, find_task, plugins
from upbench.testing import MethodCase, assert_close, toy_case

METHODS = sorted(set(plugins("method")) - {"featup_implicit"})  # which fits by gradients: see `pretend_gpu`
GEOMETRY = "square"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on"),
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch knows no CUDA to pretend"),
    pytest.mark.skipif(not can_pretend(), reason="PyTorch 2.9 asks for a driver: a newer one pretends"),
]


def moved(case: MethodCase, dtype: torch.dtype = torch.float32) -> tuple[Upsampler, dict[str, Any]]:
    """The case's method on the GPU, and its backbone where it runs one."""
    method = to_gpu(copy.deepcopy(case.method).to(dtype))
    return method, {} if case.backbone is None else {"backbone": to_gpu(case.new_backbone())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_forward(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method(name))
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        with pretend_gpu(monkeypatch):
            image = image.to("cuda", torch.float32 if case.cls.precise_image else dtype)
            method, given = moved(case, dtype)
            out = method(image, features.to("cuda", dtype), geometry.output, **given)
            assert isinstance(out, PretendTensor)
            assert out.dtype == dtype
            out = out.cpu()
    if dtype == torch.float32:
        assert_close(out, expected)
    else:
        assert float((out.float() - expected).abs().mean() / expected.abs().max()) < 0.05


def world(method: Upsampler, device: str = "cpu", **parameters: Any) -> World:
    """All that a run goes through, from images in memory and a store of features on disk."""
    rules = protocol(geometry=SquareCrop(32), **parameters)
    moved = to_gpu if device == "cuda" else copy.deepcopy
    return World(rules, method, [(32, 40)] * 3, device=device, moved=moved)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed each time"])
@pytest.mark.parametrize("name", METHODS)
def test_batches(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every method, through its operator where it has one, from a store of features and images on disk."""
    for module in (spill, view_module):  # what is not kept is in no file, either: these are of float16
        monkeypatch.setattr(module, "DISK_RESERVE", 1 << 62)
    case = MethodCase(find_method(name), channels=CHANNELS)
    weight, bias = torch.randn(5, CHANNELS), torch.randn(5)
    points = torch.randint(32, (2, 4, 2))
    crops = [(slice(2, 9), slice(1, 7)), (slice(0, 7), slice(3, 9))]

    def found(device: str) -> list[torch.Tensor]:
        made = world(case.method, device)
        made.budget = 10**9 if kept else -1
        dense, place = made.dense("train"), made.device
        head, bound = weight.to(place), bias.to(place)
        batch = dense.batch([0, 2])
        return [
            dense.batch([0, 2], crops).project(head, bound),
            dense.batch([1, 0, 1], [crops[0]] * 3).project(head.expand(3, -1, -1), bound),
            batch.project(head, bound),
            batch.dense(),
            batch.at(points.to(place)),
        ]

    with torch.no_grad():
        expected = found("cpu")
        with pretend_gpu(monkeypatch):
            for there, here in zip(found("cuda"), expected, strict=True):
                assert isinstance(there, PretendTensor)
                assert_close(there.cpu(), here)


@pytest.mark.parametrize("seeds", [[3], [3, 5]])
@pytest.mark.parametrize("order", ["own", "shared"])
@pytest.mark.parametrize("name", ["bilinear", "anyup", "strided", "upsample_anything"])
def test_training(name: str, order: str, seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With conditioning, flips and a class token: its own batches for every seed, or one for all."""
    case = MethodCase(find_method(name), channels=CHANNELS)
    recipe = Recipe(epochs=2, batch_size=2, crop=0.5, flip=0.5, cls_token="unit", order=order)
    expected, _ = fast_training(world(case.method, recipe=recipe), find_task("seg")(), CLASSES, seeds)
    with pretend_gpu(monkeypatch):
        there = world(case.method, "cuda", recipe=recipe)
        losses, probes = fast_training(there, find_task("seg")(), CLASSES, seeds)
        assert all(isinstance(probe.weight, PretendTensor) for probe in probes)
        assert_close(losses.cpu(), expected, terms=4096)


@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_optimisers(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(epochs=2, batch_size=2, optimizer=optimizer, shrinkage=None, init="conv")
    expected, _ = fast_training(world(Attending(), recipe=recipe), find_task("seg")(), CLASSES, [0])
    with pretend_gpu(monkeypatch):
        losses, _ = fast_training(world(Attending(), "cuda", recipe=recipe), find_task("seg")(), CLASSES, [0])
        assert_close(losses.cpu(), expected)


@pytest.mark.parametrize("at", ["output", "frame", "stored"])
@pytest.mark.parametrize("name", ["seg", "depth"])
def test_evaluation(name: str, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task as a whole: trained, decoded, compared with ground truth that was moved there."""
    recipe = Recipe(epochs=2, batch_size=2, crop=0.5)
    rules = {"recipe": recipe, "task_recipes": False, "output": Output("features"), "scoring": Scoring(at=at)}
    here = find_task(name)().evaluate(world(Attending(), **rules))
    with pretend_gpu(monkeypatch):
        there = find_task(name)().evaluate(world(Attending(), "cuda", **rules))
    for metric, values in here.metrics["val"].items():
        found = torch.tensor(there.metrics["val"][metric])
        assert_close(found, torch.tensor(values), terms=2**16, what=metric)
    assert there.per_image["val"]["names"] == here.per_image["val"]["names"]


def test_truth_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    here = world(Bent()).samples("val").truth([0, 2])
    with pretend_gpu(monkeypatch):
        there = world(Bent(), "cuda").samples("val").truth([0, 2], "cuda")
        for part in ("valid", "label", "depth"):
            assert isinstance(getattr(there, part), PretendTensor)
            assert torch.equal(getattr(there, part).cpu(), getattr(here, part))


@pytest.mark.parametrize("name", METHODS)
def test_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method(name))
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    with torch.no_grad(), pretend_gpu(monkeypatch):
        (method, given), image, features = moved(case), image.to("cuda"), features.to("cuda")
        whole = method(image, features, geometry.output, **given)
        for rows, cols, values in upsample_tiles(method, image, features, geometry.output, tile=8, **given):
            assert isinstance(values, PretendTensor)
            assert_close(values.cpu(), whole[..., rows, cols].cpu())


@pytest.mark.parametrize("ray_coordinates", ["origin_direction", "plucker"])
def test_cameras(ray_coordinates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method("raysup"), {"ray_coordinates": ray_coordinates})
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    height, width = geometry.image
    camera = Camera(torch.tensor([[width, width, width / 2, height / 2]]), torch.eye(4)[None])
    with torch.no_grad():
        expected = case.call(image, features, geometry.output, camera=camera)
        with pretend_gpu(monkeypatch):
            there = camera.to("cuda")
            out = moved(case)[0](image.to("cuda"), features.to("cuda"), geometry.output, camera=there)
            assert_close(out.cpu(), expected)


@pytest.mark.parametrize(
    "name", sorted(n for n, cls in plugins("task").items() if issubclass(cls, ProbeTask))
)
def test_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy_case(find_task(name))
    noise, task = case.noise(), case.probe
    truth = Truth.stack([case.context.samples(case.dataset.train_split).framed(i) for i in range(2)])
    evaluators = [task.evaluator(case.dataset, case.context.protocol) for _ in range(2)]
    with torch.no_grad():
        expected = task.loss(noise, case.target, case.valid)
        evaluators[0].update(task.decode(noise), truth)
        with pretend_gpu(monkeypatch):
            there = (tensor.to("cuda") for tensor in (noise, case.target, case.valid))
            loss = task.loss(*there)
            assert isinstance(loss, PretendTensor)
            assert_close(loss.cpu(), expected)
            moved_truth = Truth.stack(
                [case.context.samples(case.dataset.train_split).framed(i) for i in range(2)], "cuda"
            )
            values = evaluators[1].update(task.decode(noise.to("cuda")), moved_truth)
            assert isinstance(values, PretendTensor)
            found = evaluators[1].compute()
        assert_close(found, evaluators[0].compute(), terms=2**16)


def test_the_pretence_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(3)
    with pretend_gpu(monkeypatch):
        there = torch.zeros(3, device="cuda")
        assert there.device.type == "cuda"
        assert isinstance(there + 1, PretendTensor)
        assert isinstance(there + torch.tensor(1.0), PretendTensor)  # numbers may come from the CPU
        assert isinstance(torch.tensor([1.0, 2.0], device="cuda"), PretendTensor)
        assert not isinstance(there.cpu(), PretendTensor)
        assert float(there.copy_(here).sum()) == 3
        assert there[torch.tensor([0, 2])].tolist() == [1, 1]
        with pytest.raises(RuntimeError, match=r"aten::add of tensors on cuda \[\[3\]\] and cpu \[\[3\]\]"):
            there + here
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device="cuda")


def test_the_pretence_refuses_a_run_that_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe, a backbone or a method that was left behind."""
    with pretend_gpu(monkeypatch):
        batch = world(Attending(), "cuda").dense("train").batch([0])
        with pytest.raises(RuntimeError, match="on cuda"):
            batch.project(torch.randn(5, CHANNELS))
        rules = protocol(geometry=SquareCrop(32))
        left = World(rules, find_method("anyup").build(channels=CHANNELS), [(32, 40)] * 3, device="cuda")
        with pytest.raises(RuntimeError, match="on cuda"):
            left.dense("train").batch([0])


def test_gradients_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, target = torch.randn(6, 4), torch.randn(4, 3), torch.tensor([0, 2, 1, 0, 0, 1])

    def gradients(place: str) -> list[torch.Tensor]:
        weight, bias = (t.clone().to(place).requires_grad_() for t in (w, w[0]))
        first, second, _ = (x.to(place) @ weight + bias).unbind(1)
        loss = torch.nn.functional.cross_entropy(x.to(place) @ weight, target.to(place))
        loss = loss + (first * second.exp()).sum() + weight[1:3].square().split([1, 1])[1].sum()
        loss.backward()
        (again,) = torch.autograd.grad((bias * 2).square().sum(), bias)
        return [weight.grad.cpu(), bias.grad.cpu(), again.cpu()]

    expected = gradients("cpu")
    with pretend_gpu(monkeypatch):
        assert_close(gradients("cuda"), expected)
