"""ViT-Up's segmentation in its three modes: trained for each method, frozen, and fine-tuned."""

from __future__ import annotations

from dataclasses import replace

from upbench.protocols._family import JafarFamily, convolution

_CODE = "krispinwandel/vit-up 9a74487"


class VitUpSeg(JafarFamily):
    """ViT-Up's segmentation: JAFAR's with four images a step and four times its learning rate."""

    name = "vitup-seg"
    version = 1
    title = "ViT-Up seg"
    source = f"ViT-Up, arXiv 2606.14024; code {_CODE}"
    backbone_statistics = "imagenet"
    guidance_statistics = "imagenet"
    guidance_size = "output"
    recipe = convolution(epochs=20, batch_size=4, lr=2e-3, weight_decay=1e-5, schedule="cosine", flip=0.5)
    COCO_EPOCHS = 5
    departures = (
        "all seeds see the same batches and flips, and differ in their initial weights (the code draws all "
        "from seed 42)",
        "backbones are timm's; the code's are those of transformers",
    )
    facts = {
        **JafarFamily.facts,
        "backbone_statistics": f"{_CODE}: ImageNet's",
        "guidance_statistics": f"{_CODE}: ImageNet's",
        "guidance_size": f"{_CODE}: methods' wrappers resize the image to the output's size",
        "recipe.epochs": f"{_CODE}: 20, 5 on COCO-Stuff",
        "recipe.batch_size": _CODE,
        "recipe.lr": _CODE,
        "recipe.schedule": f"{_CODE}: a cosine over all iterations, to 0",
    }


class VitUpSegFrozenHead(VitUpSeg):
    """ViT-Up's mode "eval": one head, trained on the backbone's own features, reads every method's.

    It is trained on the patch grid, where its outputs are enlarged bilinearly to the label's size, and then
    applied to features of every pixel as it is: what a method changes about the features is not relearnt.
    """

    name = "vitup-seg-frozen-head"
    version = 1
    title = "ViT-Up seg, frozen head"
    recipe = replace(VitUpSeg.recipe, trained_on="backbone")
    facts = {**VitUpSeg.facts, "recipe.trained_on": f"{_CODE}: mode 'eval'"}


class VitUpSegFinetune(VitUpSeg):
    """ViT-Up's mode "finetune": each method goes on from the frozen head, at a tenth of its learning rate."""

    name = "vitup-seg-finetune"
    version = 1
    title = "ViT-Up seg, fine-tuned"
    recipe = replace(VitUpSeg.recipe, trained_on="backbone_then_method", lr=2e-4, first_lr=2e-3)
    facts = {
        **VitUpSeg.facts,
        "recipe.trained_on": f"{_CODE}: mode 'finetune'",
        "recipe.lr": f"{_CODE}: of the second training",
        "recipe.first_lr": f"{_CODE}: of the head on the backbone's own features",
    }
