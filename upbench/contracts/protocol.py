"""What numbers are comparable under: a `Protocol` and its `Recipe`.

A protocol is a class whose attributes say everything that can move a number and is not the method's, the
backbone's, the dataset's or the task's own business:

    class Mine(Protocol):
        name = "mine"
        version = 1
        geometry = SquareCrop(320)
        recipe = Recipe(epochs=20, schedule="epoch_cosine")

Any change that can move a number raises `version`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from upbench.contracts.geometry import SAMPLINGS, Geometry, Size
from upbench.contracts.registered import Registered
from upbench.errors import UpbenchError, nearest, unknown
from upbench.values import LARGEST_SIDE, choice, flag, number, whole

OPTIMIZERS = ("adamw", "nadam", "adam")
SCHEDULES = ("cosine", "constant", "epoch_cosine", "oscillating", "half_cosine")
DPT_INPUTS = 4
_CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "bias_lr": ("scaled", "common"),
    "init": ("small", "conv"),
    "cls_token": ("", "plain", "unit"),
    "order": ("own", "shared", "stored"),
    "head": ("linear", "dpt", "dpt_same_size"),
    "trained_on": ("method", "backbone", "backbone_then_method"),
}
_RANGES: dict[str, tuple[float, float, bool]] = {  # low, high, whether the value must be above low
    "lr": (0, 10, True),
    "weight_decay": (0, 10, False),
    "warmup": (0, 1, False),
    "lr_floor": (0, 1, False),
    "crop": (0, 1, True),
    "shrinkage": (0, 1000, False),
    "flip": (0, 1, False),
    "first_lr": (0, 10, False),
}


@dataclass(frozen=True)
class Recipe:
    """How a linear probe is trained; the same for every method.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step; the last step of an epoch takes what is left.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay ("adam": L2 penalty), on the weight.
        warmup: Fraction of all steps over which the learning rate rises linearly.
        schedule: After the warm-up: "cosine" (to `lr_floor` at the last step), "constant", "epoch_cosine" (a
            cosine over epochs, constant within one), "oscillating" (a cosine whose half period is as many
            *steps* as there are epochs, without end: a scheduler that is made for epochs and stepped every
            iteration) or "half_cosine" (a quarter of a period of cosine, to `lr_floor`).
        crop: Side of the part of the output that a step sees, as a fraction of the output's side; 1 is all.
        shrinkage: How far features are decorrelated before the probe is fitted; None for not at all. Along a
            principal axis of variance v they are scaled by 1 / sqrt(v + shrinkage * m), with m the mean
            variance of the axes: 0 is whitening, a large value leaves the axes as they are. An affine
            reparametrisation of the same probe, folded into its weight and bias.
        optimizer: "adamw", "nadam" or "adam", with PyTorch's betas and epsilon.
        bias_lr: "scaled": the bias learns sqrt(C) times as fast as a weight; "common": at the same rate.
        decay_bias: Whether weight decay acts on the bias, too.
        lr_floor: Fraction of the peak at which the warm-up begins (0: one step above nothing) and cosines
            end.
        init: Initial weights: "small" (normal, deviation 0.01, bias 0) or "conv" (uniform in +-1 / sqrt(C),
            bias too: that of PyTorch's convolutions).
        flip: Probability with which a whole batch, images and ground truth, is flipped horizontally.
        order: "own": every seed has its own order of images; "shared": all seeds see the same batches and
            differ in their initial weights; "stored": the same, in the dataset's order, not shuffled.
        cls_token: Whether the head sees the backbone's class token beside the features of every pixel: "" for
            no, "plain", or "unit" for one of length 1.
        head: "linear": a 1x1 convolution; "dpt": that of Ranftl et al. 2021, on four maps
            (`Protocol.layers`) or on one that is given four times, whose prediction is 16 times as large as
            they are; "dpt_same_size": the same without its enlargements.
        trained_on: "method": a head of its own for each method, on its features; "backbone": one head for
            all, on the backbone's own features, whose outputs are enlarged bilinearly, and applied to the
            methods' features as it is (a frozen head); "backbone_then_method": each method goes on from it.
        first_lr: Peak learning rate of the head on the backbone's own features, for
            "backbone_then_method"; 0 is `lr`.
    """

    epochs: int = 60
    batch_size: int = 8
    lr: float = 0.01
    weight_decay: float = 0.3
    warmup: float = 0.05
    schedule: str = "cosine"
    crop: float = 0.25
    shrinkage: float | None = 1.0
    optimizer: str = "adamw"
    bias_lr: str = "scaled"
    decay_bias: bool = False
    lr_floor: float = 0.0
    init: str = "small"
    flip: float = 0.0
    order: str = "own"
    cls_token: str = ""
    head: str = "linear"
    trained_on: str = "method"
    first_lr: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            choice(f"probe {name}", getattr(self, name), choices)
        flag("probe decay_bias", self.decay_bias)
        for name in ("epochs", "batch_size"):
            whole(f"probe {name}", getattr(self, name), most=100_000)
        for name, (low, high, above) in _RANGES.items():
            value = getattr(self, name)
            if not (name == "shrinkage" and value is None):
                number(f"probe {name}", value, low, high, above=above)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Output:
    """How large the upsampled features are.

    Attributes:
        of: "image": a multiple of the image's size; "features": of the features' grid; "fixed": `side`
            squared.
        factor: The multiple.
        side: Pixels, for "fixed".
    """

    of: str = "image"
    factor: float = 1.0
    side: int = 0

    def __post_init__(self) -> None:
        choice("output size", self.of, ("image", "features", "fixed"))
        whole("output side", self.side, int(self.of == "fixed"), LARGEST_SIDE)
        number("output factor", self.factor, 0, 1000, above=True)

    def size(self, image: Size, features: Size) -> Size:
        """(H, W) for an image and its features of these sizes."""
        if self.of == "fixed":
            return self.side, self.side
        height, width = image if self.of == "image" else features
        return max(1, round(height * self.factor)), max(1, round(width * self.factor))


@dataclass(frozen=True)
class Scoring:
    """What predictions are compared with.

    Attributes:
        at: "output": ground truth at the size of the output; "frame": at that of the image that is seen;
            "stored": at the size of the dataset's own files, which no geometry touched.
        enlarge: How a prediction of another size gets there: "logits" (the probe's outputs, bilinearly) or
            "labels" (the predicted classes, by nearest; for segmentation).
        other: Whether the class "other" of a dataset that has one (`Dataset.other_class`) counts among the
            classes whose mean is taken.
    """

    at: str = "output"
    enlarge: str = "logits"
    other: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("at", ("output", "frame", "stored")), ("enlarge", ("logits", "labels"))):
            choice(f"scoring '{name}'", getattr(self, name), choices)
        flag("scoring 'other'", self.other)


class Protocol(Registered, ABC):
    """A named and versioned way to measure. A subclass with a `name` is registered.

    Attributes:
        name: As in `--protocol quick`.
        version: Rises with every change that can move a number.
        other_names: Other names of the same protocol, as where two papers share one; records have `name`.
        title: Name in tables; `name` where empty.
        source: Paper and code that it follows.
        exact: "exact", or "open: ..." with what could not be decided from what is public.
        departures: Where it differs from its source, one sentence each.
        facts: Parameter -> where its value was read, as in {"recipe.lr": "train config, line 12"}.
        tasks: Names of the tasks that it is made for; empty for any.
        geometry: What of an image is seen.
        output: How large the upsampled features are, and with them the ground truth that a probe is trained
            on.
        sampling: How ground truth is read at another size than the image's (`upbench.contracts.geometry`).
        guidance_size: Size of the image that methods get: "image" (that of the backbone) or "output".
        backbone_statistics: How the backbone's image is normalised: "own" (the backbone's), "imagenet",
            "none" (0..1 as it is).
        guidance_statistics: How the method's image is normalised: "method" (its own), "backbone", "imagenet",
            "none".
        labels: "all": the dataset's label values as they are; "without_other": pixels of its class "other"
            are ignored, and the probe has no output for it.
        features_dtype: What low-resolution features are kept in: "float32" or "float16".
        layers: How many of the backbone's blocks give features, evenly spaced: 1 is the last one alone, 4 of
            12 are the third, sixth, ninth and last. Methods upsample each block's map by itself.
        final_norm: Whether the backbone's last normalisation is applied to them.
        recipe: Training of the probe.
        task_recipes: Whether tasks may bring settings of their own (`ProbeTask.probe`); no where a paper has
            one recipe for all.
        objective: Whose losses and metrics tasks have that know several (`Task.under`): "own" for the
            project's; "probe3d", "probe3d_2025" (as its code was until November 2025) or "jafar".
        scoring: What predictions are compared with.
    """

    kind: ClassVar[str] = "protocol"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    version: ClassVar[int] = 1
    other_names: ClassVar[Sequence[str]] = ()
    title: ClassVar[str] = ""
    source: ClassVar[str] = "upbench"
    exact: ClassVar[str] = "exact"
    departures: ClassVar[Sequence[str]] = ()
    facts: ClassVar[Mapping[str, str]] = {}
    tasks: ClassVar[Sequence[str]] = ()

    geometry: Geometry
    output: Output = Output()
    sampling: str = "centre"
    guidance_size: str = "image"
    backbone_statistics: str = "own"
    guidance_statistics: str = "method"
    labels: str = "all"
    features_dtype: str = "float32"
    layers: int = 1
    final_norm: bool = True
    recipe: Recipe = Recipe()
    task_recipes: bool = True
    objective: str = "own"
    scoring: Scoring = Scoring()

    _CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {
        "sampling": SAMPLINGS,
        "guidance_size": ("image", "output"),
        "backbone_statistics": ("own", "imagenet", "none"),
        "guidance_statistics": ("method", "backbone", "imagenet", "none"),
        "labels": ("all", "without_other"),
        "features_dtype": ("float32", "float16"),
        "objective": ("own", "probe3d", "probe3d_2025", "jafar"),
    }
    PARAMETERS: ClassVar[Sequence[str]] = (
        *("geometry", "output", "sampling", "guidance_size", "backbone_statistics", "guidance_statistics"),
        *("labels", "features_dtype", "layers", "final_norm", "recipe", "task_recipes", "objective"),
        "scoring",
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if isinstance(cls.__dict__.get("name"), str):
            cls._check()  # before it is registered
        super().__init_subclass__(**kwargs)

    @classmethod
    def _check(cls) -> None:
        """Raises UpbenchError for a parameter that is missing or says what no protocol can mean."""
        if not isinstance(getattr(cls, "geometry", None), Geometry):
            raise UpbenchError(f"protocol '{cls.name}' has no geometry: set it to one, as in SquareCrop(224)")
        for name, kind in (("output", Output), ("recipe", Recipe), ("scoring", Scoring)):
            if not isinstance(getattr(cls, name), kind):
                raise UpbenchError(f"protocol '{cls.name}': '{name}' must be of class {kind.__name__}")
        for name, choices in cls._CHOICES.items():
            choice(f"'{name}' of protocol '{cls.name}'", getattr(cls, name), choices)
        whole(f"protocol '{cls.name}': version", cls.version)
        for name in ("task_recipes", "final_norm"):
            flag(f"protocol '{cls.name}': '{name}'", getattr(cls, name))
        whole(f"protocol '{cls.name}': layers", cls.layers)
        if cls.layers not in (1, DPT_INPUTS) or (cls.layers > 1 and cls.recipe.head == "linear"):
            raise UpbenchError(
                f"protocol '{cls.name}': layers is 1, or {DPT_INPUTS} for the head 'dpt'; got {cls.layers}"
            )
        cls._check_names()

    @classmethod
    def _check_names(cls) -> None:
        """Raises UpbenchError for an attribute that was meant to be a parameter and would be ignored."""
        recipe = [f.name for f in dataclasses.fields(Recipe)]
        known = [name for name in vars(Protocol) if not name.startswith("_")]
        for name, value in cls.__dict__.items():
            if (
                name in (*known, *cls.PARAMETERS, "geometry", "name")
                or name.startswith("_")
                or name.isupper()
            ):
                continue
            if callable(value) or hasattr(value, "__get__"):
                continue
            guess = nearest(name, [*known, "geometry"])
            if name in recipe:
                raise UpbenchError(
                    f"protocol '{cls.name}' has no parameter '{name}'; it is one of its recipe"
                )
            if guess:
                raise UpbenchError(
                    f"protocol '{cls.name}' has no parameter '{name}'; did you mean '{guess}'? "
                    "(what is not meant to be one may begin with '_')"
                )

    @property
    def label(self) -> str:
        """Name and version, as in "quick-v1"."""
        return f"{self.name}-v{self.version}"

    def recipe_for(
        self, task: Mapping[str, Any] | None = None, user: Mapping[str, Any] | None = None, dataset: str = ""
    ) -> Recipe:
        """Training of a probe: the protocol's recipe, then the task's settings where they may count, then the
        user's. Protocols whose recipe depends on the dataset override this.

        Args:
            task: Settings that the task brings.
            user: Settings that the user asks for; the protocol is then not kept, and tables say so.
            dataset: Name of the dataset.

        Raises:
            UpbenchError: A setting that `Recipe` does not have, or a value out of range.
        """
        settings = {**((task or {}) if self.task_recipes else {}), **(user or {})}
        known = [f.name for f in dataclasses.fields(Recipe)]
        for name in settings:
            if name not in known:
                raise unknown("probe setting", name, known)
        return dataclasses.replace(self.recipe, **settings)

    def describe(self) -> Iterator[tuple[str, Any, str]]:
        """(parameter, value, where it was read) of every parameter, those of nested ones by dotted names."""
        for name in self.PARAMETERS:
            value = getattr(self, name)
            if isinstance(value, Geometry):
                yield name, type(value).__name__, self.facts.get(name, "")
                inner: Mapping[str, Any] = value.describe()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                inner = dataclasses.asdict(value)
            else:
                yield name, value, self.facts.get(name, "")
                continue
            for key, part in inner.items():
                yield f"{name}.{key}", part, self.facts.get(f"{name}.{key}", "")

    def to_dict(self) -> dict[str, Any]:
        """Name, version and every parameter as plain values, for records."""
        parameters = {name: _plain(value) for name, value, _ in self.describe()}
        return {"name": self.name, "version": self.version, "exact": self.exact, "parameters": parameters}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
