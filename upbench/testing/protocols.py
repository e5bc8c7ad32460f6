"""The contract of `Protocol`, as checks that run on any protocol in seconds."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from upbench.contracts.geometry import Frame, Geometry, Size
from upbench.contracts.protocol import Protocol, Recipe
from upbench.contracts.sample import Camera, Sample
from upbench.errors import UpbenchError, nearest
from upbench.registry import plugins
from upbench.testing.checks import ContractError, require, run_checks

SIZES: tuple[Size, ...] = ((1, 1), (37, 91), (91, 37), (480, 640), (2000, 300))
"""(H, W) of images that every geometry must find frames in."""
STRIDES = (1, 14, 16)


@dataclass
class ProtocolCase:
    """A protocol under test.

    Attributes:
        cls: The class.
    """

    cls: type[Protocol]

    @cached_property
    def protocol(self) -> Protocol:
        """An instance."""
        return self.cls()

    @cached_property
    def described(self) -> dict[str, tuple[Any, str]]:
        """Parameter -> its value, and where that was read."""
        return {name: (value, fact) for name, value, fact in self.protocol.describe()}


def check_protocol(cls: type[Protocol], *, skip: Mapping[str, str] | None = None) -> dict[str, str]:
    """Holds a protocol to the contract of `Protocol`.

    Args:
        cls: The class.
        skip: Name of a check (a key of `PROTOCOL_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok".

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    return run_checks(f"protocol '{cls.name}'", PROTOCOL_CHECKS, ProtocolCase(cls), skip or {})


def declarations(case: ProtocolCase) -> None:
    """What a reader must know is said, and parameters have values that mean something."""
    protocol = case.protocol
    case.cls._check()
    require(type(protocol.version) is int and protocol.version >= 1, f"version is {protocol.version!r}")
    for name in ("title", "source", "exact"):
        require(isinstance(getattr(protocol, name), str), f"{name} is no text")
    require(protocol.source.strip(), "says no source")
    open_, _, what = protocol.exact.partition(": ")
    is_open = open_ == "open" and what.strip()
    require(protocol.exact == "exact" or is_open, f"exact is '{protocol.exact}', not 'exact' or 'open: ...'")
    for name in ("departures", "tasks"):
        value = getattr(protocol, name)
        texts = not isinstance(value, str) and all(isinstance(v, str) and v.strip() for v in value)
        require(texts, f"{name} is {value!r}, not a sequence of texts")
    for task in protocol.tasks:
        guess = nearest(task, plugins("task"))
        require(task in plugins("task"), f"is for the task '{task}', which there is not; '{guess}'?")


def attributes(case: ProtocolCase) -> None:
    """Nothing is set that nobody reads, as a parameter with a slip in its name."""
    known = {name for cls in Protocol.__mro__ for name in (*vars(cls), *getattr(cls, "__annotations__", ()))}
    for cls in case.cls.__mro__:
        if issubclass(cls, Protocol) and cls is not Protocol:
            for name, value in vars(cls).items():
                helper = (
                    name.startswith("_") or name.isupper() or callable(value) or hasattr(value, "__get__")
                )
                if name not in known and not helper:
                    guess = nearest(name, Protocol.PARAMETERS)
                    hint = f"; did you mean '{guess}'?" if guess else ""
                    raise ContractError(f"sets '{name}', which no protocol has{hint}")


def description(case: ProtocolCase) -> None:
    """`describe` tells every parameter once, in values that JSON holds as they are."""
    told = [name for name, _, _ in case.protocol.describe()]
    require(len(set(told)) == len(told), f"a parameter is told twice: {told}")
    for name in Protocol.PARAMETERS:
        require(any(t.split(".")[0] == name for t in told), f"'{name}' is not told")
    for field in dataclasses.fields(case.protocol.geometry):  # type: ignore[arg-type]
        require(f"geometry.{field.name}" in told, f"'geometry.{field.name}' is not told")
    for field in dataclasses.fields(Recipe):
        require(f"recipe.{field.name}" in told, f"'recipe.{field.name}' is not told")
    record = case.protocol.to_dict()
    require(json.loads(json.dumps(record)) == record, "to_dict() is not what JSON gives back")
    require(case.cls().to_dict() == record, "another instance is told otherwise")


def facts(case: ProtocolCase) -> None:
    """Facts are about parameters that there are, in words."""
    for name, fact in case.protocol.facts.items():
        if name not in case.described:
            guess = nearest(name, case.described)
            raise ContractError(f"facts name '{name}', which is no parameter; '{guess}'?")
        require(isinstance(fact, str) and fact.strip(), f"the fact about '{name}' is {fact!r}")


def frames(case: ProtocolCase) -> None:
    """Images of odd sizes have frames, always the same, of the size that the geometry promises."""
    geometry = case.protocol.geometry
    for size in SIZES:
        for stride in STRIDES:
            where = f"an image of {size[0]}x{size[1]} at stride {stride}"
            found = list(geometry.frames(size, stride))
            require(found, f"{where} has no frame")
            require(all(isinstance(frame, Frame) for frame in found), f"{where}: {found[0]!r} is no Frame")
            require(list(geometry.frames(size, stride)) == found, f"{where} has other frames each time")
            require(geometry.windows or len(found) == 1, f"{where} has {len(found)} frames, but no windows")
            require(all(frame.source == size for frame in found), f"{where}: frames of another image")
            promised = geometry.size(stride)
            sizes = sorted({frame.size for frame in found})
            require(promised is None or sizes == [promised], f"{where}: frames {sizes}, promised {promised}")
            require(all(bool(f.inside().any()) for f in found), f"{where}: a frame shows nothing of it")


def samples(case: ProtocolCase) -> None:
    """An image and its ground truth go through the frames: floats in 0..1, and truth of the output's size."""
    protocol, stride = case.protocol, 14
    for height, width in SIZES:
        sample = _sample(height, width)
        found = list(protocol.geometry.frames(sample.size, stride))
        for frame in {0: found[0], len(found) - 1: found[-1]}.values():
            where = f"an image of {height}x{width}"
            cells = (max(1, frame.size[0] // stride), max(1, frame.size[1] // stride))
            output = protocol.output.size(frame.size, cells)
            framed = frame.of(sample, output, protocol.sampling)
            image = framed.image
            require(image.shape == (3, *frame.size), f"{where}: image {list(image.shape)}")
            in_range = image.dtype == torch.float32 and 0 <= float(image.min()) <= float(image.max()) <= 1
            require(in_range, f"{where}: the image is not float32 in 0..1")
            for name in ("valid", "label", "depth", "normal"):
                shape = tuple(getattr(framed, name).shape[-2:])
                require(shape == output, f"{where}: {name} {list(shape)} for an output of {list(output)}")
            require(frame.mirror().mirror() == frame, f"{where}: mirrored twice it is another frame")


@cache
def _sample(height: int, width: int) -> Sample:
    generator = torch.Generator().manual_seed(0)
    shape = (height, width)
    return Sample(
        "noise",
        torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8),
        label=torch.randint(0, 3, shape, generator=generator, dtype=torch.uint8),
        depth=1 + torch.rand(shape, generator=generator),
        normal=torch.nn.functional.normalize(torch.randn(3, *shape, generator=generator), dim=0),
        camera=Camera(torch.tensor([[float(width), width, width / 2, height / 2]])),
    )


def geometry(case: ProtocolCase) -> None:
    """The geometry is a frozen dataclass whose key is the same in every process and tells its parameters."""
    own: Any = case.protocol.geometry
    settings = getattr(type(own), "__dataclass_params__", None)
    frozen = settings is not None and settings.frozen
    require(frozen, f"{type(own).__name__} is not a frozen dataclass: its key would not tell its parameters")
    require(isinstance(own.key, str) and "\n" not in own.key, f"key {own.key!r} is not one line")
    again: Geometry = pickle.loads(pickle.dumps(own))
    require(again.key == own.key and again == own, f"the key changes on the way: {own.key}, {again.key}")
    require(" at 0x" not in own.key, f"the key names a place in memory: {own.key}")
    for name, value in own.describe().items():
        require(f"{name}={value!r}" in own.key, f"the key does not tell {name}: {own.key}")


def recipe(case: ProtocolCase) -> None:
    """A recipe comes of what protocol, task and user ask for, in this order; slips are refused."""
    protocol = case.protocol
    plain = protocol.recipe_for()
    require(isinstance(plain, Recipe), f"recipe_for() gives {plain!r}")
    asked = {"epochs": plain.epochs + 1}
    for dataset in plugins("dataset"):
        found = protocol.recipe_for(dataset=dataset)
        require(isinstance(found, Recipe), f"recipe_for() gives {found!r} for dataset '{dataset}'")
    of_task = protocol.recipe_for(asked).epochs
    wanted = plain.epochs + protocol.task_recipes
    require(of_task == wanted, f"a task asks for {asked['epochs']} epochs and gets {of_task}")
    of_user = protocol.recipe_for({"epochs": plain.epochs + 2}, asked).epochs
    require(of_user == asked["epochs"], f"the user asks for {asked['epochs']} epochs and gets {of_user}")
    try:
        protocol.recipe_for({}, {"epoch": 3})
    except UpbenchError as error:
        require("'epochs'" in str(error), f"does not suggest 'epochs': {error}")
    else:
        raise ContractError("takes the probe setting 'epoch', which there is not")


def pickling(case: ProtocolCase) -> None:
    """It travels to another process, and is the same there."""
    again = pickle.loads(pickle.dumps(case.protocol))
    require(type(again) is case.cls, "another class comes back")
    require(again.to_dict() == case.protocol.to_dict(), "other parameters come back")


PROTOCOL_CHECKS: dict[str, Callable[[ProtocolCase], None]] = {
    "declarations": declarations,
    "attributes": attributes,
    "description": description,
    "facts": facts,
    "frames": frames,
    "samples": samples,
    "geometry": geometry,
    "recipe": recipe,
    "pickling": pickling,
}
