"""What cells share, for as long as they share it, and the `Context` that a task sees.

A `DataScope` holds what a backbone, a dataset and a protocol have in common; a `MethodScope` in it what a
method adds. A cell's `RunContext` looks into both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from upbench.contracts.backbone import Backbone
from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD
from upbench.contracts.protocol import Recipe
from upbench.contracts.task import Context, Task
from upbench.dense.camera import CameraChoice
from upbench.dense.layers import LayeredSplit, LayerOf
from upbench.dense.method import MethodCall
from upbench.dense.untouched import Untouched
from upbench.dense.view import UpsampledSplit
from upbench.features.images import SplitImages
from upbench.features.passing import Choice, PassingFeatures, choose
from upbench.features.store import FeatureStore
from upbench.run.jobs import PlannedCell, build_method
from upbench.system.progress import Bar, bar, say

T = TypeVar("T")
Size = tuple[int, int]

VIEW_BYTES = 4_500_000_000
"""What all upsampled views of a method may keep. Fixed, as what does not fit is kept in float16."""

IMAGE_BYTES = 600_000_000
"""What the frames of all splits may keep; those beyond are read anew."""

FEATURE_BYTES = 800_000_000
"""What the low-resolution features of all splits may keep; a split beyond is read from disk each time."""


class DataScope:
    """Images and low-resolution features of a backbone, a dataset and a protocol, for all methods and
    tasks."""

    def __init__(self, planned: PlannedCell, backbone: Callable[[], Backbone]) -> None:
        """Args: planned: A cell of those that share the scope; backbone: gives its backbone, on its
        device."""
        self.planned = planned
        self.device = torch.device(planned.place)
        self._load = backbone
        self._held: dict[Hashable, Any] = {}
        self._untouched = Untouched("a method or a task")

    @property
    def backbone(self) -> Backbone:
        """The backbone, with the statistics that the protocol asks for."""
        if "backbone" not in self._held:
            rules = self.planned.protocol
            backbone = with_statistics(self._load(), rules.backbone_statistics)
            if not rules.final_norm:
                backbone = backbone.with_layers(1, final_norm=False)
            self._held["backbone"] = backbone
            self._untouched.note("backbone", backbone)
        return cast(Backbone, self._held["backbone"])

    def shared(self, key: Hashable, make: Callable[[], T]) -> T:
        """What tasks share: made once, and to stay as it is."""
        if key not in self._held:
            self._held[key] = make()
            self._untouched.note("shared_results", self._held[key])
        return cast(T, self._held[key])

    def check(self) -> None:
        """Looks whether what cells share is as it was.

        Raises:
            UpbenchError: A parameter of the backbone, or something that tasks share, was changed in place.
        """
        self._untouched.check()

    def images(self, split: str, mirrored: bool = False) -> SplitImages:
        """The frames of a split."""
        planned = self.planned
        return self.keep(
            ("images", split, mirrored),
            lambda: SplitImages(
                planned.dataset,
                split,
                planned.protocol,
                stride=planned.setting.stride,
                limit=planned.cell.limit,
                mirrored=mirrored,
                budget=IMAGE_BYTES // len(planned.splits),
            ),
        )

    def features(self, split: str, mirrored: bool = False, token: bool = False) -> FeatureStore:
        """Low-resolution features of a split's frames: of all blocks that the protocol asks for, with class
        tokens where its recipe has a use for them."""
        rules, backbone = self.planned.protocol, self.backbone
        token = token or bool(self._recipe.cls_token)
        if rules.layers > 1:
            backbone = backbone.with_layers(rules.layers, rules.final_norm)

        def make() -> FeatureStore:
            given: dict[str, Any] = {"dtype": rules.features_dtype, "cls_token": token, "device": self.device}
            given["memory"] = FEATURE_BYTES // len(self.planned.splits)
            store = FeatureStore(backbone, self.images(split, mirrored), **given)
            choice = self.choice(split)
            if choice is None or choice.stored or store.on_disk() >= len(store):
                return store
            say(f"features of {self.images(split, mirrored).title}: {choice.why}")
            return PassingFeatures(backbone, self.images(split, mirrored), **given)

        return self.keep(("features", split, mirrored, token), make)

    def choice(self, split: str) -> Choice | None:
        """Where the features of a split come from; None where that is no question, as it is not of splits
        that are looked at once, or of recipes without flips."""
        planned = self.planned
        if split != planned.dataset.train_split or not self._recipe.flip:
            return None

        def make() -> Choice:
            setting, layers = planned.setting, planned.protocol.layers
            shape = (setting.channels * layers, *setting.feature_size)
            count = len(self.images(split))
            return choose(count, shape, planned.protocol.features_dtype, self.device, flips=True)

        return self.keep(("choice", split), make)

    @property
    def _recipe(self) -> Recipe:
        """Of a cell of those that share this."""
        planned = self.planned
        own = planned.task.settings().get("probe")
        return planned.protocol.recipe_for(own, planned.cell.probe, planned.dataset.name)

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once."""
        if key not in self._held:
            self._held[key] = make()
        return cast(T, self._held[key])


class MethodScope:
    """What a method adds to a `DataScope`: the method itself, and its views of the splits."""

    def __init__(self, planned: PlannedCell, data: DataScope) -> None:
        """Args: planned: A cell of those that share the scope; data: What its backbone and dataset share."""
        self.planned, self.data = planned, data
        cell = planned.cell
        method = build_method(planned, data.backbone if planned.method.uses_backbone else None)
        self.call = MethodCall(
            method,
            backbone=data.backbone,
            camera=CameraChoice.parse(cell.method.camera),
            device=data.device,
            dtype=getattr(torch, cell.dtype),
            statistics=planned.protocol.guidance_statistics,
        )
        self.shared: dict[Hashable, Any] = {}
        self._views: dict[tuple[str, bool], UpsampledSplit | LayeredSplit] = {}

    def dense(self, split: str, mirrored: bool = False) -> UpsampledSplit | LayeredSplit:
        """The method's view of a split, one for all tasks and seeds."""
        key = (split, mirrored)
        if key not in self._views:
            layers = self.planned.protocol.layers
            features: Any = self.data.features(split, mirrored)
            parts = [features] if layers == 1 else [LayerOf(features, at, layers) for at in range(layers)]
            views = [self._view(split, mirrored, part, layers) for part in parts]
            self._views[key] = views[0] if layers == 1 else LayeredSplit(views)
        return self._views[key]

    def _view(self, split: str, mirrored: bool, features: Any, count: int) -> UpsampledSplit:
        """The method's view of one block's features; count: how many views share the memory."""
        images, planned = self.data.images(split, mirrored), self.planned
        view = UpsampledSplit(
            self.call,
            images,
            features,
            guidance_size=planned.protocol.guidance_size,
            budget=VIEW_BYTES // (len(planned.splits) * count),
            title=images.title,
        )
        view.prepare(f"{planned.cell.method.title} · upsampling {split}")
        return view


class RunContext(Context):
    """The context of one cell."""

    def __init__(
        self, planned: PlannedCell, data: DataScope, method: MethodScope, tasks: Sequence[Task] = ()
    ) -> None:
        """Args: planned: The cell; data, method: What it shares with others; tasks: Of the cells beside
        it."""
        self.protocol, self.dataset = planned.protocol, planned.dataset
        self.seeds, self.device = planned.cell.seeds, data.device
        self.channels = planned.setting.channels
        self.tasks = tuple(tasks) or (planned.task,)
        self._planned, self._data, self._method = planned, data, method

    def samples(self, split: str, mirrored: bool = False) -> SplitImages:
        """See `Context`."""
        return self._data.images(split, mirrored)

    def features(self, split: str, mirrored: bool = False, token: bool = False) -> FeatureStore:
        """See `Context`."""
        return self._data.features(split, mirrored, token)

    def dense(self, split: str, mirrored: bool = False) -> UpsampledSplit | LayeredSplit:
        """See `Context`."""
        return self._method.dense(split, mirrored)

    def upsample(self, image: Tensor, features: Tensor, output_size: Size) -> Tensor:
        """See `Context`."""
        return self._method.call.forward(image.to(self.device), features.to(self.device), output_size)

    def encode(self, image: Tensor) -> Tensor:
        """See `Context`."""
        backbone = self._data.backbone
        with torch.inference_mode():
            features: Tensor = backbone(backbone.fit(image.to(self.device)))
        return features.float()

    def recipe(self, settings: Mapping[str, Any] | None = None) -> Recipe:
        """See `Context`."""
        return self.protocol.recipe_for(settings, self._planned.cell.probe, self.dataset.name)

    def shared(self, key: object, make: Callable[[], T]) -> T:
        """See `Context`."""
        return self._data.shared(("shared", self._planned.task.name, key), make)

    def of_method(self, key: object, make: Callable[[], T]) -> T:
        """See `Context`."""
        name = (key, self.seeds)
        if name not in self._method.shared:
            self._method.shared[name] = make()
        return cast(T, self._method.shared[name])

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """See `Context`."""
        with bar(f"{self._planned.cell.method.title} · {title}", total=total) as opened:
            yield opened


def with_statistics(backbone: Backbone, choice: str) -> Backbone:
    """A backbone that normalises its image with its own statistics ("own"), ImageNet's, or not at all."""
    if choice == "own":
        return backbone
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if choice == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
    return backbone.with_statistics(mean, std)
