"""Checks of a method's gradients, and of what it gives in low precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from upbench.testing.cases import MethodCase
from upbench.testing.checks import NotApplicable, require
from upbench.testing.closeness import ANOTHER_WAY, assert_close


def bfloat16(case: MethodCase) -> None:
    """In bfloat16 the output is bfloat16 and near that of float32."""
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    half = copy.deepcopy(case.method).to(torch.bfloat16)
    rounded = image if case.cls.precise_image else image.bfloat16()
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        try:
            out = case.call(rounded, features.bfloat16(), geometry.output, method=half)
        except (RuntimeError, NotImplementedError) as error:
            if "not implemented" in str(error):
                raise NotApplicable(f"no kernel in bfloat16: {error}") from None
            raise
    require(out.dtype == torch.bfloat16, f"output is {out.dtype}")
    _near(case, out, expected)


def autocast(case: MethodCase) -> None:
    """Under autocast to bfloat16, as in training, the output keeps the dtype of the features."""
    if not case.cls.trainable:
        raise NotApplicable("not trainable")
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
    with torch.autocast(torch.device(case.device).type, dtype=torch.bfloat16):
        out = case.call(image, features, geometry.output)
    require(out.dtype == features.dtype, f"output is {out.dtype}, features are {features.dtype}")
    _near(case, out, expected)


def _near(case: MethodCase, out: Tensor, expected: Tensor) -> None:
    apart = float((out.detach().float() - expected).norm() / expected.norm())
    require(apart < case.rounding, f"relative error {apart:.2g} against float32")


def with_gradients(case: MethodCase) -> None:
    """The output is the same where gradients are asked for and where they are not."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry)
        with torch.no_grad():
            expected = case.call(image, features, geometry.output)
        out = case.call(image, features.requires_grad_(), geometry.output).detach()
        assert_close(out, expected, terms=ANOTHER_WAY, what=f"{name}: with gradients")


def gradient_to_features(case: MethodCase) -> None:
    """The output can be differentiated with respect to the features."""
    geometry = case.geometry("not square")
    image, features = case.inputs(geometry)
    features.requires_grad_()
    weights = torch.linspace(-1, 1, geometry.output[0] * geometry.output[1], device=case.device)
    out = case.call(image, features, geometry.output)
    if case.cls.uses_backbone and not out.requires_grad:
        raise NotApplicable("its features come from the backbone that it runs, not from those given")
    (out.flatten(2) * weights).sum().backward()
    grad = features.grad
    require(grad is not None and bool(grad.isfinite().all()), "gradient is missing or not finite")
    require(grad is not None and float(grad.abs().sum()) > 0, "gradient is zero")


def gradient_to_parameters(case: MethodCase) -> None:
    """Every parameter of a trainable method that asks for a gradient gets one that is finite and not zero.

    Zero is what biases may have that a normalisation after them takes out again.
    """
    if not case.cls.trainable:
        raise NotApplicable("not trainable")
    method = copy.deepcopy(case.method).train()
    geometry = case.geometry("square" if case.cls.native_ratio is None else "native ratio")
    image, features = case.inputs(geometry, batch=2)
    target = torch.randn(2, case.channels, *geometry.output, device=case.device)

    def run() -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return case.call(image, features, geometry.output, method=method)

    out = run()
    (out - target).square().mean().backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None]
    require(not without, f"no gradient: {', '.join(without[:5])} (freeze what has no effect)")
    broken = [name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
    require(not broken, f"gradient not finite: {', '.join(broken[:5])}")
    for name, parameter in trained.items():
        if parameter.grad is not None and float(parameter.grad.abs().max()) == 0:
            require(name.endswith("bias"), f"gradient is zero: {name}")
            with torch.no_grad():
                parameter.add_(1)
                moved = run()
                parameter.sub_(1)
            assert_close(
                moved, out.detach(), terms=ANOTHER_WAY, what=f"{name}, whose gradient is zero, moved"
            )
