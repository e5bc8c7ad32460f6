"""RaysUp's benchmarks, and NAF's segmentation, whose code they are."""

from __future__ import annotations

from upbench.contracts.protocol import Output, Protocol, Scoring
from upbench.protocols._family import TORCHVISION, JafarFamily, convolution
from upbench.protocols.geometry import SquareCrop
from upbench.protocols.probe3d import FACTS, NO_AUGMENTATION, probe3d_recipe

_CODE = "MAP-RaysUp/RaysUp a320000 and valeoai/NAF ad4e24d"


class RaysUpSeg(JafarFamily):
    """RaysUp's and NAF's segmentation: JAFAR's with one cosine over all iterations, to 0."""

    name = "raysup-seg"
    version = 1
    other_names = ("naf-seg",)
    title = "RaysUp / NAF seg"
    source = f"Ding et al. 2026 (RaysUp), arXiv 2606.22749, and NAF, arXiv 2511.18452; code {_CODE}"
    exact = (
        "open: which camera poses RaysUp was given for the paper's table, those of Depth-Anything-3 (its "
        "script) or the identity (its text); a row says which it has, and no other method uses any"
    )
    recipe = convolution(epochs=20, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="cosine", flip=0.5)
    departures = (
        *JafarFamily.departures,
        "NAF's code normalises the methods' image with ImageNet's statistics, RaysUp's and this one with the "
        "backbone's, which are others for SigLIP",
    )
    facts = {
        **JafarFamily.facts,
        "guidance_statistics": "RaysUp a320000: one tensor for method and backbone; NAF: ImageNet's",
        "recipe.epochs": f"{_CODE}: 20 for all datasets",
        "recipe.batch_size": _CODE,
        "recipe.schedule": f"{_CODE}: T_max is epochs times iterations, stepped every iteration",
    }


class RaysUpGeometry(Protocol):
    """Probe3D at 448 pixels with its DPT head on one upsampled map."""

    source = "Ding et al. 2026 (RaysUp), arXiv 2606.22749; the head and size by its author (anyup issue 32)"
    exact = (
        "open: how one upsampled map feeds the head's four inputs (given four times here), the size that it "
        "is upsampled to (a quarter of the image's here, and the head enlarges nothing itself), crop and "
        "augmentation, the class token (none here), which Probe3D (today's here) and the camera poses"
    )
    departures = (NO_AUGMENTATION,)
    geometry = SquareCrop(448, **TORCHVISION)
    sampling = "pillow"
    output = Output("image", 0.25)
    backbone_statistics = "imagenet"
    guidance_statistics = "imagenet"
    recipe = probe3d_recipe("dpt_same_size", order="shared", cls_token="")
    task_recipes = False
    objective = "probe3d"
    scoring = Scoring(at="frame")
    facts = {
        **FACTS,
        "geometry.side": "the author in anyup issue 32",
        "output.factor": "a choice: the head's width of 512 at every pixel of 448 does not fit a GPU",
        "recipe.head": "the author in anyup issue 32: Probe3D's DPT",
        "scoring.at": "at 448x448",
    }


class RaysUpDepth(RaysUpGeometry):
    """RaysUp's depth; published bilinear with DINOv2-S/14 on NYUv2: RMSE 0.4789."""

    name = "raysup-depth"
    version = 1
    title = "RaysUp depth"
    tasks = ("depth",)


class RaysUpNormals(RaysUpGeometry):
    """RaysUp's normals; published bilinear with DINOv2-S/14 on NYUv2: RMSE 28.23 degrees."""

    name = "raysup-normals"
    version = 1
    title = "RaysUp normals"
    tasks = ("normals",)
