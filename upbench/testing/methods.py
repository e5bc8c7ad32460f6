"""The contract of `Upsampler`, as checks that run on any method in seconds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError, nearest
from upbench.ops.operator import project
from upbench.testing.cases import GEOMETRIES, MethodCase
from upbench.testing.checks import ContractError, NotApplicable, require, run_checks


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


def _close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Equal within `tolerance` of the largest expected value."""
    require(actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, not {list(expected.shape)}")
    scale = max(1.0, float(expected.abs().max()))
    error = float((actual.float() - expected.float()).abs().max())
    require(error <= tolerance * scale, f"{what}: differs by {error:.2g} (allowed {tolerance * scale:.2g})")


def metadata(case: MethodCase) -> None:
    """What a reader of a table wants to know is declared, with the right types."""
    cls = case.cls
    require(isinstance(getattr(cls, "name", None), str), f"{cls.__name__} has no name")
    for name in ("title", "paper", "licence"):
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
            out = case.method(image, features, geometry.output)
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
        first, second = (case.method(image, features, geometry.output) for _ in range(2))
    _close(second, first, "second call", 0.0 if case.device == "cpu" else 1e-5)


def batch(case: MethodCase) -> None:
    """Images of a batch do not influence one another."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry, batch=2)
    with torch.no_grad():
        both = case.method(image, features, geometry.output)
        for i in range(2):
            alone = case.method(image[i : i + 1], features[i : i + 1], geometry.output)
            _close(both[i : i + 1], alone, f"image {i} in a batch of two")


def inputs_unchanged(case: MethodCase) -> None:
    """Image and features are left as they are, also where the output is of their size."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry)
        before = image.clone(), features.clone()
        with torch.no_grad():
            out = case.method(image, features, geometry.output)
            out.add_(1)
        require(torch.equal(image, before[0]), f"{name}: the image was changed")
        require(torch.equal(features, before[1]), f"{name}: the features were changed, or are the output")


def memory_layout(case: MethodCase) -> None:
    """Features that are not contiguous (channels last, a view) give the same output."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry)
    view = torch.cat([features, features], 3)[..., : geometry.features[1]]
    with torch.no_grad():
        expected = case.method(image, features, geometry.output)
        for other in (features.contiguous(memory_format=torch.channels_last), view):
            _close(case.method(image, other, geometry.output), expected, "features of another layout")


def bfloat16(case: MethodCase) -> None:
    """In bfloat16 the output is bfloat16 and near that of float32."""
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    half = copy.deepcopy(case.method).to(torch.bfloat16)
    rounded = image if case.cls.precise_image else image.bfloat16()
    with torch.no_grad():
        expected = case.method(image, features, geometry.output)
        try:
            out = half(rounded, features.bfloat16(), geometry.output)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented" in str(error):
                raise NotApplicable(f"no kernel in bfloat16: {error}") from None
            raise
    require(out.dtype == torch.bfloat16, f"output is {out.dtype}")
    apart = float((out.float() - expected).norm() / expected.norm())
    require(apart < 0.1, f"relative error {apart:.2g} against float32")


def gradient_to_features(case: MethodCase) -> None:
    """The output can be differentiated with respect to the features."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry)
    features.requires_grad_()
    weights = torch.linspace(-1, 1, geometry.output[0] * geometry.output[1], device=case.device)
    out = case.method(image, features, geometry.output)
    if case.cls.uses_backbone and not out.requires_grad:
        raise NotApplicable("its features come from the backbone that it runs, not from those given")
    (out.flatten(2) * weights).sum().backward()
    grad = features.grad
    require(grad is not None and bool(grad.isfinite().all()), "gradient is missing or not finite")
    require(grad is not None and float(grad.abs().sum()) > 0, "gradient is zero")


def gradient_to_parameters(case: MethodCase) -> None:
    """Every parameter of a trainable method that asks for a gradient gets one."""
    if not case.cls.trainable:
        raise NotApplicable("not trainable")
    method = copy.deepcopy(case.method).train()
    geometry = case.geometry("square")
    image, features = case.inputs(geometry, batch=2)
    target = torch.randn(2, case.channels, *geometry.output, device=case.device)
    (method(image, features, geometry.output) - target).square().mean().backward()
    trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    without = [name for name, grad in trained.items() if grad is None]
    require(not without, f"no gradient: {', '.join(without[:5])} (freeze what has no effect)")
    broken = [n for n, grad in trained.items() if grad is not None and not grad.isfinite().all()]
    require(not broken, f"gradient not finite: {', '.join(broken[:5])}")
    require(any(float(g.abs().sum()) > 0 for g in trained.values() if g is not None), "every gradient is 0")


def guidance(case: MethodCase) -> None:
    """A method that says that it is not guided does not look at the image."""
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    other, _ = case.inputs(geometry, seed=1)
    with torch.no_grad():
        one, two = (case.method(i, features, geometry.output) for i in (image, other))
    if case.cls.guided and torch.equal(one, two):
        raise NotApplicable("the output does not depend on the image: `guided = False` would say so")
    if not case.cls.guided:
        require(torch.equal(one, two), "is not called guided but its output changes with the image")


def linearity(case: MethodCase) -> None:
    """A method that says so is linear in the features."""
    if not case.cls.linear:
        raise NotApplicable("does not say that it is linear")
    geometry = case.geometry("ratio not an integer")
    image, a = case.inputs(geometry)
    _, b = case.inputs(geometry, seed=1)
    with torch.no_grad():
        mixed, fa, fb = (case.method(image, f, geometry.output) for f in (2 * a - 3 * b, a, b))
    _close(mixed, 2 * fa - 3 * fb, "f(2a - 3b) against 2f(a) - 3f(b)")


def operator(case: MethodCase) -> None:
    """The operator equals the forward pass, commutes with a 1x1 probe, and can be cropped."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry, batch=2)
        with torch.no_grad():
            made = case.method.operator(image, features, geometry.output)
            if made is None:
                raise NotApplicable("has no operator")
            require(made.output_size == geometry.output, f"{name}: output_size is {made.output_size}")
            require(case.channels % made.groups == 0, f"{made.groups} groups do not divide {case.channels}")
            dense = case.method(image, features, geometry.output)
            probe = torch.randn(5, case.channels, device=case.device)
            sources = made.takes(features)
            projected = project(probe, sources, made.groups)
            expected = torch.einsum("kc,bchw->bkhw", probe, dense)
            _close(made(projected), expected, f"{name}: probe first, then operator")
            _close(
                made(project(torch.eye(case.channels, device=case.device), sources, made.groups)),
                dense,
                f"{name}: operator on the features",
            )
            rows, cols = slice(1, geometry.output[0] - 1), slice(2, geometry.output[1])
            part = made.crop(rows, cols)
            require(part.output_size == (rows.stop - 1, cols.stop - 2), f"{name}: crop of the wrong size")
            _close(part(projected), expected[:, :, rows, cols], f"{name}: cropped operator")
            require(made.nbytes() >= 0, "nbytes is negative")


def camera(case: MethodCase) -> None:
    """A method that uses cameras takes them, for every image of a batch."""
    if not case.cls.uses_camera:
        raise NotApplicable("uses no camera")
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry, batch=2)
    h, w = geometry.image
    intrinsics = torch.tensor([[w, h, w / 2, h / 2], [2.0 * w, 2.0 * w, w / 2, h / 2]], device=case.device)
    pose = torch.eye(4, device=case.device).repeat(2, 1, 1)
    forward: Any = case.method
    with torch.no_grad():
        outs = [
            forward(image, features, geometry.output, camera=cam)
            for cam in (None, Camera(intrinsics), Camera(intrinsics, pose))
        ]
    for out in outs:
        require(list(out.shape) == [2, case.channels, *geometry.output], f"output {list(out.shape)}")
        require(bool(out.isfinite().all()), "output has values that are not finite")
    require(not torch.equal(outs[0], outs[1]), "the camera has no effect")


def backbone(case: MethodCase) -> None:
    """A method that runs the backbone says what to do without one, and leaves it as it is."""
    if case.backbone is None:
        raise NotApplicable("runs no backbone")
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        case.method(image, features, geometry.output)
    plain = case.new_backbone()
    require(repr(case.backbone) == repr(plain), "a module of the backbone was changed")
    weights = zip(case.backbone.state_dict().values(), plain.state_dict().values(), strict=True)
    require(all(torch.equal(mine, its) for mine, its in weights), "weights of the backbone were changed")
    lent = {id(parameter) for parameter in case.backbone.parameters()}
    own = {id(parameter) for parameter in case.method.parameters()}
    require(not lent & own, "parameters of the backbone are among those of the method")
    lonely = case.cls.build(channels=case.channels, **case.options).eval().to(case.device)
    try:
        with torch.no_grad():
            lonely(image, features, geometry.output)
    except UpbenchError as error:
        require(case.cls.name in str(error) and "backbone" in str(error), f"without a backbone: {error}")
    else:
        raise ContractError("says that it runs the backbone, but works without one")


def weights(case: MethodCase) -> None:
    """A state dict loads through `load_method` into an equal method; a wrong one is refused."""
    from upbench.weights.load import load_method

    state = case.method.state_dict()
    if not state:
        raise NotApplicable("has no weights")
    if case.cls.registered.get(case.cls.name) is not case.cls:
        raise NotApplicable("is not registered")
    settings: dict[str, Any] = {"channels": case.channels, "device": case.device, **case.options}
    settings |= {"backbone": case.backbone}
    loaded = load_method(case.cls.name, weights=state, **settings)
    require(not loaded.training, "is not in eval mode after loading")
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.method(image, features, geometry.output)
        _close(loaded(image, features, geometry.output), expected, "after loading its own weights", 1e-6)
    first = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != first}, {**state, "left.over": torch.zeros(1)}):
        try:
            load_method(case.cls.name, weights=wrong, **settings)
        except UpbenchError:
            continue
        raise ContractError("loads a checkpoint that lacks a tensor, or has one too many")


def pickling(case: MethodCase) -> None:
    """A method survives pickling, as worker processes and the measurement of memory need."""
    if "<locals>" in case.cls.__qualname__ or case.cls.__module__ == "__main__":
        raise NotApplicable("is not defined at the top of a module")
    again = pickle.loads(pickle.dumps(case.method))
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.method(image, features, geometry.output)
        _close(again(image, features, geometry.output), expected, "after pickling", 1e-6)


def gpu(case: MethodCase) -> None:
    """On a GPU the output is that of the CPU."""
    if not torch.cuda.is_available():
        raise NotApplicable("no GPU on this machine")
    if case.device != "cpu":
        raise NotApplicable("runs on the GPU already")
    there = copy.deepcopy(case.method).to("cuda")
    for name, geometry in case.each():
        image, features = case.inputs(geometry)
        with torch.no_grad():
            expected = case.method(image, features, geometry.output)
            out = there(image.cuda(), features.cuda(), geometry.output)
        require(out.device.type == "cuda", f"{name}: output on {out.device}")
        _close(out.cpu(), expected, f"{name}: on a GPU", 5e-3)  # TF32 convolutions


METHOD_CHECKS: dict[str, Callable[[MethodCase], None]] = {
    "metadata": metadata,
    "options": options,
    **{f"shape, {name}": _shape_check(name) for name in GEOMETRIES},
    "determinism": determinism,
    "batch": batch,
    "inputs unchanged": inputs_unchanged,
    "memory layout": memory_layout,
    "bfloat16": bfloat16,
    "gradient to features": gradient_to_features,
    "gradient to parameters": gradient_to_parameters,
    "guidance": guidance,
    "linearity": linearity,
    "operator": operator,
    "camera": camera,
    "backbone": backbone,
    "weights": weights,
    "pickling": pickling,
    "gpu": gpu,
}
