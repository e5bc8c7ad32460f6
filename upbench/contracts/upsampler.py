"""The contract of a method: `Upsampler`, what it is asked to do and what it may answer.

A minimal method is a subclass with a `name` and a `forward`:

    import torch.nn.functional as F
    from upbench import Upsampler

    class Smooth(Upsampler):
        name = "smooth"

        def forward(self, image, features, output_size):
            return F.interpolate(features, output_size, mode="bicubic")

Everything else below has a default that fits such a method.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD, normalize_image, per_channel
from upbench.contracts.registered import Registered
from upbench.contracts.sample import Camera
from upbench.errors import UpbenchError, reason, shown, unknown
from upbench.values import LARGEST_CHANNELS, whole

if TYPE_CHECKING:
    from upbench.contracts.backbone import Backbone
    from upbench.contracts.operator import Operator
    from upbench.contracts.weights import Weights


@dataclass(frozen=True)
class Setting:
    """What a method is asked to do in a cell; `Upsampler.skip_reason` decides on it beforehand.

    Attributes:
        backbone: Name of the backbone.
        channels: C of its features.
        stride: Pixels of the image per feature.
        image_size: (h_img, w_img) of the guidance image in pixels.
        feature_size: (h, w) of the low-resolution features.
        output_size: (H, W) asked for.
        weights: Which weights, as given by the user ("default", "none", a name or a path).
        device: "cpu" or "cuda".
        patch_size: Side of the patches of a plain ViT, None for any other backbone (`Backbone.patch_size`).
    """

    backbone: str
    channels: int
    stride: int
    image_size: tuple[int, int]
    feature_size: tuple[int, int]
    output_size: tuple[int, int]
    weights: str = "default"
    device: str = "cpu"
    patch_size: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a method's inputs and output.

    Attributes:
        channels: C of the features.
        image_size: (h_img, w_img) of the guidance image in pixels.
        feature_size: (h, w) of the low-resolution features.
        output_size: (H, W).
        batch: Images at a time, B.
    """

    channels: int
    image_size: tuple[int, int]
    feature_size: tuple[int, int]
    output_size: tuple[int, int]
    batch: int = 1

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """An image and features of noise, always the same."""
        import torch

        generator = torch.Generator().manual_seed(0)
        image = torch.rand(self.batch, 3, *self.image_size, generator=generator)
        features = torch.randn(self.batch, self.channels, *self.feature_size, generator=generator)
        return image.to(device, dtype), features.to(device, dtype)


@dataclass(frozen=True)
class MacCount:
    """MACs of one forward pass.

    Attributes:
        total: All of them.
        by_operator: Name of the operation -> MACs.
        uncounted: Names of operations that nobody knows how to count, sorted; empty for a complete count.
        note: How it was counted, where that was not by a trace of the whole pass (`Upsampler.macs`).
    """

    total: int
    by_operator: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    note: str = ""


class Upsampler(nn.Module, Registered):
    """A feature upsampler: low-resolution features and the image they were computed from, to dense features.

    Class attributes are what a reader of a table wants to know; only `name` is required.

    Attributes:
        name: Name on the command line and in records.
        title: Name as the paper writes it; `name` where empty.
        paper: Reference, as in "Author et al., Venue Year, arXiv 0000.00000".
        year: Year of publication.
        license: License of the official code, or "" where the method has none.
        guided: Whether the output depends on the image.
        trainable: Whether it has parameters that `upbench train` fits.
        linear: Whether, for a fixed image, each output channel is the same linear function of its input
            channel (the case of every method whose weights come from the image alone).
        uses_camera: Whether `forward` takes `camera=`.
        uses_backbone: Whether `forward` takes `backbone=` and runs it: the frozen backbone that the features
            come from, `[B, 3, H, W]` RGB in 0..1 (`denormalize`) to features, in float32 whatever the method
            computes in. `operator`, `tile_operator` and `macs` take it too where the method defines them. Its
            cost is part of the method's.
        precise_image: Whether `forward` takes the image in float32 even where the method and the features are
            in half precision: of methods to which a rounded image is another image.
        channel_multiple: What C has to be a multiple of, as where heads share the channels out.
        native_ratio: The upsampling ratio that the method's steps are made of (its only one, or that of a
            step that is repeated), None where it makes any size by itself. Information for tables: `forward`
            gives every size all the same, resized bilinearly from the next one that the method makes
            (`upbench.ops.resample.to_size`).
        mean, std: Statistics that its guidance image is normalised with.
        weights: Checkpoints that are known by name.
        default_weights: The one of them that `weights="default"` stands for; None where the method needs
            none.
        preset_options: Preset -> options of the constructor that a run under it sets unless the user does,
            such as a smaller budget for a test-time optimisation under "quick". They stand in the record and
            among its warnings, and the row's name tells. "contract" are those of the contract tests.
    """

    kind: ClassVar[str] = "method"
    registered: ClassVar[dict[str, type]] = {}

    name: ClassVar[str]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    year: ClassVar[int | None] = None
    license: ClassVar[str] = ""
    licence: ClassVar[str] = ""  # as the first edition spelt it: the same as `license`
    guided: ClassVar[bool] = True
    trainable: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    uses_camera: ClassVar[bool] = False
    uses_backbone: ClassVar[bool] = False
    precise_image: ClassVar[bool] = False
    channel_multiple: ClassVar[int] = 1
    native_ratio: ClassVar[int | None] = None
    mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_STD
    weights: ClassVar[Mapping[str, Weights]] = {}
    default_weights: ClassVar[str | None] = None
    preset_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "license" not in cls.__dict__ and "licence" in cls.__dict__:
            cls.license = cls.__dict__["licence"]
        cls.licence = cls.license
        super().__init_subclass__(**kwargs)

    def __init__(self, channels: int = 384) -> None:
        """Args: channels: C of the features; a method that works for any C ignores it."""
        super().__init__()
        self.channels = channels

    @abstractmethod
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        """Upsamples features. What it is given must be the same afterwards: other code sees it, too.

        Args:
            image: `[B, 3, h_img, w_img]` RGB, normalised with `mean` and `std`.
            features: `[B, C, h, w]`.
            output_size: (H, W); any, smaller or larger than the image, integer ratio or not.

        Returns:
            `[B, C, H, W]`, dtype and device of `features`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Camera | None = None
    ) -> Operator | None:
        """The upsampling of these features as a linear operator on any values that stand in their place.

        A 1x1 probe commutes with such an operator: classes can be predicted at low resolution and upsampled,
        at a fraction of the cost and with the same result. Methods with attention return their weights;
        `linear` methods get one from their `forward`; those that compute features of their own return a
        `SourcedOperator`, which brings them along; the rest return None and are probed on their dense
        features.

        Args: as for `forward`; of a method that runs the backbone also `backbone`.
        """
        from upbench.contracts.operator import FunctionOperator

        if not self.linear or (self.uses_backbone and takes(type(self).forward, "backbone")):
            return None
        given = extras(self, camera=camera)
        held = image.numel() * image.element_size()
        return FunctionOperator(
            lambda values: self(image, values, output_size, **given), output_size, held=held
        )

    def tile_operator(
        self,
        image: Tensor,
        features: Tensor,
        output_size: tuple[int, int],
        camera: Camera | None = None,
        backbone: Backbone | None = None,
        *,
        memory_budget: int,
    ) -> Operator | None:
        """The same operator for an output that is too large to be had at once (see `upbench.dense.tiles`).

        Its crops are what is computed. A method whose `operator` holds something for every output pixel
        should return one here that does not.

        Args:
            image: As for `operator`.
            features: As for `operator`.
            output_size: As for `operator`.
            camera: As for `operator`.
            backbone: As for `operator`.
            memory_budget: Bytes that the result may hold and take to be made, about.
        """
        given = extras(self, "operator", camera=camera, backbone=backbone)
        return self.operator(image, features, output_size, **given)

    def macs(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> MacCount | None:
        """MACs of a pass that no trace can follow (one that fits something to the image, with gradients);
        None, the default, has the pass traced.

        Args: as for `forward`.
        """
        return None

    def normalize(self, image01: Tensor) -> Tensor:
        """`[B, 3, h_img, w_img]` RGB in 0..1, as `forward` wants it."""
        return normalize_image(image01, self.mean, self.std)

    def denormalize(self, image: Tensor) -> Tensor:
        """The image that `forward` was given as `[B, 3, h_img, w_img]` float32 RGB in 0..1, as a backbone
        wants it."""
        mean, std = (per_channel(values, image.float()) for values in (self.mean, self.std))
        return (image.float() * std + mean).clamp(0, 1)

    def given(self, backbone: Backbone | None) -> Backbone:
        """The backbone that a method with `uses_backbone` was called with.

        Raises:
            UpbenchError: It was called without.
        """
        if backbone is None:
            raise UpbenchError(
                f"method '{self._called}' runs the backbone itself and has none: call it with backbone=..."
            )
        return backbone

    @property
    def backbone(self) -> Backbone:
        """The backbone, for plugins of the first edition, whose `forward` takes none (`attach_backbone`).

        It is no part of the method (absent from its parameters, modules and state dict), stays on its device
        and in float32, and is shared by copies of the method. It travels along when the method is pickled.

        Raises:
            UpbenchError: None was attached.
        """
        attached: _Attached | None = self.__dict__.get("_attached")
        if attached is None:
            raise UpbenchError(
                f"method '{self._called}' runs the backbone itself and has none: give it one with "
                f"load_method('{self._called}', backbone=...)"
            )
        return attached.backbone

    def attach_backbone(self, backbone: Backbone) -> None:
        """Makes a backbone `self.backbone`: for plugins of the first edition. `extras` does it for them.

        Raises:
            UpbenchError: The method does not run one.
        """
        if not self.uses_backbone:
            raise UpbenchError(f"method '{self._called}' runs no backbone")
        self.__dict__["_attached"] = _Attached(backbone)  # past nn.Module, which would register it

    @property
    def _called(self) -> str:
        return getattr(self, "name", type(self).__name__)

    @classmethod
    def skip_reason(cls, setting: Setting) -> str | None:
        """Why the method cannot run in this setting, in words, or None where it can.

        By default it can wherever C is a multiple of `channel_multiple`.
        """
        if setting.channels % cls.channel_multiple:
            return f"{cls.name} needs a multiple of {cls.channel_multiple} channels, not {setting.channels}"
        return None

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of the constructor's options beside `channels`."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        return tuple(p.name for p in named if p.name not in ("self", "channels"))

    @classmethod
    def build(cls, channels: int = 384, **options: Any) -> Upsampler:
        """Constructs the method, naming the nearest option where one is not known.

        Raises:
            UpbenchError: An option that the method does not have, or a value that it refuses.
        """
        cls.check_options(options)
        parameters = inspect.signature(cls.__init__).parameters
        for option, value in options.items():
            _check_kind(f"option '{option}' of method '{cls.name}'", parameters[option].annotation, value)
        whole("channels", channels, most=LARGEST_CHANNELS)
        takes_channels = "channels" in parameters
        try:
            return cls(channels=channels, **options) if takes_channels else cls(**options)
        except (TypeError, ValueError, MemoryError, OverflowError) as error:
            given = shown({"channels": channels, **options})
            raise UpbenchError(f"method '{cls.name}' refuses {given}: {reason(error)}") from error
        except RuntimeError as error:
            if "memory" not in str(error) and "overflow" not in str(error):
                raise
            given = shown({"channels": channels, **options})
            raise UpbenchError(f"method '{cls.name}' with {given} does not fit into memory") from error

    @classmethod
    def check_options(cls, options: Iterable[str]) -> None:
        """Whether the constructor has options of these names.

        Raises:
            UpbenchError: One that it does not have; the nearest is suggested.
        """
        names = cls.option_names()
        for option in options:
            if option not in names:
                raise unknown(f"option of method '{cls.name}'", option, names)

    @classmethod
    def options_from(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor options (and `channels`, where it matters) that a checkpoint's tensors imply.

        Args: state: The tensors as `convert_state` named them.
        """
        return {}

    @classmethod
    def convert_state(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint in the official key names, in this module's; names that are ours pass unchanged."""
        return dict(state)


def extras(
    method: Upsampler,
    function: str = "forward",
    *,
    camera: Camera | None = None,
    backbone: Backbone | None = None,
) -> dict[str, Any]:
    """What a function of a method is to be called with beside image, features and output size.

    The camera goes to a method with `uses_camera`, the backbone to one with `uses_backbone`, each where the
    function has a parameter for it:

        method(image, features, output_size, **extras(method, camera=camera, backbone=backbone))

    A method of the first edition, which runs the backbone without a parameter for it, has it attached.

    Args:
        method: The method.
        function: Name of the function: "forward", "operator", "tile_operator" or "macs".
        camera: None where there is none.
        backbone: On the method's device; None where there is none.
    """
    called = getattr(type(method), function)
    given: dict[str, Any] = {}
    if method.uses_camera and takes(called, "camera"):
        given["camera"] = camera
    if backbone is not None and method.uses_backbone:
        if takes(called, "backbone"):
            given["backbone"] = backbone
        if not takes(type(method).forward, "backbone"):
            method.attach_backbone(backbone)
    return given


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}


def _check_kind(name: str, annotation: Any, value: Any) -> None:
    """Raises UpbenchError for what is no number, or no truth, where a parameter is annotated as one.

    Parameters of text say better themselves which texts they know.
    """
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    kinds = [part.strip() for part in text.split("|")]
    if not set(kinds) <= set(_KINDS):
        return
    if isinstance(value, int) and not isinstance(value, bool):
        fits = "int" in kinds or "float" in kinds
    else:
        fits = ("None" if value is None else type(value).__name__) in kinds
    if not fits or (isinstance(value, float) and not isfinite(value)):
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        raise UpbenchError(f"{name} must be {wanted}, got {shown(value)}")


@cache
def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, or takes any keyword."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


class _Attached:
    """Holds a backbone; deep copies hold the same one."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __deepcopy__(self, memo: Any) -> _Attached:
        return self
