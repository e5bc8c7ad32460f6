"""Checks of a method's operator, and of the tiles that come of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upbench.contracts.operator import FunctionOperator
from upbench.dense.tiles import upsample_tiles
from upbench.ops.operator import project
from upbench.testing.cases import MethodCase
from upbench.testing.checks import NotApplicable, require
from upbench.testing.closeness import ANOTHER_WAY, assert_close


def linearity(case: MethodCase) -> None:
    """A method that says so is linear in the features."""
    if not case.cls.linear:
        raise NotApplicable("does not say that it is linear")
    geometry = case.geometry("ratio not an integer")
    image, a = case.inputs(geometry)
    _, b = case.inputs(geometry, seed=1)
    with torch.no_grad():
        mixed, fa, fb = (case.call(image, f, geometry.output) for f in (2 * a - 3 * b, a, b))
    assert_close(mixed, 2 * fa - 3 * fb, terms=ANOTHER_WAY, what="f(2a - 3b) against 2f(a) - 3f(b)")


def operator(case: MethodCase) -> None:
    """The operator equals the forward pass, commutes with a 1x1 probe, and can be cropped."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry, batch=2)
        with torch.no_grad():
            made = case.operator(image, features, geometry.output)
            if made is None:
                raise NotApplicable("has no operator")
            require(made.output_size == geometry.output, f"{name}: output_size is {made.output_size}")
            require(case.channels % made.groups == 0, f"{made.groups} groups do not divide {case.channels}")
            dense = case.call(image, features, geometry.output)
            probe = torch.randn(5, case.channels, device=case.device)
            sources = made.takes(features)
            projected = project(probe, sources, made.groups)
            expected = torch.einsum("kc,bchw->bkhw", probe, dense)
            whole = made(project(torch.eye(case.channels, device=case.device), sources, made.groups))
            for what, actual, wanted in (
                ("probe first, then operator", made(projected), expected),
                ("operator on the features", whole, dense),
            ):
                assert_close(actual, wanted, terms=ANOTHER_WAY, what=f"{name}: {what}")
            height, width = geometry.output
            rows = slice(1, height - 1) if height > 2 else slice(0, height)
            cols = slice(2, width) if width > 2 else slice(0, width)
            part = made.crop(rows, cols)
            size = (rows.stop - rows.start, cols.stop - cols.start)
            require(part.output_size == size, f"{name}: crop of the wrong size")
            inner = expected[:, :, rows, cols]
            assert_close(part(projected), inner, terms=ANOTHER_WAY, what=f"{name}: cropped operator")
            require(made.nbytes() >= 0, "nbytes is negative")
        made = case.operator(image, features, geometry.output)
        if made is not None and not isinstance(made, FunctionOperator):
            tracked = made(project(probe, made.takes(features), made.groups)).requires_grad
            require(not tracked, "the operator asks for gradients of the method's own parameters")


def tiles(case: MethodCase) -> None:
    """Tiles of the output, whole or projected, are parts of what `forward` gives."""
    for name, geometry in case.each():
        image, features = case.inputs(geometry, batch=2)
        probe, bias = torch.randn(3, case.channels, device=case.device), torch.randn(3, device=case.device)
        with torch.no_grad():
            whole = case.call(image, features, geometry.output)
        projected = torch.einsum("kc,bchw->bkhw", probe, whole) + bias.view(-1, 1, 1)
        ways: list[tuple[Tensor, dict[str, Any]]] = [(whole, {})]
        ways.append((projected, {"project": probe, "bias": bias}))
        for expected, options in ways:
            made = upsample_tiles(
                case.method,
                image,
                features,
                geometry.output,
                tile=(20, 17),
                backbone=case.backbone,
                **options,
            )
            seen = torch.zeros(geometry.output)
            for rows, cols, values in made:
                seen[rows, cols] += 1
                inner = expected[:, :, rows, cols]
                assert_close(values, inner, terms=ANOTHER_WAY, scale=expected, what=f"{name}: a tile")
            require(bool((seen == 1).all()), f"{name}: tiles overlap or leave something out")
