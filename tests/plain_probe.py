"""Training of a probe as the papers describe it: all C channels of every pixel, a 1x1 convolution, PyTorch's
own optimisers and schedulers, one step after the other; in float64.

It shares nothing with the fast way but the frames (`tests/contracts/test_geometry.py`), the backbone's
features and the numbers that are drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from probing import Gallery
from torch import Tensor

from upbench.contracts.geometry import Frame
from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD, normalize_image
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.sample import Sample
from upbench.contracts.task import Context
from upbench.contracts.upsampler import Upsampler, extras
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.evaluate.probe import Head, Probe, TrainingSet, _Reader, _Training
from upbench.evaluate.task import _view
from upbench.features.images import SplitImages
from upbench.features.store import FeatureStore
from upbench.run.context import with_statistics
from upbench.system.progress import Bar
from upbench.testing import tiny_backbone

CHANNELS, CLASSES = 8, 4


def photos(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Blurred noise; labels in blocks, some ignored; depth; some pixels that are not valid."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, (height, width) in enumerate(sizes):
        coarse = torch.rand(3, 9, 9, generator=generator)
        image = F.interpolate(coarse[None], (height, width), mode="bilinear")[0]
        blocks = torch.randint(CLASSES, (7, 8), generator=generator)
        blocks[number % 7, 3] = 255
        label = F.interpolate(blocks[None, None].float(), (height, width), mode="nearest")[0, 0].to(
            torch.uint8
        )
        depth = 1 + 3 * F.interpolate(torch.rand(1, 1, 5, 5, generator=generator), (height, width))[0, 0]
        valid = torch.rand(height, width, generator=generator) > 0.1
        slopes = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(number))
        normal = F.normalize(F.interpolate(slopes, (height, width), mode="bilinear"), dim=1)[0]
        found.append(
            Sample(
                f"photo {number}",
                (image * 255).to(torch.uint8),
                valid=valid,
                label=label,
                depth=depth,
                normal=normal,
            )
        )
    return found


class World(Context):
    """Photos, a small backbone and a method under a protocol, through all that a run goes through."""

    def __init__(
        self,
        rules: Protocol,
        method: Upsampler,
        sizes: Sequence[tuple[int, int]] = ((30, 41),) * 6,
        *,
        seeds: Sequence[int] = (0,),
        budget: int = 10**9,
        image_budget: int = 10**9,
        user: Mapping[str, Any] | None = None,
        device: str = "cpu",
        moved: Callable[[Any], Any] = copy.deepcopy,
    ) -> None:
        """Takes what is measured; `moved` gives copies of modules that are on `device`."""
        self.protocol, self.seeds, self.device = rules, tuple(seeds), torch.device(device)
        self.dataset, self.channels = Gallery(photos(sizes)), CHANNELS
        self.method, self.budget, self.image_budget, self.user = method, budget, image_budget, user
        self.backbone = with_statistics(moved(tiny_backbone(CHANNELS)), rules.backbone_statistics)
        self.moved = moved
        self._held: dict[object, Any] = {}

    def samples(self, split: str, mirrored: bool = False) -> SplitImages:
        return self._once(
            ("samples", split, mirrored),
            lambda: SplitImages(
                self.dataset,
                split,
                self.protocol,
                stride=self.backbone.stride,
                mirrored=mirrored,
                budget=self.image_budget,
            ),
        )

    def features(self, split: str, mirrored: bool = False, token: bool = False) -> FeatureStore:
        return self._once(
            ("features", split, mirrored, token),
            lambda: FeatureStore(
                self.backbone,
                self.samples(split, mirrored),
                dtype=self.protocol.features_dtype,
                cls_token=token,
                device=self.device,
                workers=0,
            ),
        )

    def dense(self, split: str, mirrored: bool = False) -> UpsampledSplit:
        statistics = self.protocol.guidance_statistics
        call = MethodCall(
            self.moved(self.method), backbone=self.backbone, device=self.device, statistics=statistics
        )
        return self._once(
            ("dense", split, mirrored),
            lambda: UpsampledSplit(
                call,
                self.samples(split, mirrored),
                self.features(split, mirrored),
                guidance_size=self.protocol.guidance_size,
                budget=self.budget,
            ),
        )

    def upsample(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        raise NotImplementedError

    def encode(self, image: Tensor) -> Tensor:
        return self.backbone(image)

    def recipe(self, settings: Mapping[str, Any] | None = None) -> Recipe:
        return self.protocol.recipe_for(settings, self.user, self.dataset.name)

    def shared(self, key: object, make: Callable[[], Any]) -> Any:
        return self._once(("shared", key), make)

    def of_method(self, key: object, make: Callable[[], Any]) -> Any:
        return self._once(("method", key), make)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        yield Bar(title, total)

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def training_set(self) -> TrainingSet:
        recipe = self.recipe()
        return TrainingSet(
            _view(self, "train", recipe),
            self.channels,
            self.features("train").moments,
            lambda: _view(self, "train", recipe, mirrored=True),
            self.device,
        )


def fast_training(world: World, task: Any, outputs: int, seeds: Sequence[int]) -> tuple[Tensor, list[Probe]]:
    """`[steps, seeds]` losses, and the probes."""
    data = world.training_set()
    training = _Training(Head(task, outputs, world.recipe()), data, list(seeds), _Reader(data))
    for step, batches in enumerate(training.batches()):
        training.step(step, batches)
    return training.losses.clone(), training.finish()


# ------------------------------------------------------------------------------------------ the plain way


@dataclass(frozen=True)
class PlainFrame:
    """Upsampled features `[C, H, W]` in float64 and their ground truth; a class token `[C]`."""

    dense: Tensor
    target: Tensor
    valid: Tensor
    token: Tensor

    def crop(self, rows: slice, cols: slice) -> PlainFrame:
        return replace(
            self,
            dense=self.dense[:, rows, cols],
            target=self.target[..., rows, cols],
            valid=self.valid[rows, cols],
        )


@dataclass
class Plain:
    """The plain way through a world.

    Attributes:
        target: "label", "depth" or "normal".
        own: Whether the backbone's own features are enlarged bilinearly, instead of upsampled by the method.
        loss: From outputs `[B, K, H, W]`, targets, `[B, H, W]` which are valid and the number of the step;
            for tasks that are neither segmentation nor squared errors.
    """

    world: World
    target: str = "label"
    own: bool = False
    loss: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None

    @cached_property
    def windows(self) -> list[tuple[int, Frame]]:
        """Number of the image, and frame."""
        dataset, rules = self.world.dataset, self.world.protocol
        return [
            (index, frame)
            for index, sample in enumerate(dataset.samples)
            for frame in rules.geometry.frames(sample.size, self.world.backbone.stride)
        ]

    @cached_property
    def frames(self) -> dict[bool, list[PlainFrame]]:
        return {
            flipped: [self._frame(index, frame, flipped) for index, frame in self.windows]
            for flipped in (False, True)
        }

    def _frame(self, index: int, frame: Frame, flipped: bool) -> PlainFrame:
        rules, backbone = self.world.protocol, self.world.backbone
        sample = self.world.dataset.samples[index]
        image, stored = frame.image(sample.image)[None], getattr(sample, self.target)
        image = image.flip(-1) if flipped else image
        with torch.no_grad():
            low, token = backbone.with_token(image)
        size = rules.output.size(frame.size, (low.shape[-2], low.shape[-1]))
        target, valid = (frame.nearest(part, size, rules.sampling) for part in (stored, sample.valid))
        valid = valid & frame.inside(size, rules.sampling)
        if flipped:
            target, valid = target.flip(-1), valid.flip(-1)
            if self.target == "normal":
                target = target * torch.tensor([-1.0, 1, 1])[:, None, None]
        guide = image.double()
        if rules.guidance_size == "output":
            guide = F.interpolate(guide, size, mode="bilinear", align_corners=False)
        mean, std = {
            "method": (self.world.method.mean, self.world.method.std),
            "backbone": (backbone.mean, backbone.std),
            "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
            "none": ((0.0,) * 3, (1.0,) * 3),
        }[rules.guidance_statistics]
        method = copy.deepcopy(self.world.method).double()
        given = extras(method, backbone=backbone)
        if rules.features_dtype == "float16":
            low = low.half()
        with torch.no_grad():
            dense = method(normalize_image(guide, mean, std), low.double(), size, **given)[0]
        if self.own:
            dense = F.interpolate(low.double(), size, mode="bilinear")[0]
        return PlainFrame(
            dense.double(), target.long() if self.target == "label" else target, valid, token[0].double()
        )

    def train(
        self, outputs: int, seed: int, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[steps]` losses, weight and bias at the end (on conditioned features, where there are such).

        Args: outputs: K; seed: Of all that is drawn; start: Weight and bias to begin with.
        """
        recipe, count = self.world.recipe(), len(self.windows)
        frames = {flipped: [self.seen(frame) for frame in some] for flipped, some in self.frames.items()}
        draws = torch.Generator().manual_seed(seed)
        head = _head(recipe, outputs, int(frames[False][0].dense.shape[0]), draws)
        if start is not None:
            with torch.no_grad():
                head.weight.copy_(start[0][:, :, None, None])
                head.bias.copy_(start[1])
        optimizer = _optimizer(recipe, head)
        steps_an_epoch = math.ceil(count / recipe.batch_size)
        schedulers = _schedulers(recipe, optimizer, steps_an_epoch)
        if recipe.order != "own":
            draws, seed = torch.Generator().manual_seed(0), 0
        coins = torch.Generator().manual_seed(seed)
        parts = round(1 / recipe.crop)
        cells = torch.randperm(parts * parts, generator=draws).tolist()
        first = torch.randint(parts * parts, (count,), generator=draws).tolist()
        losses = []
        for epoch in range(recipe.epochs):
            stored = recipe.order == "stored"
            order = list(range(count)) if stored else torch.randperm(count, generator=draws).tolist()
            while order:
                batch, order = order[: recipe.batch_size], order[recipe.batch_size :]
                flipped = recipe.flip > 0 and float(torch.rand((), generator=coins)) < recipe.flip
                shown = [
                    _cell(frames[flipped][i], parts, cells[(first[i] + epoch) % len(cells)]) for i in batch
                ]
                loss = self._loss(head, shown, len(losses))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                for scheduler in schedulers["step"]:
                    scheduler.step()
            for scheduler in schedulers["epoch"]:
                scheduler.step()
        return torch.stack(losses), head.weight.detach()[:, :, 0, 0], head.bias.detach()

    def seen(self, frame: PlainFrame) -> PlainFrame:
        """What the head sees of a frame: conditioned features, a class token beside each of them."""
        recipe, dense = self.world.recipe(), frame.dense
        if recipe.shrinkage is not None:
            mean, scale = self._conditioning
            dense = torch.einsum("dc,chw->dhw", scale, dense - mean[:, None, None])
        if recipe.cls_token:
            token = frame.token
            token = token / token.norm() if recipe.cls_token == "unit" else token
            dense = torch.cat([dense, token[:, None, None].expand(-1, *dense.shape[1:])])
        return replace(frame, dense=dense)

    @cached_property
    def _conditioning(self) -> tuple[Tensor, Tensor]:
        """Mean and scale of low-resolution features, from all of them at once."""
        shrinkage = self.world.recipe().shrinkage
        low = [
            self.world.backbone(frame.image(self.world.dataset.samples[index].image)[None])[0].detach()
            for index, frame in self.windows
        ]
        flat = torch.cat([part.double().flatten(1) for part in low], 1)
        variances, axes = torch.linalg.eigh(torch.cov(flat, correction=0))
        scales = (variances + (shrinkage + 1e-6) * variances.mean()) ** -0.5
        return flat.mean(1), axes @ torch.diag(scales) @ axes.T

    def _loss(self, head: torch.nn.Module, shown: list[PlainFrame], step: int) -> Tensor:
        """Over the valid pixels of the whole batch."""
        if self.loss is not None:
            made = head(torch.stack([frame.dense for frame in shown]))
            target, valid = (torch.stack([getattr(f, n) for f in shown]) for n in ("target", "valid"))
            return self.loss(made, target.double(), valid, step)
        made = torch.cat([head(frame.dense[None])[0][:, frame.valid] for frame in shown], 1)
        target = torch.cat([frame.target[frame.valid] for frame in shown])
        if self.target == "label":
            return F.cross_entropy(made.T, target, ignore_index=255)
        return F.mse_loss(made[0], target.double())


class Squared:
    """A regression of depth: mean squared error over the valid pixels."""

    name, target = "squared", "depth"

    def loss(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return (prediction[:, 0] - target)[valid].square().mean()


def _head(recipe: Recipe, outputs: int, channels: int, draws: torch.Generator) -> torch.nn.Conv2d:
    head = torch.nn.Conv2d(channels, outputs, 1).double()
    with torch.no_grad():
        if recipe.init == "conv":
            bound = 1 / math.sqrt(channels)
            weight = (2 * torch.rand(outputs, channels, generator=draws) - 1) * bound
            bias = (2 * torch.rand(outputs, generator=draws) - 1) * bound
            own = head.weight.abs().max(), head.bias.abs().max()  # as PyTorch itself draws them
            assert max(own) <= bound < 1.5 * float(own[0])
        else:
            weight, bias = 0.01 * torch.randn(outputs, channels, generator=draws), torch.zeros(outputs)
        head.weight.copy_(weight[:, :, None, None])
        head.bias.copy_(bias)
    return head


def _optimizer(recipe: Recipe, head: torch.nn.Conv2d) -> torch.optim.Optimizer:
    make: Any = {"adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam, "adam": torch.optim.Adam}[
        recipe.optimizer
    ]
    if recipe.bias_lr == "common" and recipe.decay_bias:
        return make(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    scale = math.sqrt(CHANNELS) if recipe.bias_lr == "scaled" else 1.0
    return make(
        [
            {"params": [head.weight], "weight_decay": recipe.weight_decay},
            {
                "params": [head.bias],
                "weight_decay": recipe.weight_decay * recipe.decay_bias,
                "lr": recipe.lr * scale,
            },
        ],
        lr=recipe.lr,
    )


def _schedulers(recipe: Recipe, optimizer: Any, steps_an_epoch: int) -> dict[str, list[Any]]:
    """PyTorch's own where it has them. Key: after what they are stepped."""
    schedulers = torch.optim.lr_scheduler
    steps = recipe.epochs * steps_an_epoch
    if recipe.schedule == "constant" and not recipe.warmup:
        return {"step": [], "epoch": []}
    if recipe.schedule == "epoch_cosine":
        return {"step": [], "epoch": [schedulers.CosineAnnealingLR(optimizer, recipe.epochs)]}
    if recipe.schedule == "oscillating":  # made for epochs, stepped every iteration
        return {"step": [schedulers.CosineAnnealingLR(optimizer, recipe.epochs)], "epoch": []}
    if recipe.schedule == "cosine" and not recipe.warmup:
        return {"step": [schedulers.CosineAnnealingLR(optimizer, steps)], "epoch": []}
    warm, floor = round(recipe.warmup * steps), recipe.lr_floor

    def factor(step: int) -> float:
        if step < warm:
            return floor + (1 - floor) * step / warm if floor else (step + 1) / (warm + 1)
        if recipe.schedule == "constant":
            return 1.0
        done = (step - warm) / (steps - warm)
        half, quarter = (1 + math.cos(math.pi * done)) / 2, math.cos(math.pi * done / 2)
        wave = quarter if recipe.schedule == "half_cosine" else half
        return floor + (1 - floor) * wave

    return {"step": [schedulers.LambdaLR(optimizer, factor)], "epoch": []}


def _cell(frame: PlainFrame, parts: int, cell: int) -> PlainFrame:
    """One of parts x parts equal rectangles."""
    height, width = (n // parts for n in frame.valid.shape)
    row, col = divmod(cell, parts)
    return frame.crop(slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width))
