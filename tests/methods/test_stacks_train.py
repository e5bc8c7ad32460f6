"""The stacked operators learn by the recipe of `upbench train`, and what they learn serves every stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upbench.contracts.upsampler import Upsampler
from upbench.testing.toys.backbone import tiny_backbone
from upbench.train.loop import TrainConfig, ViewConfig, train, upsampling_loss
from upbench.train.views import prepare
from upbench.weights.load import load_method

METHODS = ["carafe", "sapa", "dysample"]
VIEWS = ViewConfig(view_size=64, guidance_size=32, crops_per_image=2, scales_per_view=2, precision="fp32")


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainConfig:
    """A tiny backbone, photos of noise, features of 4 to 8 cells that are to become 16."""
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))
    backbone = tiny_backbone(channels=8, stride=4)
    monkeypatch.setattr("upbench.features.backbones.load_backbone", lambda name, device="cpu": backbone)
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return TrainConfig(
        method="carafe",
        images=(str(folder),),
        out=str(tmp_path / "weights.safetensors"),
        backbone=("tiny",),
        steps=40,
        batch=2,
        lr=5e-3,
        warmup=0,
        views=VIEWS,
        device="cpu",
        log_every=1,
    )


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_every_weight_and_lowers_the_loss(method: str, config: TrainConfig) -> None:
    result = train(replace(config, method=method))
    before = load_method(method, "none", channels=8, seed=config.seed)
    after = load_method(method, result.out, channels=8)
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(a, b), name
    assert loss(after, config) < 0.98 * loss(before, config)


@torch.no_grad()
def loss(method: Upsampler, config: TrainConfig) -> float:
    """Of all the views that it is trained on, at every size."""
    from upbench.features.backbones import load_backbone

    pool = prepare(config.images, load_backbone("tiny"), config.views)
    losses = []
    for i, view in enumerate(pool.views):
        for cells in view.cells:
            batch = pool.read([i], cells)
            dense = method(method.normalize(batch.image), batch.features, (batch.output, batch.output))
            losses.append(upsampling_loss(dense, batch.target).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", METHODS)
def test_stages_that_training_does_not_reach_stay_as_they_began(method: str, config: TrainConfig) -> None:
    """At x2 to x4 two stages run: the reason why stages share their weights unless asked otherwise."""
    options = {"share_stages": False}
    result = train(replace(config, method=method, steps=4, options=options))
    before = load_method(method, "none", channels=8, seed=config.seed, **options)
    after = load_method(method, result.out, channels=8)
    learned = {
        name.split(".")[2]
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if name.startswith("stack.") and not torch.equal(a, b)
    }
    assert learned == {"0", "1"}
