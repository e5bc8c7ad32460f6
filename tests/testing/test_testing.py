"""The contract checks find what they are there to find: each broken plugin fails exactly the checks it
should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.operator import FunctionOperator
from upbench.contracts.upsampler import Upsampler
from upbench.ops.resample import interpolation_operator
from upbench.registry import find_task, load_plugin_file, plugins
from upbench.testing import ContractError, check_method, check_task


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Good(Upsampler):
    """Nearest neighbour, to be broken; unregistered, for its name comes after the class body."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size).clone()


class WrongShape(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features, image.shape[-2:])  # type: ignore[arg-type]


class WrongDtype(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features, output_size).float()


class NotFinite(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        out = super().forward(image, features, output_size)
        return out / (out - out[..., :1, :1])


class Random(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features, output_size) + 0.01 * torch.rand_like(
            features[:1, :1, :1, :1]
        )


class Coupled(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features / features.std(), output_size)


class Aliasing(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        features.mul_(1.5)
        return super().forward(image, features, output_size)


class Contiguous(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(
            image, features.as_strided(features.shape, features.contiguous().stride()), output_size
        )


class Detached(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features.detach(), output_size).requires_grad_()


class SecretlyGuided(Good):
    guided = False

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features, output_size) + image.mean().to(features.dtype)


class NotLinear(Good):
    linear = True

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features.abs(), output_size)


class WrongOperator(Good):
    def operator(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Any = None
    ) -> Any:
        return FunctionOperator(lambda v: F.interpolate(v, output_size, mode="bilinear"), output_size)


class Unused(Good):
    trainable = True

    def __init__(self, channels: int = 384) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features * self.scale, output_size)


class SwallowsOptions(Good):
    def __init__(self, channels: int = 384, *, radius: int = 1, radiusx: int = 2) -> None:
        super().__init__(channels)


class IgnoresCamera(Good):
    uses_camera = True

    def forward(
        self, image: Tensor, features: Tensor, output_size: tuple[int, int], camera: Any = None
    ) -> Tensor:
        return super().forward(image, features, output_size)


class Cut(Good):
    """A parameter whose gradient is lost, not missing."""

    trainable = True

    def __init__(self, channels: int = 384) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        lost = self.bias.detach() + 0 * self.bias
        return super().forward(image, features * self.scale + lost, output_size)


class Cancelled(Cut):
    """A bias that cancels has no gradient, and needs none."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return Good.forward(self, image, features * self.scale + (self.bias - self.bias), output_size)


class FollowsAutocast(Unused):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        mixed = features.movedim(1, 3) @ (self.scale * torch.eye(features.shape[1]).to(features))
        return Good.forward(self, image, mixed.movedim(3, 1) + 0 * self.unused, output_size)


class Rough(Good):
    """Another function where no gradients are asked for."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        factor = 1.0 if torch.is_grad_enabled() else 1.01
        return super().forward(image, factor * features, output_size)


class Reflects(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        padded = F.pad(features, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1]
        return super().forward(image, padded, output_size)


class OneC(Good):
    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return super().forward(image, features.unflatten(1, (16, -1)).flatten(1, 2), output_size)


class WrongTiles(Good):
    def tile_operator(self, *inputs: Any, memory_budget: int, **given: Any) -> Any:
        size = inputs[2]
        return interpolation_operator(inputs[1], size, "bilinear")


BROKEN: dict[type[Upsampler], set[str]] = {
    Cut: {"gradient to parameters"},
    FollowsAutocast: {"autocast"},
    Rough: {"with gradients", "tiny maps"},
    Reflects: {"tiny maps"},
    OneC: {"other channels"},
    WrongTiles: {"tiles"},
    WrongShape: {"shape, ratio not an integer", "shape, larger than the image"},
    WrongDtype: {"bfloat16"},
    NotFinite: {"shape, square"},
    Random: {"determinism"},
    Coupled: {"batch"},
    Aliasing: {"inputs unchanged"},
    Contiguous: {"memory layout"},
    Detached: {"gradient to features"},
    SecretlyGuided: {"guidance"},
    NotLinear: {"linearity", "operator"},
    WrongOperator: {"operator"},
    Unused: {"gradient to parameters"},
    SwallowsOptions: {"options"},
    IgnoresCamera: {"camera"},
}
ALL: list[type[Upsampler]] = [Good, Cancelled, *BROKEN]
for _cls in ALL:
    _cls.name = "broken"


def failed(error: ContractError) -> set[str]:
    """Names of the checks that a message lists."""
    return set(re.findall(r"^  ([a-z0-9 ,]+): ", str(error), flags=re.MULTILINE))


def test_a_good_method_passes() -> None:
    outcome = check_method(Good)
    assert outcome["shape, square"] == "ok"
    assert outcome["camera"] == "skipped: uses no camera"


def test_a_bias_that_cancels_needs_no_gradient() -> None:
    assert check_method(Cancelled)["gradient to parameters"] == "ok"


class Sized(Upsampler):
    """Reads its width from a checkpoint, or fails to."""

    trainable = True
    reads = True

    def __init__(self, channels: int = 384, *, dim: int = 4) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features * self.scale.mean(), output_size).clone()

    @classmethod
    def options_from(cls, state: Any) -> dict[str, Any]:
        return {"dim": len(state["scale"]) if cls.reads else 4}


def test_options_that_a_checkpoint_does_not_tell_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Upsampler.registered, "sized", Sized)
    monkeypatch.setattr(Sized, "name", "sized", raising=False)
    assert check_method(Sized, {"dim": 6})["options from checkpoint"] == "ok"
    monkeypatch.setattr(Sized, "reads", False)
    with pytest.raises(ContractError) as caught:
        check_method(Sized, {"dim": 6})
    assert failed(caught.value) >= {"options from checkpoint"}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_broken_methods_are_found(cls: type[Upsampler]) -> None:
    with pytest.raises(ContractError) as caught:
        check_method(cls)
    assert failed(caught.value) >= BROKEN[cls], str(caught.value)


def test_checks_can_be_skipped_with_a_reason() -> None:
    outcome = check_method(Coupled, skip={"batch": "normalises over the batch"})
    assert outcome["batch"] == "skipped: normalises over the batch"
    with pytest.raises(ValueError, match="no such check: bach"):
        check_method(Good, skip={"bach": ""})


def test_the_example_passes(root: Path) -> None:
    before = dict(Upsampler.registered)
    try:
        load_plugin_file(root / "examples" / "smooth.py")
        outcome = check_method(Upsampler.registered["smooth"])
        assert outcome["guidance"].startswith("skipped: the output does not depend on the image")
    finally:
        Upsampler.registered.clear()
        Upsampler.registered.update(before)


@pytest.mark.parametrize("name", sorted(plugins("method")))
def test_builtins_say_where_they_are_from(name: str) -> None:
    cls = plugins("method")[name]
    assert cls.title
    assert cls.paper
    assert cls.year is not None or not cls.guided
    assert (cls.__doc__ or "") != (Upsampler.__doc__ or "")


def _variant(name: str, **attributes: Any) -> Any:
    """A task with some attributes changed; unregistered."""
    base = find_task(name)
    cls: Any = type("Variant", (base,), attributes)
    cls.name = name
    return cls


def _wrong_direction() -> Any:
    task = find_task("seg")
    return _variant("seg", metrics=[replace(task.metrics[0], higher_is_better=False), *task.metrics[1:]])


def _no_mask() -> Any:
    def loss(self: Any, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        return (prediction - target).square().mean()

    return _variant("normals", loss=loss)


def _missing_metric() -> Any:
    return _variant(
        "seg", metrics=[*find_task("seg").metrics, replace(find_task("seg").metrics[0], name="more")]
    )


def _unknown_primary() -> Any:
    return _variant("depth", primary="rsme")


BROKEN_TASKS = [
    (_wrong_direction, "better is better"),
    (_no_mask, "invalid pixels"),
    (_missing_metric, "metric names"),
    (_unknown_primary, "declarations"),
]


@pytest.mark.parametrize(("make", "check"), BROKEN_TASKS)
def test_broken_tasks_are_found(make: Any, check: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_task(make())
    assert check in failed(caught.value), str(caught.value)
