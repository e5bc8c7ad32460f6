"""Checks of what becomes of a method's weights in a file: they load, alone or with what they imply."""

from __future__ import annotations

from typing import Any

import torch

from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.testing.cases import MethodCase
from upbench.testing.checks import ContractError, NotApplicable, require
from upbench.testing.closeness import AGAIN, assert_close


def weights(case: MethodCase) -> None:
    """A state dict loads through `load_method` into an equal method; a wrong one is refused."""
    from upbench.weights.load import load_method

    state = case.method.state_dict()
    if not state:
        raise NotApplicable("has no weights")
    _registered(case)
    settings: dict[str, Any] = {"channels": case.channels, "device": case.device, **case.options}
    settings |= {"backbone": case.backbone}
    loaded = load_method(case.cls.name, weights=state, **settings)
    require(not loaded.training, "is not in eval mode after loading")
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        out = case.call(image, features, geometry.output, method=loaded)
        assert_close(out, expected, terms=AGAIN, what="after loading its own weights")
    for name in (*state, "left.over"):
        wrong = {key: tensor for key, tensor in state.items() if key != name}
        if name not in state:
            wrong[name] = torch.zeros(1)
        try:
            found = load_method(case.cls.name, weights=wrong, **settings).state_dict()
        except UpbenchError:
            continue
        # An option may be read from what is there and what is not; then it is the method of that option.
        require(set(found) == set(wrong), f"loads a checkpoint that lacks {name}, or has it left over")


def options_from_checkpoint(case: MethodCase) -> None:
    """Weights load without the options that their tensors imply; another C than theirs is refused."""
    from upbench.weights.load import load_method

    if case.cls.options_from.__func__ is Upsampler.options_from.__func__:  # type: ignore[attr-defined]
        raise NotApplicable("reads no options from a checkpoint")
    _registered(case)
    state = case.method.state_dict()
    implied = dict(case.cls.options_from(case.cls.convert_state(state)))
    tied = implied.pop("channels", None)
    require(tied in (None, case.channels), f"reads channels={tied} from weights for {case.channels}")
    for name, value in implied.items():
        wanted = case.options.get(name, value)
        require(value == wanted, f"reads {name}={value} from weights with {name}={wanted}")
    rest = {name: value for name, value in case.options.items() if name not in implied}
    settings: dict[str, Any] = {"channels": case.channels, "device": case.device, **rest}
    loaded = load_method(case.cls.name, weights=state, **settings, backbone=case.backbone)
    geometry = case.geometry("square")
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.call(image, features, geometry.output)
        out = case.call(image, features, geometry.output, method=loaded)
        assert_close(out, expected, terms=AGAIN, what="loaded without the options that it implies")
    if tied is None:
        return
    try:
        load_method(case.cls.name, weights=state, **{**settings, "channels": 2 * tied})
    except UpbenchError as error:
        require(str(tied) in str(error) and str(2 * tied) in str(error), f"another C: {error}")
    else:
        raise ContractError(f"loads weights for {tied} channels as those for {2 * tied}")


def _registered(case: MethodCase) -> None:
    if case.cls.registered.get(case.cls.name) is not case.cls:
        raise NotApplicable("is not registered")
