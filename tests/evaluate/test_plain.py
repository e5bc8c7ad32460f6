"""The fast way to train probes against the plain one: every loss of every step, for every kind of recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_probe import CHANNELS, CLASSES, Plain, Squared, World, fast_training
from probing import Attending, Bent, Resized, protocol

from upbench.contracts.protocol import Output, Recipe
from upbench.dense import spill
from upbench.dense import view as view_module
from upbench.evaluate import probe as probe_module
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Windows
from upbench.registry import find_method, find_task
from upbench.testing import assert_close

TORCHVISION = SquareCrop(24, "bilinear", "floor", "round")
CONV = {
    "warmup": 0.0,
    "crop": 1.0,
    "shrinkage": None,
    "bias_lr": "common",
    "decay_bias": True,
    "init": "conv",
}
"""What the papers' heads have in common: whole images, a plain convolution, one learning rate."""

JAFAR = Recipe(**CONV, epochs=10, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="oscillating", flip=0.5)
RECIPES = {
    "jafar": JAFAR,
    "anyup": Recipe(
        **CONV, epochs=10, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="epoch_cosine", flip=0.5
    ),
    "naf": Recipe(**CONV, epochs=10, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="cosine", flip=0.5),
    "vitup": Recipe(**CONV, epochs=15, batch_size=4, lr=2e-3, weight_decay=1e-5, schedule="cosine", flip=0.5),
    "loftup": Recipe(
        **CONV, epochs=30, batch_size=8, lr=1e-4, weight_decay=0.0, schedule="constant", optimizer="nadam"
    ),
    "featup": Recipe(
        **CONV, epochs=10, batch_size=2, lr=5e-3, weight_decay=1e-3, schedule="constant", optimizer="adam"
    ),
    "probe3d": Recipe(
        **{**CONV, "warmup": 0.15},
        epochs=10,
        batch_size=2,
        lr=5e-4,
        weight_decay=0.01,
        schedule="half_cosine",
        lr_floor=0.01,
    ),
    "class token": Recipe(
        **CONV,
        epochs=5,
        batch_size=1,
        lr=5e-3,
        weight_decay=1e-5,
        schedule="oscillating",
        flip=0.5,
        cls_token="unit",
    ),
    "plain class token": Recipe(
        **CONV,
        epochs=10,
        batch_size=2,
        lr=5e-4,
        weight_decay=1e-5,
        schedule="cosine",
        flip=0.5,
        cls_token="plain",
    ),
    "shared order": Recipe(
        **CONV,
        epochs=10,
        batch_size=2,
        lr=5e-4,
        weight_decay=1e-5,
        schedule="cosine",
        flip=0.5,
        order="shared",
    ),
    "own": Recipe(epochs=15, batch_size=4),
    "own, whitened": Recipe(epochs=15, batch_size=4, shrinkage=0.0, crop=0.5, schedule="constant"),
    "own with flips": Recipe(epochs=15, batch_size=4, shrinkage=30.0, crop=0.5, flip=0.5),
}


def check(world: World, task=None, outputs: int = CLASSES, seed: int = 3) -> None:
    """Losses of all steps agree, and so does the probe at the end."""
    task = find_task("seg")() if task is None else task
    losses, (probe,) = fast_training(world, task, outputs, [seed])
    plain = Plain(world, task.target)
    expected, weight, bias = plain.train(outputs, seed)
    assert len(losses) >= 9
    assert_close(losses[:, 0], expected, terms=100, what="losses")  # 1e-5
    # An optimiser that divides by the size of a gradient makes more of the rounding of a small one; what the
    # probe says is compared, since whitened features of little variance have large weights of little effect.
    for frame in plain.frames[False]:
        seen = plain.seen(frame).dense
        wanted = torch.einsum("kc,chw->khw", weight, seen) + bias[:, None, None]
        own = probe.bias.double()
        if probe.token_weight is not None:
            token = F.normalize(frame.token, dim=0) if world.recipe().cls_token == "unit" else frame.token
            own = own + probe.token_weight.double() @ token
        found = torch.einsum("kc,chw->khw", probe.weight.double(), frame.dense) + own[:, None, None]
        assert_close(found.float(), wanted, terms=10_000, what="outputs")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe(recipe: Recipe) -> None:
    check(World(protocol(geometry=TORCHVISION, sampling="pillow", recipe=recipe), Resized()))


@pytest.mark.parametrize("method", ["attending", "bent", "bilinear", "jbu", "anyup", "raysup", "strided"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed each time"])
def test_methods_with_and_without_operators(method: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (spill, view_module):
        monkeypatch.setattr(module, "DISK_RESERVE", 1 << 62)
    own = {"attending": Attending, "bent": Bent}
    made = own[method]() if method in own else find_method(method).build(channels=CHANNELS)
    rules = protocol(geometry=TORCHVISION, sampling="pillow", recipe=JAFAR)
    check(World(rules, made.eval(), budget=10**9 if kept else -1))


GEOMETRIES = {
    "ragged": {"geometry": NativeAspect(), "sizes": [(24, 32), (28, 24), (41, 30), (24, 24), (30, 25)]},
    "padded": {"geometry": PaddedSquare(24), "sizes": [(24, 32), (28, 24), (41, 30), (24, 24), (30, 25)]},
    "windows": {"geometry": Windows(16, 10), "sizes": [(24, 32), (28, 24), (41, 30)]},
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("method", [Resized, Attending, Bent])
def test_every_geometry(name: str, method) -> None:
    rules = protocol(geometry=GEOMETRIES[name]["geometry"], recipe=JAFAR)
    check(World(rules, method(), GEOMETRIES[name]["sizes"]))


PARAMETERS = {
    "output of the features' size": {
        "output": Output("features"),
        "sampling": "floor",
        "recipe": RECIPES["loftup"],
    },
    "twice the features' size": {"output": Output("features", 2.0), "sampling": "centre"},
    "fixed output": {"output": Output("fixed", side=20), "sampling": "pillow"},
    "guidance of the output's size": {"output": Output("image", 0.5), "guidance_size": "output"},
    "imagenet for both": {"backbone_statistics": "imagenet", "guidance_statistics": "imagenet"},
    "none for both": {"backbone_statistics": "none", "guidance_statistics": "none"},
    "the backbone's for both": {"guidance_statistics": "backbone"},
    "imagenet for the guidance alone": {"guidance_statistics": "imagenet"},
    "half precision on disk": {"features_dtype": "float16"},
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("method", [Attending, Bent])
def test_every_parameter_of_a_protocol(name: str, method) -> None:
    given = {"geometry": TORCHVISION, "recipe": JAFAR, **PARAMETERS[name]}
    if given.get("sampling") == "floor":
        assert not given["recipe"].flip
    check(World(protocol(**given), method()))


def test_regression() -> None:
    for recipe in (JAFAR, RECIPES["own"], RECIPES["class token"]):
        world = World(protocol(geometry=TORCHVISION, recipe=recipe), Attending())
        check(world, Squared(), outputs=1)


def test_images_that_are_read_again_change_nothing() -> None:
    rules = protocol(geometry=TORCHVISION, recipe=JAFAR)
    check(World(rules, Bent(), image_budget=0, budget=-1))


def test_images_that_are_read_again_are_read_once_a_step() -> None:
    """Ahead of it, for the view and for the loss."""
    rules = protocol(geometry=TORCHVISION, recipe=replace(JAFAR, epochs=3, flip=0.0))
    world = World(rules, Bent(), [(30, 41)] * 20, image_budget=0, budget=-1)
    images = world.samples("train")
    world.dense("train").keeps()
    world.features("train").prepare()
    images._recent.clear()
    world.dataset.asked.clear()
    fast_training(world, find_task("seg")(), CLASSES, [0])
    assert world.dataset.asked.total() <= 3 * 20


SEEDS = [3, 0, 11]
TOGETHER = [
    ("square", "own", "jafar"),
    ("square", "own", "own with flips"),
    ("square", "shared", "own with flips"),
    ("square", "shared", "class token"),
    ("ragged", "own", "class token"),
    ("ragged", "shared", "jafar"),
    ("padded", "own", "own with flips"),
    ("windows", "own", "jafar"),
    ("windows", "shared", "class token"),
]


@pytest.mark.parametrize("together", [True, False], ids=["at once", "one after the other"])
@pytest.mark.parametrize(("name", "order", "recipe"), TOGETHER)
def test_seeds_in_one_pass_are_trainings_of_their_own(
    name: str, order: str, together: bool, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding; each of them is the plain one's (above)."""
    if not together:
        monkeypatch.setattr(probe_module, "_TOGETHER_BYTES", {"cpu": 1})
    given = GEOMETRIES.get(name, {"geometry": TORCHVISION, "sizes": [(30, 41)] * 5})
    chosen = RECIPES[recipe]
    shown = {"order": order, "epochs": 6, **({"crop": 1.0} if name != "square" else {})}
    rules = protocol(geometry=given["geometry"], recipe=chosen)
    world = World(rules, Attending(), given["sizes"], user=shown)
    task = find_task("seg")()
    losses, probes = fast_training(world, task, CLASSES, SEEDS)
    for place, seed in enumerate(SEEDS):
        own, (probe,) = fast_training(world, task, CLASSES, [seed])
        assert_close(losses[:, place], own[:, 0], terms=100)
        assert_close(probes[place].weight, probe.weight, terms=10_000)
        assert_close(probes[place].bias, probe.bias, terms=10_000, scale=probe.weight)
    if order == "own":
        expected, *_ = Plain(world).train(CLASSES, SEEDS[0])
        assert_close(losses[:, 0], expected, terms=100)
    assert not torch.equal(probes[0].weight, probes[1].weight)
