"""LoftUp's segmentation (Huang et al. 2025), which JAFAR's Table 9 repeats at four sizes."""

from __future__ import annotations

from upbench.contracts.protocol import Protocol, Scoring
from upbench.protocols._family import ONE_ORDER, TORCHVISION, convolution
from upbench.protocols.geometry import SquareCrop

_CODE = "andrehuang/loftup 6620d9b"


class LoftUpSeg(Protocol):
    """LoftUp's segmentation: no flips, a constant rate, classes enlarged by nearest."""

    name = "loftup-seg"
    version = 1
    title = "LoftUp seg"
    source = f"Huang et al. 2025 (LoftUp), arXiv 2504.14032; code {_CODE}"
    tasks = ("seg",)
    departures = (
        ONE_ORDER,
        "position embeddings are resized as timm does, antialiased; the hub's DINOv2 of the code does not",
    )
    geometry = SquareCrop(224, **TORCHVISION)
    sampling = "floor"
    backbone_statistics = "imagenet"
    guidance_statistics = "imagenet"
    recipe = convolution(
        epochs=10, batch_size=8, lr=1e-4, weight_decay=0.0, schedule="constant", optimizer="nadam"
    )
    task_recipes = False
    scoring = Scoring(at="frame", enlarge="labels")
    facts = {
        "geometry.side": f"{_CODE}: load_size 224; the tables also have 56, 112 and 448",
        "geometry.filter": f"{_CODE}: PIL's bilinear",
        "output.of": f"{_CODE}: features of the guidance image's size, which is the input's",
        "sampling": f"{_CODE}: labels by PIL's nearest, brought to the features' size by PyTorch's nearest",
        "backbone_statistics": _CODE,
        "guidance_statistics": _CODE,
        "final_norm": f"{_CODE}: normalised patch tokens",
        "recipe.optimizer": f"{_CODE}: NAdam",
        "recipe.lr": f"{_CODE}: constant",
        "recipe.batch_size": _CODE,
        "recipe.epochs": f"{_CODE}: the last one counts",
        "scoring.at": f"{_CODE}: at the label's size",
        "scoring.enlarge": f"{_CODE}: the class map, by nearest",
    }


class LoftUpSeg56(LoftUpSeg):
    """The same at 56 pixels (JAFAR's Table 9)."""

    name = "loftup-seg-56"
    version = 1
    title = "LoftUp seg, 56"
    geometry = SquareCrop(56, **TORCHVISION)


class LoftUpSeg112(LoftUpSeg):
    """The same at 112 pixels (JAFAR's Table 9)."""

    name = "loftup-seg-112"
    version = 1
    title = "LoftUp seg, 112"
    geometry = SquareCrop(112, **TORCHVISION)


class LoftUpSeg448(LoftUpSeg):
    """The same at 448 pixels (JAFAR's Table 9)."""

    name = "loftup-seg-448"
    version = 1
    title = "LoftUp seg, 448"
    geometry = SquareCrop(448, **TORCHVISION)
