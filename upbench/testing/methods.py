"""The contract of `Upsampler`, as checks that run on any method in seconds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError, nearest
from upbench.testing.cases import GEOMETRIES, Geometry, MethodCase
from upbench.testing.checkpoints import options_from_checkpoint, weights
from upbench.testing.checks import ContractError, NotApplicable, require, run_checks
from upbench.testing.closeness import AGAIN, ANOTHER_WAY, assert_close
from upbench.testing.learning import (
    autocast,
    bfloat16,
    gradient_to_features,
    gradient_to_parameters,
    with_gradients,
)
from upbench.testing.operators import linearity, operator, tiles


def check_method(
    cls: type[Upsampler],
    options: Mapping[str, Any] | None = None,
    *,
    channels: int = 16,
    device: str = "cpu",
    skip: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Holds a method to the contract of `Upsampler`; sizes are tiny, weights random.

    Args:
        cls: The class; registered, so that its weights can be loaded by its name.
        options: Options of its constructor.
        channels: C of the features.
        device: "cpu" or "cuda".
        skip: Name of a check (a key of `METHOD_CHECKS`) that it fails by design -> why.

    Returns:
        Name of each check -> "ok", or why it says nothing about this method.

    Raises:
        ContractError: Some checks failed; the message names all of them.
    """
    case = MethodCase(cls, dict(options or {}), channels, device)
    title = f"method '{getattr(cls, 'name', cls.__name__)}'"
    return run_checks(title, METHOD_CHECKS, case, skip or {})


def metadata(case: MethodCase) -> None:
    """What a reader of a table wants to know is declared, with the right types."""
    cls = case.cls
    require(isinstance(getattr(cls, "name", None), str), f"{cls.__name__} has no name")
    for name in ("title", "paper", "license"):
        require(isinstance(getattr(cls, name), str), f"{name} is not a text")
    for name in ("guided", "trainable", "linear", "uses_camera", "uses_backbone", "precise_image"):
        require(isinstance(getattr(cls, name), bool), f"{name} is not True or False")
    require(cls.year is None or 1900 < cls.year < 2100, f"year {cls.year!r}")
    ratio = cls.native_ratio
    require(ratio is None or (isinstance(ratio, int) and ratio > 0), f"native_ratio {ratio!r}")
    for name in ("mean", "std"):
        values = getattr(cls, name)
        require(len(values) == 3 and all(isinstance(v, float) for v in values), f"{name} {values!r}")
    require(min(cls.std) > 0, f"std {cls.std!r} is not positive")
    known = cls.default_weights is None or cls.default_weights in cls.weights
    require(known, f"default_weights '{cls.default_weights}' is not in weights")
    parameters = any(p.requires_grad for p in case.method.parameters())
    require(parameters or not cls.trainable, "is called trainable but has no parameter that is")


def options(case: MethodCase) -> None:
    """An option that is not there is refused, and the nearest one suggested."""
    names = case.cls.option_names()
    wrong = f"{names[0]}x" if names else "no_such_option"
    try:
        case.cls.build(channels=case.channels, **{wrong: 1})
    except UpbenchError as error:
        guess = nearest(wrong, names)
        require(guess is None or f"'{guess}'" in str(error), f"does not suggest '{guess}': {error}")
    else:
        raise ContractError(f"takes the option '{wrong}', which it does not have")


def _shape_check(name: str) -> Callable[[MethodCase], None]:
    def check(case: MethodCase) -> None:
        geometry = case.geometry(name)
        image, features = case.inputs(geometry)
        with torch.no_grad():
            out = case.call(image, features, geometry.output)
        expected = [1, case.channels, *geometry.output]
        require(list(out.shape) == expected, f"output {list(out.shape)}, not {expected}")
        require(out.dtype == features.dtype, f"output is {out.dtype}, features are {features.dtype}")
        require(out.device == features.device, f"output on {out.device}, features on {features.device}")
        require(bool(out.isfinite().all()), "output has values that are not finite")

    check.__doc__ = f"Output of the right shape, dtype and device, finite: {name}."
    return check


def determinism(case: MethodCase) -> None:
    """In eval mode the same inputs give the same output."""
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        first, second = (case.call(image, features, geometry.output) for _ in range(2))
    assert_close(second, first, terms=AGAIN, what="second call")


def batch(case: MethodCase) -> None:
    """Images of a batch do not influence one another."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry, batch=2)
    with torch.no_grad():
        both = case.call(image, features, geometry.output)
        for i in range(2):
            alone = case.call(image[i : i + 1], features[i : i + 1], geometry.output)
            assert_close(both[i : i + 1], alone, terms=ANOTHER_WAY, what=f"image {i} in a batch of two")


def inputs_unchanged(case: MethodCase) -> None:
    """Image and features are left as they are, also where the output is of their size."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry)
        before = image.clone(), features.clone()
        with torch.no_grad():
            out = case.call(image, features, geometry.output)
            out.add_(1)
        require(torch.equal(image, before[0]), f"{name}: the image was changed")
        require(torch.equal(features, before[1]), f"{name}: the features were changed, or are the output")


def memory_layout(case: MethodCase) -> None:
    """Features that are not contiguous (channels last, a view) give the same output."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry)
    view = torch.cat([features, features], 3)[..., : geometry.features[1]]
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        for other in (features.contiguous(memory_format=torch.channels_last), view):
            out = case.call(image, other, geometry.output)
            assert_close(out, expected, terms=ANOTHER_WAY, what="features of another layout")


def tiny_maps(case: MethodCase) -> None:
    """Maps of one cell or two, and images smaller than any window, give an output like any others."""
    possible = 0
    for grid, image_size in product([(1, 1), (1, 3), (2, 1), (2, 2)], [(40, 30), (3, 5)]):
        geometry = Geometry(image_size, grid, (19, 23))
        if case.reason(geometry):
            continue
        possible += 1
        image, features = case.inputs(geometry)
        with torch.no_grad():
            out = case.call(image, features, geometry.output)
        what = f"features {grid} of an image {image_size}"
        require(list(out.shape) == [1, case.channels, 19, 23], f"{what}: output {list(out.shape)}")
        require(bool(out.isfinite().all()), f"{what}: output has values that are not finite")
        tracked = case.call(image, features, geometry.output).detach()
        assert_close(tracked, out, terms=ANOTHER_WAY, what=f"{what}: with gradients")
    if not possible:
        raise NotApplicable("can do none of them")


def other_channels(case: MethodCase) -> None:
    """Another C works, as far as `channel_multiple` goes; one that it forbids is refused with the reason."""
    multiple = case.cls.channel_multiple
    other = MethodCase(case.cls, case.options, 7 if multiple == 1 else 3 * multiple, case.device)
    if multiple > 1:
        forbidden = MethodCase(case.cls, case.options, 3 * multiple + 1, case.device)
        reason = forbidden.reason(GEOMETRIES["square"]) or ""
        require(str(forbidden.channels) in reason, f"{forbidden.channels} channels: the reason is '{reason}'")
    geometry = other.geometry("not square")
    try:
        image, features = other.inputs(geometry)
    except UpbenchError as error:  # by its options
        raise NotApplicable(str(error)) from None
    with torch.no_grad():
        out = other.call(image, features, geometry.output)
    expected = [1, other.channels, *geometry.output]
    require(list(out.shape) == expected, f"output {list(out.shape)}, not {expected}")
    require(bool(out.isfinite().all()), "output has values that are not finite")


def guidance(case: MethodCase) -> None:
    """A method that says that it is not guided does not look at the image."""
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    other, _ = case.inputs(geometry, seed=1)
    with torch.no_grad():
        one, two = (case.call(i, features, geometry.output) for i in (image, other))
    if case.cls.guided and torch.equal(one, two):
        raise NotApplicable("the output does not depend on the image: `guided = False` would say so")
    if not case.cls.guided:
        require(torch.equal(one, two), "is not called guided but its output changes with the image")


def camera(case: MethodCase) -> None:
    """A method that uses cameras takes them, for every image of a batch."""
    if not case.cls.uses_camera:
        raise NotApplicable("uses no camera")
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry, batch=2)
    h, w = geometry.image
    intrinsics = torch.tensor([[w, h, w / 2, h / 2], [2.0 * w, 2.0 * w, w / 2, h / 2]], device=case.device)
    pose = torch.eye(4, device=case.device).repeat(2, 1, 1)
    with torch.no_grad():
        outs = [
            case.call(image, features, geometry.output, camera=cam)
            for cam in (None, Camera(intrinsics), Camera(intrinsics, pose))
        ]
    for out in outs:
        require(list(out.shape) == [2, case.channels, *geometry.output], f"output {list(out.shape)}")
        require(bool(out.isfinite().all()), "output has values that are not finite")
    require(not torch.equal(outs[0], outs[1]), "the camera has no effect")
    made = case.operator(image, features, geometry.output, camera=Camera(intrinsics, pose))
    if made is not None:
        whole = made.dense(made.takes(features)).detach()
        assert_close(whole, outs[2], terms=ANOTHER_WAY, what="operator with a camera")


def backbone(case: MethodCase) -> None:
    """A method that runs the backbone says what to do without one, and leaves it as it is."""
    if case.backbone is None:
        raise NotApplicable("runs no backbone")
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        case.call(image, features, geometry.output)
    plain = case.new_backbone()
    require(repr(case.backbone) == repr(plain), "a module of the backbone was changed")
    weights = zip(case.backbone.state_dict().values(), plain.state_dict().values(), strict=True)
    require(all(torch.equal(mine, other) for mine, other in weights), "weights of the backbone were changed")
    its = {id(parameter) for parameter in case.backbone.parameters()}
    own = {id(parameter) for parameter in case.method.parameters()}
    require(not its & own, "parameters of the backbone are among those of the method")
    lonely = case.cls.build(channels=case.channels, **case.options).eval().to(case.device)
    try:
        with torch.no_grad():
            lonely(image, features, geometry.output)
    except UpbenchError as error:
        require(case.cls.name in str(error) and "backbone" in str(error), f"without a backbone: {error}")
    else:
        raise ContractError("says that it runs the backbone, but works without one")


def pickling(case: MethodCase) -> None:
    """A method survives pickling, as worker processes and the measurement of memory need."""
    if "<locals>" in case.cls.__qualname__ or case.cls.__module__ == "__main__":
        raise NotApplicable("is not defined at the top of a module")
    again = pickle.loads(pickle.dumps(case.method))
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        out = case.call(image, features, geometry.output, method=again)
        assert_close(out, expected, terms=AGAIN, what="after pickling")


def gpu(case: MethodCase) -> None:
    """On a GPU the output is that of the CPU."""
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU on this machine")
    if case.device != "cpu":
        raise NotApplicable("runs on the GPU already")
    there = copy.deepcopy(case.method).to("cuda")
    running = None if case.backbone is None else case.new_backbone().to("cuda")
    for name, geometry in case.each():
        image, features = case.inputs(geometry)
        with torch.no_grad():
            expected = case.call(image, features, geometry.output)
            out = case.call(image.cuda(), features.cuda(), geometry.output, method=there, backbone=running)
        require(out.device.type == "cuda", f"{name}: output on {out.device}")
        tf32 = torch.float16  # its digits, in convolutions
        assert_close(out.cpu(), expected, terms=1, dtype=tf32, what=f"{name}: on a GPU")


METHOD_CHECKS: dict[str, Callable[[MethodCase], None]] = {
    "metadata": metadata,
    "options": options,
    **{f"shape, {name}": _shape_check(name) for name in GEOMETRIES},
    "determinism": determinism,
    "batch": batch,
    "inputs unchanged": inputs_unchanged,
    "memory layout": memory_layout,
    "tiny maps": tiny_maps,
    "other channels": other_channels,
    "bfloat16": bfloat16,
    "autocast": autocast,
    "with gradients": with_gradients,
    "gradient to features": gradient_to_features,
    "gradient to parameters": gradient_to_parameters,
    "guidance": guidance,
    "linearity": linearity,
    "operator": operator,
    "tiles": tiles,
    "camera": camera,
    "backbone": backbone,
    "weights": weights,
    "options from checkpoint": options_from_checkpoint,
    "pickling": pickling,
    "gpu": gpu,
}
