"""The project's own protocols: the central square of each image, a conditioned probe trained until it no
longer moves (docs/protocol.md has the measurements)."""

from __future__ import annotations

from upbench.contracts.protocol import Protocol, Recipe
from upbench.protocols.geometry import SquareCrop

_TRIED = "docs/protocol.md, The probe: the best of the settings tried"


class Quick(Protocol):
    """A first answer on two cores in minutes: the central square at 224 pixels."""

    name = "quick"
    version = 1
    title = "Quick"
    geometry = SquareCrop(224)
    recipe = Recipe()
    facts = {
        "geometry": "a choice: every image has its central square, whatever its aspect",
        "geometry.side": "a choice: 16x16 patches of 14 pixels, minutes on two cores",
        "geometry.filter": "as the preprocessing of most backbones",
        "output.of": "a choice: features for every pixel of the image",
        "sampling": "a choice: no label, depth or normal is an average over a boundary",
        "backbone_statistics": "the backbone's pretraining",
        "guidance_statistics": "the method's paper",
        "recipe.epochs": "docs/protocol.md, Has the probe converged? (tasks may ask for more)",
        "recipe.lr": _TRIED,
        "recipe.weight_decay": _TRIED,
        "recipe.crop": "docs/protocol.md, The probe: every pixel is seen equally often",
        "recipe.shrinkage": "docs/protocol.md, The probe: beside scaling and full whitening",
        "recipe.bias_lr": "docs/protocol.md, The probe: the bias alone carries the mean of an output",
        "recipe.flip": "a choice: features are computed once, so that there is no flip",
    }


class Standard(Quick):
    """The same at 448 pixels, the size that most papers report."""

    name = "standard"
    version = 1
    title = "Standard"
    geometry = SquareCrop(448)
    facts = {**Quick.facts, "geometry.side": "the size of most papers: 32x32 patches of 14 pixels"}
