"""Heads of several layers on several blocks: against a plain loop, and through a whole evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain_losses
import pytest
import torch
import torch.nn.functional as F
from plain_probe import CHANNELS, World, photos
from probing import Attending, Bent, Gallery, Resized, protocol
from torch import Tensor

from upbench.contracts.protocol import Output, Protocol
from upbench.dense.layers import LayeredSplit, LayerOf
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate import module_heads
from upbench.evaluate.dpt import DPT
from upbench.evaluate.module_heads import train_modules
from upbench.evaluate.task import _training_set, _view
from upbench.features.store import FeatureStore
from upbench.registry import find_protocol, find_task
from upbench.run.context import with_statistics
from upbench.system.progress import Bar
from upbench.testing import assert_close, tiny_backbone

METHODS = {"resized": Resized, "attending": Attending, "bent": Bent}
WIDTH = 6
HEADS = ["probe3d-depth", "probe3d-normals", "raysup-depth", "raysup-normals"]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_heads, "HIDDEN", WIDTH)


class Layered(World):
    """A world whose backbone gives features of several blocks, as `upbench.run.context` has it."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        deep = tiny_backbone(CHANNELS, depth=8)
        self.backbone = with_statistics(deep, self.protocol.backbone_statistics)
        if not self.protocol.final_norm:
            self.backbone = self.backbone.with_layers(1, final_norm=False)

    def features(self, split: str, mirrored: bool = False, token: bool = False) -> FeatureStore:
        rules = self.protocol
        return self._once(
            ("features", split, mirrored, token),
            lambda: FeatureStore(
                self.backbone.with_layers(rules.layers, rules.final_norm),
                self.samples(split, mirrored),
                cls_token=token,
                workers=0,
            ),
        )

    def dense(self, split: str, mirrored: bool = False) -> Any:
        layers, images = self.protocol.layers, self.samples(split, mirrored)
        if layers == 1:
            return super().dense(split, mirrored)
        call = MethodCall(self.method, backbone=self.backbone, statistics=self.protocol.guidance_statistics)
        store = self.features(split, mirrored)
        return self._once(
            ("dense", split, mirrored),
            lambda: LayeredSplit(
                [UpsampledSplit(call, images, LayerOf(store, at, layers)) for at in range(layers)]
            ),
        )


def small(name: str, **recipe: Any) -> Protocol:
    """A registered protocol with all its parameters, on images of 24 pixels, two epochs of steps of two."""
    rules = find_protocol(name)()
    given = {parameter: getattr(rules, parameter) for parameter in rules.PARAMETERS}
    given["geometry"] = replace(rules.geometry, side=24)
    given["recipe"] = replace(rules.recipe, **{"epochs": 2, "batch_size": 2, **recipe})
    return protocol(**given)


def plain_dpt(head: DPT, maps: list[Tensor]) -> Tensor:
    """The head as it is described, from its weights."""

    def convolved(x: Tensor, module: Any) -> Tensor:
        return F.conv2d(x, module.weight, module.bias, padding=module.weight.shape[-1] // 2)

    def larger(x: Tensor, times: int) -> Tensor:
        size = (x.shape[2] * times, x.shape[3] * times)
        return F.interpolate(x, size, mode="bilinear", align_corners=True) if head.enlarge else x

    def residual(x: Tensor, unit: Any) -> Tensor:
        return x + convolved(torch.relu(convolved(torch.relu(x), unit.first)), unit.second)

    own = [larger(convolved(one, narrow), 2) for one, narrow in zip(maps, head.narrow, strict=True)]
    made = residual(own[3], head.stages[3].both)
    for place in (2, 1, 0):
        stage = head.stages[place]
        made = residual(residual(own[place], stage.own) + made, stage.both)
    made = larger(made, 4)
    return larger(convolved(torch.relu(convolved(made, head.last[0])), head.last[2]), 2)


@pytest.mark.parametrize("enlarge", [True, False])
def test_the_head_is_what_it_is_said_to_be(enlarge: bool) -> None:
    torch.manual_seed(0)
    head = DPT(5, 3, hidden=4, enlarge=enlarge)
    maps = [torch.randn(2, 5, 3, 4) for _ in range(4)]
    made = head(maps)
    assert made.shape == ((2, 3, 48, 64) if enlarge else (2, 3, 3, 4))
    assert_close(made, plain_dpt(head, maps))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEADS)
def test_training_against_a_plain_loop(name: str, method: str) -> None:
    rules = small(name)
    world = Layered(rules, METHODS[method](), [(30, 41)] * 5)
    task = find_task(rules_task := find_protocol(name).tasks[0])().under(rules)
    outputs, recipe = task.outputs(world.dataset, rules), world.recipe()
    data = _training_set(world, recipe, _view(world, "train", recipe))
    (head,) = train_modules(task, outputs, recipe, rules.layers, data, [3], Bar("", 1))

    # The same from the backbone's blocks, one frame after the other, in float64.
    frames = [rules.geometry.frames(s.size)[0] for s in world.dataset.samples]
    inputs, targets, valids = [], [], []
    for frame, sample in zip(frames, world.dataset.samples, strict=True):
        image = frame.image(sample.image)[None]
        size = rules.output.size(frame.size, (6, 6))
        inputs.append([_seen(world, image, size, block, recipe.cls_token) for block in _blocks(world)])
        kept = frame.nearest(getattr(sample, task.target), frame.size, rules.sampling)
        targets.append(kept.double())
        valids.append(frame.nearest(sample.valid, frame.size, rules.sampling))
    torch.manual_seed(3)
    plain = DPT(int(inputs[0][0].shape[1]), outputs, hidden=WIDTH, enlarge=recipe.head == "dpt").double()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    draws = torch.Generator().manual_seed(0)
    torch.randperm(1, generator=draws)
    torch.randint(1, (5,), generator=draws)
    steps, step = 6, 0
    for _ in range(2):
        order = list(range(5)) if recipe.order == "stored" else torch.randperm(5, generator=draws).tolist()
        for start in (0, 2, 4):
            chosen = order[start : start + 2]
            maps = [torch.cat([inputs[i][layer] for i in chosen]) for layer in range(rules.layers)]
            made = plain_dpt(plain, maps if rules.layers == 4 else maps * 4)
            target, valid = (torch.stack([of[i] for i in chosen]) for of in (targets, valids))
            loss = _loss(rules_task, made, target, valid)
            warm = round(0.15 * steps)
            share = 0.01 + 0.99 * step / warm if step < warm else None
            if share is None:
                angle = torch.tensor(torch.pi / 2 * (step - warm) / (steps - warm), dtype=torch.float64)
                share = float(0.01 + 0.99 * torch.cos(angle))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * share
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    for (key, found), wanted in zip(head.named_parameters(), plain.parameters(), strict=True):
        assert_close(found.detach(), wanted.detach(), terms=10_000, what=key)


def _blocks(world: World) -> list[int]:
    depth = len(world.backbone.model.blocks)
    return [depth - 1] if world.protocol.layers == 1 else [depth * n // 4 - 1 for n in (1, 2, 3, 4)]


def _seen(world: World, image: Tensor, size: tuple[int, int], block: int, token: str) -> Tensor:
    """A block's features, upsampled, in float64, with the class token where the head sees it."""
    model, rules = world.backbone.model, world.protocol
    normalised = (image - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(normalised))
        for layer in model.blocks[: block + 1]:
            x = layer(x)
        x = model.norm(x) if rules.final_norm else x
        low = x[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        dense = world.method(normalised, low, size).double()
    if token:
        dense = torch.cat([dense, x[:, 0].double()[:, :, None, None].expand(-1, -1, *size)], 1)
    return dense


def _loss(task: str, made: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    size = tuple(valid.shape[-2:])
    if task == "depth":
        depth = F.interpolate(
            plain_losses.depth_of(made)[:, None], size, mode="bilinear", align_corners=True
        )[:, 0]
        g = plain_losses.logs(depth, target)
        mask = plain_losses.counted(target, valid)
        return plain_losses.probe3d_of(g, mask)
    if tuple(made.shape[-2:]) != size:
        from upbench.ops.resample import resize

        made = resize(made, size, "bicubic")
    return plain_losses.likelihood(made, target, valid, 0)


@pytest.mark.parametrize("name", HEADS)
def test_evaluation(name: str) -> None:
    rules = small(name, epochs=1)
    world = Layered(rules, Resized(), [(30, 41)] * 3, seeds=(0, 1))
    task = find_task(find_protocol(name).tasks[0])().under(rules)
    scores = task.evaluate(world)
    for values in scores.metrics["val"].values():
        assert len(values) == 2
    assert set(scores.metrics["val"]) == {metric.name for metric in task.metrics}
    assert len(scores.per_image["val"]["values"]) == 2
    primary = scores.metrics["val"][task.primary]
    assert primary[0] != primary[1]


def test_crops_and_conditioning_are_refused() -> None:
    rules = small("raysup-depth", crop=0.5)
    world = Layered(rules, Resized())
    with pytest.raises(UpbenchError, match="sees whole images"):
        find_task("depth")().under(rules).evaluate(world)


# ------------------------------------------------------------------------------------------------- blocks


def test_features_of_several_blocks() -> None:
    backbone = tiny_backbone(CHANNELS, depth=4)
    image = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    depth = len(backbone.model.blocks)
    assert backbone.with_layers(1) is backbone
    seen = backbone.with_layers(depth, final_norm=False)
    features, token = seen.with_token(image)
    assert features.shape[1] == token.shape[1] == seen.channels == depth * CHANNELS
    x = backbone.model._pos_embed(backbone.model.patch_embed(backbone.normalize(image)))
    for block, part, own in zip(
        backbone.model.blocks, features.chunk(depth, 1), token.chunk(depth, 1), strict=True
    ):
        x = block(x)
        assert_close(part.flatten(2).transpose(1, 2), x[:, 1:])
        assert_close(own, x[:, 0])
    normed = backbone.with_layers(depth)(image).chunk(depth, 1)[-1]
    assert_close(normed, backbone(image))
    prints = {b.fingerprint for b in (backbone, seen, backbone.with_layers(depth), backbone.with_layers(2))}
    assert len(prints) == 4
    with pytest.raises(UpbenchError, match="has no 99 blocks"):
        backbone.with_layers(99)


def test_each_blocks_map_is_upsampled_by_itself() -> None:
    """A probe on all channels is the sum of the blocks' own, and pixels are those of the dense features."""
    rules = protocol(geometry=find_protocol("probe3d-depth").geometry.__class__(24), output=Output())
    type(rules).layers = 2
    world = Layered(rules, Attending())
    dense = world.dense("train")
    batch = dense.batch([0, 3])
    whole = batch.dense()
    assert whole.shape == (2, 2 * CHANNELS, 24, 24)
    weight, bias = torch.randn(5, 2 * CHANNELS), torch.randn(5)
    expected = torch.einsum("kc,bchw->bkhw", weight, whole) + bias[:, None, None]
    assert_close(batch.project(weight, bias), expected)
    points = torch.tensor([[[1, 2], [23, 0]], [[0, 0], [7, 9]]])
    assert_close(batch.at(points)[1, :, 1], whole[1, :, 7, 9])
    assert dense.explain([0]) is None
    assert (len(dense), dense.output_size(1)) == (6, (24, 24))


def test_one_gallery_is_what_the_other_is() -> None:
    """Normals are unit vectors where they are compared."""
    gallery = Gallery(photos([(30, 41)]))
    assert_close(gallery.samples[0].normal.norm(dim=0), torch.ones(30, 41))
