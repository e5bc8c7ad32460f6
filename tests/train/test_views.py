"""Views of photos and their cached features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from upbench.errors import UpbenchError
from upbench.testing.closeness import relative_error
from upbench.train.config import ViewConfig
from upbench.train.views import View, find_photos, plan_views, prepare

STRIDE = 4
CONFIG = ViewConfig(view_size=32, guidance_size=16, crops_per_image=3, scales_per_view=2, precision="fp32")


class MeanColour(nn.Module):
    """Features that can be checked by eye: the mean colour of each patch."""

    name = "mean-colour"
    channels = 3
    stride = STRIDE
    fingerprint = "1"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, image01: Tensor) -> Tensor:
        self.calls += 1
        return F.avg_pool2d(image01, STRIDE)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UPBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Smooth photos in which red grows to the right and green downwards, so that places can be read off."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, (width, height) in {"a.png": (64, 48), "more/b.png": (50, 70)}.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.linspace(0, 255, width)
        pixels[..., 1] = np.linspace(0, 255, height)[:, None]
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def plan(photos: Path, **fields: object) -> list[View]:
    return plan_views(find_photos([photos]), replace(CONFIG, **fields), STRIDE)


def test_photos_are_found_below_the_folder_in_order(photos: Path):
    assert [p.name for p in find_photos([photos])] == ["a.png", "b.png"]


def test_views_lie_in_their_photo_and_have_the_sizes_asked_for(photos: Path):
    views = plan(photos, crops_per_image=50)
    assert len(views) == 100
    for view in views:
        with Image.open(view.photo) as image:
            width, height = image.size
        left, top, side = view.box
        assert 0 <= left <= left + side <= width
        assert 0 <= top <= top + side <= height
        assert 0.5 * min(width, height) - 0.5 <= side <= min(width, height)
        assert len(set(view.cells)) == 2
        assert set(view.cells) <= {2, 3, 4}  # a quarter to half of 8
        assert (view.output, view.window) == (8, (0, 0, 8))
    assert {view.flip for view in views} == {True, False}
    assert {cells for view in views for cells in view.cells} == {2, 3, 4}


def test_views_depend_on_the_photo_and_the_seed_alone(photos: Path):
    views = plan(photos)
    assert plan(photos) == views
    assert plan(photos, view_seed=1) != views
    (photos / "a.png").rename(photos / "z.png")
    again = {(v.sha256, v.box, v.flip, v.cells) for v in plan(photos)}
    assert again == {(v.sha256, v.box, v.flip, v.cells) for v in views}


def test_crops_lie_in_a_larger_output(photos: Path):
    views = plan(photos, recipe="crop", crops_per_image=50)
    for view in views:
        top, left, side = view.window
        assert side == 4  # half of the view's own 8
        assert 8 <= view.output <= 16
        assert min(top, left) >= 0
        assert max(top, left) + side <= view.output
    assert len({view.output for view in views}) == 5


@pytest.mark.parametrize("flip", [False, True])
def test_the_target_shows_what_the_window_covers(photos: Path, flip: bool):
    """The window of a dense map of places must show the same places as the target's own features."""
    pool = prepare([photos], MeanColour(), replace(CONFIG, recipe="crop", crops_per_image=20))
    checked = 0
    for i, view in enumerate(pool.views):
        if view.flip != flip:
            continue
        batch = pool.read([i], view.cells[-1])
        dense = F.interpolate(batch.image, (view.output,) * 2, mode="bilinear", antialias=True)
        shown = batch.covered(dense)
        assert (shown - batch.target).abs().max() < 0.04  # half a cell of these gradients, at the border
        checked += 1
    assert checked > 3


def test_target_features_and_guidance_show_the_same_view(photos: Path):
    pool = prepare([photos], MeanColour(), CONFIG)
    for i, view in enumerate(pool.views):
        batch = pool.read([i], view.cells[0])
        assert batch.image.shape == (1, 3, 16, 16)
        assert batch.features.shape == (1, 3, view.cells[0], view.cells[0])
        assert batch.target.shape == (1, 3, 8, 8)
        for x in (batch.features, F.adaptive_avg_pool2d(batch.image, 8)):
            up = F.interpolate(x, (8, 8), mode="bilinear")
            assert (up - batch.target)[..., 2:-2, 2:-2].abs().max() < 0.04
        red = batch.target[0, 0].mean(0)
        assert (red.diff() < 0).all() if view.flip else (red.diff() > 0).all()


def test_features_are_computed_once(photos: Path):
    backbone = MeanColour()
    first = prepare([photos], backbone, CONFIG)
    calls = backbone.calls
    assert calls == 6 * 3  # a target and two low resolutions of each view
    again = prepare([photos], backbone, CONFIG)
    assert backbone.calls == calls
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"view_size": 40},
        {"guidance_size": 20},
        {"precision": "bf16"},
        {"recipe": "crop"},
        {"view_seed": 3},
        {"min_crop": 0.9},
    ],
)
def test_what_changes_features_makes_new_ones(photos: Path, fields: dict[str, object]):
    backbone = MeanColour()
    first = prepare([photos], backbone, CONFIG)
    calls = backbone.calls
    other = prepare([photos], backbone, replace(CONFIG, **fields))
    assert backbone.calls == 2 * calls
    assert other.fingerprint != first.fingerprint


def test_another_backbone_or_photo_makes_new_features(photos: Path):
    backbone = MeanColour()
    prepare([photos], backbone, CONFIG)
    calls = backbone.calls
    backbone.fingerprint = "2"
    prepare([photos], backbone, CONFIG)
    assert backbone.calls == 2 * calls
    Image.new("RGB", (64, 48), "white").save(photos / "a.png")
    prepare([photos], backbone, CONFIG)
    assert backbone.calls == 2 * calls + calls // 2


def test_preparation_goes_on_where_it_stopped(photos: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = MeanColour()
    forward = MeanColour.forward

    def fails(self: MeanColour, image01: Tensor) -> Tensor:
        if self.calls == 7:
            raise KeyboardInterrupt
        return forward(self, image01)

    with monkeypatch.context() as patch:
        patch.setattr(MeanColour, "forward", fails)
        with pytest.raises(KeyboardInterrupt):
            prepare([photos], backbone, CONFIG)
    backbone.calls = 0
    prepare([photos], backbone, CONFIG)
    assert backbone.calls == 18 - 6  # two whole views of three calls were kept


def test_batches_are_a_function_of_seed_and_step(photos: Path):
    pool = prepare([photos], MeanColour(), replace(CONFIG, crops_per_image=20))
    batch = pool.batch(5, 2, 0)
    again = pool.batch(5, 2, 0)
    assert torch.equal(batch.features, again.features)
    assert torch.equal(batch.image, again.image)
    for step, seed in ((6, 0), (5, 1), (7, 0)):
        assert not pool.batch(step, 2, seed).image.equal(batch.image)
    assert len(pool.batch(0, 50, 0)) == 50  # more than there are: some twice


def test_a_batch_holds_no_view_twice_where_there_are_enough(photos: Path):
    pool = prepare([photos], MeanColour(), replace(CONFIG, crops_per_image=20))
    for step in range(20):
        batch = pool.batch(step, 4, 0)
        assert len({row.numpy().tobytes() for row in batch.image}) == 4


def test_every_view_and_size_is_drawn(photos: Path):
    pool = prepare([photos], MeanColour(), CONFIG)
    seen = {
        (b.features.shape[-1], b.image.numpy().tobytes()) for b in (pool.batch(s, 1, 0) for s in range(300))
    }
    assert len(seen) == len({(v.box, v.flip, c, v.sha256) for v in pool.views for c in v.cells})


def test_splitting_and_shrinking_keep_the_views(photos: Path):
    batch = prepare([photos], MeanColour(), replace(CONFIG, recipe="crop")).batch(0, 5, 0)
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.target for part in parts]), batch.target)
    assert sum((part.windows for part in parts), ()) == batch.windows
    small = batch.shrunk(8)
    assert small.image.shape == (5, 3, 8, 8)
    assert relative_error(small.image.mean((2, 3)), batch.image.mean((2, 3))) < 0.01
    assert batch.shrunk(None) is batch


def test_an_exif_orientation_is_applied(tmp_path: Path):
    folder = tmp_path / "turned"
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    stripe = Image.new("RGB", (60, 20))
    stripe.paste((255, 0, 0), (0, 0, 30, 20))
    stripe.save(folder / "a.png", exif=exif)
    views = plan_views(find_photos([folder]), replace(CONFIG, crops_per_image=30), STRIDE)
    assert max(view.box[1] + view.box[2] for view in views) > 20  # the upright photo is 20 wide and 60 high


def test_bad_photos_are_named(tmp_path: Path, photos: Path):
    with pytest.raises(UpbenchError, match=r"image folder not found: .*nowhere"):
        find_photos([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpbenchError, match=r"no images in .*empty"):
        find_photos([tmp_path / "empty"])
    (photos / "broken.jpg").write_text("nothing")
    with pytest.raises(UpbenchError, match=r"cannot read image .*broken\.jpg: it is not an image"):
        plan(photos)
    (photos / "broken.jpg").unlink()
    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UpbenchError, match=r"cannot read image .*a\.png"):
        prepare([photos], MeanColour(), CONFIG)


def test_features_that_are_not_finite_name_the_photo(photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MeanColour, "forward", lambda self, x: F.avg_pool2d(x, STRIDE) * float("nan"))
    with pytest.raises(UpbenchError, match=r"features of .*a\.png are not finite"):
        prepare([photos], MeanColour(), CONFIG)


def test_large_features_are_not_squeezed_into_half_precision(photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MeanColour, "forward", lambda self, x: F.avg_pool2d(x, STRIDE) * 1e6)
    pool = prepare([photos], MeanColour(), CONFIG)
    assert pool.batch(0, 1, 0).target.max() > 1e5


def test_a_cached_view_that_has_gone_is_named(photos: Path):
    pool = prepare([photos], MeanColour(), CONFIG)
    pool.files[0].write_bytes(b"broken")
    with pytest.raises(UpbenchError, match=r"cached view .* is gone or broken"):
        pool.read([0], pool.views[0].cells[0])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"recipe": "gidance"}, "did you mean 'guidance'"),
        ({"precision": "fp16"}, "unknown precision"),
        ({"ratio": (0.5, 0.25)}, "ratio"),
        ({"min_crop": 0.0}, "min-crop"),
        ({"crops_per_image": 0}, "crops-per-image"),
    ],
)
def test_view_settings_are_checked(fields: dict[str, object], match: str):
    with pytest.raises(UpbenchError, match=match):
        ViewConfig(**fields)  # type: ignore[arg-type]


def test_a_view_of_under_two_features_is_refused(photos: Path):
    with pytest.raises(UpbenchError, match="under two features"):
        plan(photos, view_size=7)
