"""JAFAR's benchmarks (Couairon et al. 2025), as its code runs them."""

from __future__ import annotations

from upbench.protocols._family import CODE, JafarFamily, convolution

_STEPPED = f"{CODE}: T_max is the number of epochs, stepped every iteration"


class JafarSeg(JafarFamily):
    """JAFAR's segmentation: its learning rate swings between its peak and 0, without end.

    The code makes a cosine schedule for epochs and steps it every iteration: with 20 epochs the rate is 0
    at step 20, at its peak at step 40, and so on. Where it is read off depends on the number of images.
    """

    name = "jafar-seg"
    version = 1
    title = "JAFAR seg"
    source = "Couairon et al. 2025 (JAFAR), arXiv 2506.11136; code PaulCouairon/JAFAR 94d4d54"
    recipe = convolution(
        epochs=20, batch_size=2, lr=5e-4, weight_decay=1e-5, schedule="oscillating", flip=0.5
    )
    COCO_EPOCHS = 5
    departures = (*JafarFamily.departures,)
    facts = {
        **JafarFamily.facts,
        "recipe.epochs": "code: 20; 5 on COCO-Stuff by the authors' command line (issue 5) and the paper",
        "recipe.batch_size": f"{CODE}: 2; the paper says 4",
        "recipe.schedule": _STEPPED,
    }


class JafarDepth(JafarFamily):
    """JAFAR's depth: pseudo-labels, raw images, and a head that sees the class token beside every pixel."""

    name = "jafar-depth"
    version = 1
    title = "JAFAR depth"
    source = JafarSeg.source
    tasks = ("depth",)
    backbone_statistics = "none"
    guidance_statistics = "none"
    objective = "jafar"
    recipe = convolution(
        epochs=5,
        batch_size=2,
        lr=5e-3,
        weight_decay=1e-5,
        schedule="oscillating",
        flip=0.5,
        cls_token="unit",
    )
    departures = (
        *JafarFamily.departures,
        "the truth is the dataset's depth; the paper's is what Depth-Anything-V2-Small makes of COCO's "
        "images (relative and inverse), to be stored as depth",
    )
    facts = {
        **{name: fact for name, fact in JafarFamily.facts.items() if name != "labels"},
        "backbone_statistics": f"{CODE}: mean 0, deviation 1, on [0, 1]",
        "guidance_statistics": f"{CODE}: method and backbone see one tensor",
        "objective": f"{CODE}: the gradient loss works along the batch and is 0 with two images a step",
        "recipe.epochs": "the authors' command line (issue 5)",
        "recipe.batch_size": f"{CODE}: 2; the paper says 4",
        "recipe.lr": "the authors' command line (issue 5)",
        "recipe.schedule": _STEPPED,
        "recipe.cls_token": f"{CODE}: the class token, of length 1, repeated everywhere",
    }
