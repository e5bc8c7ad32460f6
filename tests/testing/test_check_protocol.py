"""`check_protocol` finds what it is there to find: each broken protocol fails the check it should."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from upbench.contracts.geometry import Frame, Geometry
from upbench.contracts.protocol import Output, Protocol, Recipe
from upbench.protocols.geometry import NativeAspect, PaddedSquare, SquareCrop, Squash, Windows
from upbench.testing import PROTOCOL_CHECKS, ContractError, check_protocol


class Good(Protocol):
    """Sound, to be broken; unregistered, for its name comes after the class body."""

    geometry = SquareCrop(56)
    facts = {"geometry.side": "a guess", "recipe.lr": "the paper, section 4"}
    HELPER = 3

    @property
    def helper(self) -> int:
        return 4


class Open(Good):
    exact = "open: which images were used"
    departures = ("one seed",)
    tasks = ("seg",)


class InPieces(Good):
    geometry = Windows(56, 40)
    facts = {}


class AtItsAspect(Good):
    geometry = NativeAspect(short=56)
    facts = {}
    output = Output("features", 4)


class InWholePatches(Good):
    geometry = NativeAspect(fit="crop")
    facts = {}
    output = Output("fixed", side=32)


class Padded(Good):
    geometry = PaddedSquare(64)
    sampling = "floor"


class Squashed(Good):
    geometry = Squash(28, 70)
    facts = {}
    output = Output("image", 0.5)


class OneRecipe(Good):
    task_recipes = False


class NoVersion(Good):
    version = "1"  # type: ignore[assignment]


class NoSource(Good):
    source = " "


class OpenWithoutAQuestion(Good):
    exact = "open"


class OneDeparture(Good):
    departures = "one seed"


class ForATaskThatIsNot(Good):
    tasks = ("segg",)


class NoGeometry(Good):
    geometry = 56  # type: ignore[assignment]


class SlipOfThePen(Good):
    guidance_sise = "output"


class FactAboutNothing(Good):
    facts = {"recipe.learning_rate": "the paper"}


class EmptyFact(Good):
    facts = {"recipe.lr": ""}


class Silent(Good):
    def describe(self) -> Iterator[tuple[str, Any, str]]:
        return itertools.islice(super().describe(), 5)


class TellsObjects(Good):
    def describe(self) -> Iterator[tuple[str, Any, str]]:
        return (
            (name, value if name != "labels" else {1: 2}, fact) for name, value, fact in super().describe()
        )


class OwnTask(Good):
    def recipe_for(self, task: Any = None, user: Any = None, dataset: str = "") -> Recipe:
        return super().recipe_for(user, task, dataset)


class TakesAnything(Good):
    def recipe_for(self, task: Any = None, user: Any = None, dataset: str = "") -> Recipe:
        user = {k: v for k, v in (user or {}).items() if k != "epoch"}
        return super().recipe_for(task, user, dataset)


class KnowsItsDatasets(Good):
    def recipe_for(self, task: Any = None, user: Any = None, dataset: str = "") -> Recipe:
        return super().recipe_for(task, user) if dataset in ("", "ade20k") else {}  # type: ignore[return-value]


class CannotTravel(Good):
    def __init__(self) -> None:
        self.make = lambda: None


@dataclass(frozen=True)
class Nowhere(Geometry):
    """No frames of small images."""

    side: int = 56

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return SquareCrop(self.side).frames(source) if min(source) >= self.side else []


@dataclass(frozen=True)
class Wandering(Geometry):
    """Another frame each time."""

    side: int = 56
    state: list[int] = field(default_factory=lambda: [0], repr=False)

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        self.state[0] += 1
        return [Frame(source, (80, 80), (56, 56), (self.state[0] % 24, 0))]


@dataclass(frozen=True)
class BreaksItsPromise(Geometry):
    """The whole image, where it says a square."""

    side: int = 56

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return [Frame(source, source, source)]

    def size(self, stride: int = 1) -> tuple[int, int]:
        return self.side, self.side


@dataclass(frozen=True)
class Beside(Geometry):
    """Beside the image."""

    side: int = 56

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return [Frame(source, (56, 56), (56, 56), (56, 0))]


@dataclass(frozen=True)
class SecretWindows(Geometry):
    """Several frames without saying so."""

    side: int = 56

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return Windows(self.side, self.side).frames(source)


class Nameless(Geometry):
    """No dataclass: its key does not tell its side."""

    def __init__(self, side: int) -> None:
        self.side = side

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return SquareCrop(self.side).frames(source)


@dataclass(frozen=True)
class KeyOfAPlace(Geometry):
    """Its key names an object by its address."""

    what: object = field(default_factory=object)

    def frames(self, source: tuple[int, int], stride: int = 1) -> Sequence[Frame]:
        return SquareCrop(56).frames(source)


def with_geometry(geometry: Geometry) -> Any:
    """A good protocol with another geometry, that the other checks can be run on."""

    class Variant(Good):
        facts = {}

    Variant.geometry = geometry
    return Variant


BROKEN: list[tuple[Any, set[Any]]] = [  # with "..." where more follows from it
    (NoVersion, {"declarations"}),
    (NoSource, {"declarations"}),
    (OpenWithoutAQuestion, {"declarations"}),
    (OneDeparture, {"declarations"}),
    (ForATaskThatIsNot, {"declarations"}),
    (NoGeometry, {"declarations", ...}),
    (SlipOfThePen, {"attributes", "declarations"}),
    (FactAboutNothing, {"facts"}),
    (EmptyFact, {"facts"}),
    (Silent, {"description", ...}),
    (TellsObjects, {"description"}),
    (OwnTask, {"recipe"}),
    (TakesAnything, {"recipe"}),
    (KnowsItsDatasets, {"recipe"}),
    (CannotTravel, {"pickling"}),
    (with_geometry(Nowhere()), {"frames", ...}),
    (with_geometry(Wandering()), {"frames", ...}),
    (with_geometry(BreaksItsPromise()), {"frames", ...}),
    (with_geometry(Beside()), {"frames", ...}),
    (with_geometry(SecretWindows()), {"frames", ...}),
    (with_geometry(Nameless(56)), {"geometry", ...}),
    (with_geometry(KeyOfAPlace()), {"geometry", ...}),
]
SOUND = [Good, Open, InPieces, AtItsAspect, InWholePatches, Padded, Squashed, OneRecipe]
for _cls in (*SOUND, *(cls for cls, _ in BROKEN)):
    _cls.name = "broken"


def failed(error: ContractError) -> set[str]:
    """Names of the checks that a message lists."""
    return set(re.findall(r"^  ([a-z ]+): ", str(error), flags=re.MULTILINE))


@pytest.mark.parametrize("cls", SOUND, ids=lambda cls: cls.__name__)
def test_sound_protocols_pass(cls: type[Protocol]) -> None:
    assert check_protocol(cls) == dict.fromkeys(PROTOCOL_CHECKS, "ok")


@pytest.mark.parametrize(("cls", "checks"), BROKEN)
def test_broken_protocols_are_found(cls: type[Protocol], checks: set[Any]) -> None:
    with pytest.raises(ContractError) as caught:
        check_protocol(cls)
    expected = checks - {...}
    assert failed(caught.value) >= expected, str(caught.value)
    assert failed(caught.value) == expected or ... in checks, str(caught.value)


def test_a_slip_is_named() -> None:
    with pytest.raises(ContractError, match="sets 'guidance_sise', which no protocol has; did you mean"):
        check_protocol(SlipOfThePen)
    with pytest.raises(ContractError, match=r"'recipe\.learning_rate', which is no parameter"):
        check_protocol(FactAboutNothing)
