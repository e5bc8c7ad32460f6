"""Probe3D's benchmarks of depth and normals (El Banani et al. 2024) on NYUv2: the anchor of later ones."""

from __future__ import annotations

from upbench.contracts.protocol import Output, Protocol, Recipe, Scoring
from upbench.protocols.geometry import SquareCrop

CODE = "mbanani/probe3d a1f1464"
SOURCE = f"El Banani et al. 2024 (Probe3D), arXiv 2404.08636; code {CODE}"

NO_AUGMENTATION = (
    "no colour jitter and no random crops in training: features are computed once, and the code's "
    "augmentations change the image that the backbone sees"
)


def probe3d_recipe(head: str, order: str = "stored", cls_token: str = "plain") -> Recipe:
    """Ten epochs of AdamW: a warm-up of one and a half, then a quarter of a cosine; no flips."""
    return Recipe(
        epochs=10,
        batch_size=8,
        lr=5e-4,
        weight_decay=0.01,
        decay_bias=True,
        bias_lr="common",
        init="conv",
        warmup=0.15,
        lr_floor=0.01,
        schedule="half_cosine",
        crop=1.0,
        shrinkage=None,
        order=order,
        cls_token=cls_token,
        head=head,
    )


FACTS = {
    "recipe.epochs": CODE,
    "recipe.batch_size": CODE,
    "recipe.lr": CODE,
    "recipe.weight_decay": f"{CODE}: PyTorch's default",
    "recipe.warmup": f"{CODE}: 1.5 of 10 epochs",
    "recipe.lr_floor": CODE,
    "recipe.schedule": f"{CODE}: half cosine",
}


class Probe3D(Protocol):
    """The central square of 480 pixels; a DPT head on four blocks, class tokens beside their features."""

    geometry = SquareCrop(480, "bilinear", "floor", "round")
    sampling = "pillow"
    output = Output("features")
    backbone_statistics = "imagenet"
    guidance_statistics = "imagenet"
    layers = 4
    final_norm = False
    recipe = probe3d_recipe("dpt")
    task_recipes = False
    objective = "probe3d"
    scoring = Scoring(at="frame")
    source = SOURCE
    departures = (
        NO_AUGMENTATION,
        "where 480 is no multiple of the patch, the image is resized to the nearest one; the code pads it to "
        "the next and resizes the prediction of the padded image",
        "methods are asked for the features' own size, and upsample nothing: it is a benchmark of backbones",
    )
    facts = {
        **FACTS,
        "geometry.side": f"{CODE}: columns 80 to 560 of 480x640 images, training and test",
        "output.of": f"{CODE}: the head sees the patch grid",
        "layers": f"{CODE}: blocks 3, 6, 9 and 12 of 12",
        "final_norm": f"{CODE}: not applied",
        "recipe.head": f"{CODE}: DPT, 512 channels wide",
        "recipe.cls_token": f"{CODE}: 'dense-cls'",
        "recipe.order": f"{CODE}: the split 'trainval' is not shuffled on one GPU",
        "objective": f"{CODE}, with the fixes of November 2025",
        "scoring.at": f"{CODE}: at 480x480",
    }


class Probe3DDepth(Probe3D):
    """Depth as Probe3D: 256 bins, absolute and aligned metrics, per image and averaged over images."""

    name = "probe3d-depth"
    version = 1
    title = "Probe3D depth"
    tasks = ("depth",)


class Probe3DNormals(Probe3D):
    """Normals as Probe3D: direction and concentration, metrics per image and averaged over images."""

    name = "probe3d-normals"
    version = 1
    title = "Probe3D normals"
    tasks = ("normals",)


class Probe3DLinear(Probe3D):
    """The same with the code's linear head on the last block."""

    layers = 1
    output = Output()
    scoring = Scoring()
    recipe = probe3d_recipe("linear")
    departures = (
        *Probe3D.departures[:2],
        "the method upsamples to the image's size at once; the code enlarges by 4, and resizes predictions",
    )
    facts = {
        **Probe3D.facts,
        "layers": "a choice: the last block, which methods are trained for; the code has four",
        "output.of": f"{CODE}: predictions at 480x480",
        "recipe.head": f"{CODE}: 'linear' with the class's own kernel of 1; the shipped configuration has 3",
    }


class Probe3DDepthLinear(Probe3DLinear):
    """Depth as Probe3D with its linear head."""

    name = "probe3d-depth-linear"
    version = 1
    title = "Probe3D depth, linear"
    tasks = ("depth",)


class Probe3DNormalsLinear(Probe3DLinear):
    """Normals as Probe3D with its linear head."""

    name = "probe3d-normals-linear"
    version = 1
    title = "Probe3D normals, linear"
    tasks = ("normals",)
