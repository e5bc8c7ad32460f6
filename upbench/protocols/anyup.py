"""AnyUp's benchmarks (Wimmer et al. 2025): JAFAR's code for segmentation, Probe3D's for depth and normals."""

from __future__ import annotations

from upbench.contracts.protocol import Protocol
from upbench.protocols._family import TORCHVISION, JafarFamily, convolution
from upbench.protocols.geometry import SquareCrop
from upbench.protocols.probe3d import FACTS, NO_AUGMENTATION, probe3d_recipe

_README = "wimmerth/anyup 351807a, README"


class AnyUpSeg(JafarFamily):
    """AnyUp's segmentation: JAFAR's with a cosine over epochs, constant within one."""

    name = "anyup-seg"
    version = 1
    title = "AnyUp seg"
    source = "Wimmer et al. 2025 (AnyUp), arXiv 2510.12764; wimmerth/anyup 351807a on JAFAR's code"
    exact = (
        "open: the batch size, which is that of JAFAR's code here (2); a user quotes an author with 4, which "
        "is anyup-seg-batch4"
    )
    recipe = convolution(
        epochs=20, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="epoch_cosine", flip=0.5
    )
    COCO_EPOCHS = 5
    facts = {
        **JafarFamily.facts,
        "recipe.epochs": "20, 5 on COCO-Stuff: as JAFAR's",
        "recipe.batch_size": "JAFAR's code; an issue (anyup 15) quotes an author with 4",
        "recipe.schedule": f"{_README}: JAFAR's probe with a schedule that is stepped every epoch",
    }


class AnyUpSegBatch4(AnyUpSeg):
    """The same with four images a step, as a user quotes an author."""

    name = "anyup-seg-batch4"
    version = 1
    title = "AnyUp seg, batch 4"
    exact = "open: the batch size, which is 4 here and 2 in JAFAR's code: anyup-seg"
    recipe = convolution(
        epochs=20, batch_size=4, lr=5e-4, weight_decay=1e-5, schedule="epoch_cosine", flip=0.5
    )


class AnyUpGeometry(Protocol):
    """Probe3D at 224 pixels with a linear head on one map, upsampled to every pixel."""

    source = "Wimmer et al. 2025 (AnyUp), arXiv 2510.12764; 'see Probe3D' for all that it does not say"
    exact = (
        "open: how images and targets are resized to 224, the kernel of the head (1 here; 3 in Probe3D's "
        "configuration), whether it enlarges by 4 itself (not here), whether it sees the class token (not "
        "here) and features before the final norm (not here: methods get what they were trained on)"
    )
    departures = (NO_AUGMENTATION,)
    geometry = SquareCrop(224, **TORCHVISION)
    sampling = "pillow"
    backbone_statistics = "imagenet"
    guidance_statistics = "imagenet"
    recipe = probe3d_recipe("linear", order="shared", cls_token="")
    task_recipes = False
    facts = {
        **FACTS,
        "geometry.side": "paper: images, depth and normals at 224x224",
        "output.of": "paper: 224 if not mentioned otherwise",
        "recipe.head": "paper: a linear probe",
        "recipe.order": "open: Probe3D's code does not shuffle on one GPU, and does on several",
        "objective": "Probe3D as it was before November 2025: its gradient loss compared image b with b + 2",
    }
    objective = "probe3d_2025"


class AnyUpDepth(AnyUpGeometry):
    """AnyUp's depth; published bilinear with DINOv2-S/14 on NYUv2: RMSE 0.4925, delta1 80.81."""

    name = "anyup-depth"
    version = 1
    title = "AnyUp depth"
    tasks = ("depth",)


class AnyUpNormals(AnyUpGeometry):
    """AnyUp's normals; published bilinear with DINOv2-S/14 on NYUv2: RMSE 32.70 degrees."""

    name = "anyup-normals"
    version = 1
    title = "AnyUp normals"
    tasks = ("normals",)
