"""What the segmentation benchmarks of JAFAR, AnyUp, NAF, RaysUp and ViT-Up have in common.

Their code is JAFAR's; they differ in the schedule, the batch and the statistics of the images' normalisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from upbench.contracts.protocol import Protocol, Recipe
from upbench.protocols.geometry import SquareCrop

TORCHVISION = {"filter": "bilinear", "long_side": "floor", "centre": "round"}
"""Resize by the shorter side and central crop, as torchvision does them to PIL images."""

ONE_ORDER = (
    "all seeds see the same batches and flips, and differ in their initial weights (the code draws the order "
    "of images from seed 0, flips and initial weights from no seed)"
)

CODE = "JAFAR's evaluation code (PaulCouairon/JAFAR 94d4d54)"


def convolution(**settings: Any) -> Recipe:
    """A plain 1x1 convolution on whole images: PyTorch's initial weights, one rate for weight and bias."""
    plain: dict[str, Any] = {"warmup": 0.0, "crop": 1.0, "shrinkage": None, "bias_lr": "common"}
    return Recipe(**{**plain, "decay_bias": True, "init": "conv", "order": "shared", **settings})


class JafarFamily(Protocol):
    """One 1x1 convolution on features of 448x448 pixels, images flipped at random; the last epoch counts.

    Attributes:
        COCO_EPOCHS: Epochs on datasets of COCO's images; 0 for as many as on others.
    """

    COCO_EPOCHS = 0

    tasks = ("seg",)
    geometry = SquareCrop(448, **TORCHVISION)
    sampling = "pillow"
    guidance_statistics = "backbone"
    recipe = convolution(epochs=20, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="cosine", flip=0.5)
    task_recipes = False
    departures: ClassVar[Sequence[str]] = (ONE_ORDER,)
    facts = {
        "geometry.side": CODE,
        "geometry.filter": f"{CODE}: PIL's bilinear, which antialiases",
        "geometry.long_side": "torchvision's resize",
        "geometry.centre": "torchvision's crop, halves to even",
        "output.of": f"{CODE}: methods are asked for the label's size",
        "sampling": f"{CODE}: nearest-exact of a PIL image, which is PIL's nearest",
        "backbone_statistics": f"{CODE}: those of the timm model",
        "guidance_statistics": f"{CODE}: method and backbone see one tensor",
        "labels": f"{CODE}: ADE20K has 151 outputs, 0 is a class; the switch that ignores it is off",
        "features_dtype": f"{CODE}: no autocast",
        "final_norm": f"{CODE}: patch tokens after the final norm",
        "recipe.batch_size": CODE,
        "recipe.lr": CODE,
        "recipe.weight_decay": f"{CODE}: of weight and bias",
        "recipe.optimizer": f"{CODE}: betas 0.9 and 0.999",
        "recipe.init": f"{CODE}: PyTorch's own",
        "recipe.flip": f"{CODE}: of a whole batch, image and label",
        "recipe.order": f"{CODE}: the loader's generator has seed 0",
        "scoring.at": f"{CODE}: on the crop",
    }

    def recipe_for(
        self, task: Mapping[str, Any] | None = None, user: Mapping[str, Any] | None = None, dataset: str = ""
    ) -> Recipe:
        """See `Protocol`; fewer epochs on COCO where the paper has so."""
        own = {"epochs": self.COCO_EPOCHS} if self.COCO_EPOCHS and dataset.startswith("coco") else {}
        return super().recipe_for(task, {**own, **(user or {})}, dataset)
