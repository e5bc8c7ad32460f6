"""large_image, strided and shift_average: against the backbone itself, and against known linear maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from upbench.contracts.backbone import Backbone, BackboneInfo
from upbench.contracts.operator import SourcedOperator
from upbench.contracts.upsampler import Setting
from upbench.errors import UpbenchError
from upbench.methods.strided import overlapping
from upbench.ops.placement import placement_matrix
from upbench.ops.resample import interpolation_matrix, resize
from upbench.testing import assert_close, tiny_backbone
from upbench.weights.load import load_method

NAMES = ("large_image", "strided", "shift_average")
ONE = {"large_image": {"scale": 1}, "strided": {"factor": 1}, "shift_average": {"shifts": 1}}


class Mean(nn.Module):
    """Mean colours of patches: a backbone that is linear and sees nothing beyond its patch."""

    pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward_intermediates(self, image: Tensor, **options: Any) -> list[Tensor]:
        return [F.avg_pool2d(image, self.patch)]


def mean_backbone(patch: int) -> Backbone:
    return Backbone(Mean(patch), BackboneInfo("mean", 3, patch, "none"))


def rotary_backbone() -> Backbone:
    """A tiny ViT with rotary positions, as DINOv3 has them, and no learned ones."""
    model = Eva(
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=1,
        num_classes=0,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        dynamic_img_size=True,
    )
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Backbone(model, BackboneInfo("tiny-eva", 16, 4, "random"))


def run(
    name: str,
    backbone: Backbone,
    image01: Tensor,
    grid: tuple[int, int],
    output_size: tuple[int, int],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The dense features and the sources that they were interpolated from."""
    method: Any = load_method(name, backbone=backbone, **options)
    image, features = method.normalize(image01), torch.zeros(len(image01), method.channels, *grid)
    with torch.no_grad():
        operator = method.operator(image, features, output_size, backbone=backbone)
        assert isinstance(operator, SourcedOperator)
        return method(image, features, output_size, backbone=backbone), operator.sources


def embeddings(backbone: Backbone) -> list[Tensor]:
    """Fills with the output of the patch embedding, `[B, C, h, w]`, call by call."""
    seen: list[Tensor] = []
    backbone.model.patch_embed.proj.register_forward_hook(lambda _, args, out: seen.append(out))
    return seen


def smooth(height: int, width: int, batch: int = 1) -> Tensor:
    coarse = torch.rand(batch, 3, 4, 5)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0.05, 0.95)


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(24, 40), (32, 32), (23, 41)])
def test_a_factor_of_one_is_the_backbone_interpolated(name: str, size: tuple[int, int]) -> None:
    backbone, image01 = tiny_backbone(), smooth(*size, batch=2)
    h, w = (round(n / 4) for n in size)
    with torch.no_grad():
        expected = backbone(backbone.fit(image01))
    dense, sources = run(name, backbone, image01, (h, w), (3 * h, 5 * w), **ONE[name])
    assert_close(sources, expected)
    assert_close(dense, resize(expected, (3 * h, 5 * w), "bilinear"))


@pytest.mark.parametrize("name", NAMES)
def test_two_backbones_give_the_features_of_each(name: str) -> None:
    image01 = smooth(24, 24)
    one, other = tiny_backbone(), tiny_backbone()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
        other.model.norm.bias.mul_(2)
    first, _ = run(name, one, image01, (6, 6), (24, 24))
    second, _ = run(name, other, image01, (6, 6), (24, 24))
    assert_close(second, 2 * first)


@pytest.mark.parametrize("name", NAMES)
def test_features_of_another_backbone_are_refused(name: str) -> None:
    backbone = tiny_backbone()
    method = load_method(name, backbone=backbone)
    with pytest.raises(
        UpbenchError, match="features have 8 channels, the backbone that the method runs has 16"
    ):
        method(method.normalize(smooth(24, 24)), torch.zeros(1, 8, 6, 6), (24, 24), backbone=backbone)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("large_image", {"scale": 0}, "scale 0 is below 1"),
        ("strided", {"factor": 0}, "factor 0 is below 1"),
        ("shift_average", {"shifts": 0}, "shifts 0 is below 1"),
        ("shift_average", {"mode": "interleaved"}, "did you mean 'interleave'"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UpbenchError, match=words):
        load_method(name, **options)


# ------------------------------------------------------------------------------------------ large_image


@pytest.mark.parametrize(
    ("scale", "output_size", "grid"),
    [(2, (48, 64), (12, 16)), (3, (48, 64), (18, 24)), (4, (20, 64), (20, 32)), (2, (3, 4), (6, 8))],
)
def test_the_large_grid_is_never_finer_than_the_output(
    scale: int, output_size: tuple[int, int], grid: tuple[int, int]
) -> None:
    backbone, image01 = tiny_backbone(), smooth(24, 32)
    dense, sources = run("large_image", backbone, image01, (6, 8), output_size, scale=scale)
    assert tuple(sources.shape[-2:]) == grid
    with torch.no_grad():
        expected = backbone(backbone.resized(image01, (4 * grid[0], 4 * grid[1])))
    assert_close(sources, expected)
    assert_close(dense, resize(expected, output_size, "bilinear"))


# ------------------------------------------------------------------------------------------ strided


@pytest.mark.parametrize("make", [tiny_backbone, rotary_backbone])
@pytest.mark.parametrize(("stride", "grid"), [(1, (21, 29)), (2, (11, 15)), (3, (7, 10)), (4, (6, 8))])
def test_patches_are_those_of_the_plain_backbone(make: Any, stride: int, grid: tuple[int, int]) -> None:
    """Patches that begin at (top + 4 i, left + 4 j) are the plain backbone's on the image from there on."""
    backbone, image01 = make(), smooth(24, 32)
    seen = embeddings(backbone)
    with torch.no_grad():
        out = overlapping(backbone, image01, stride)
        assert tuple(out.shape) == (1, 16, *grid)
        for top, left in ((0, 0), (stride, 0), (0, stride), (stride, stride)):
            height, width = (24 - top) // 4 * 4, (32 - left) // 4 * 4
            backbone(image01[..., top : top + height, left : left + width])
            for i in range(height // 4):
                for j in range(width // 4):
                    if (top + 4 * i) % stride == 0 and (left + 4 * j) % stride == 0:
                        mine = seen[0][..., (top + 4 * i) // stride, (left + 4 * j) // stride]
                        assert_close(mine, seen[-1][..., i, j])


@pytest.mark.parametrize("make", [tiny_backbone, rotary_backbone])
def test_at_the_plain_stride_it_is_the_backbone(make: Any) -> None:
    backbone = make()
    for size in ((32, 32), (24, 40)):  # that of its positions, and another
        image01 = smooth(*size, batch=2)
        with torch.no_grad():
            assert_close(overlapping(backbone, image01, 4), backbone(image01))


def test_half_the_stride_keeps_the_plain_patches() -> None:
    backbone, image01 = tiny_backbone(), smooth(32, 24)
    seen = embeddings(backbone)
    with torch.no_grad():
        overlapping(backbone, image01, 2)
        backbone(image01)
    dense, plain = seen
    assert dense.shape[-2:] == (15, 11)
    assert_close(dense[..., ::2, ::2], plain)


def test_positions_are_those_of_the_denser_grid() -> None:
    """With patches that are all alike, tokens differ by their positions alone."""
    backbone = tiny_backbone()
    image01 = torch.full((1, 3, 32, 32), 0.5)
    seen: list[Tensor] = []
    backbone.model.pos_drop.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        overlapping(backbone, image01, 2)
    positions = backbone.model.pos_embed[:, 1:].reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    finer = F.interpolate(positions, (15, 15), mode="bicubic", antialias=True)
    patch = backbone.model.patch_embed.proj(backbone.normalize(image01))[..., :1, :1]
    assert_close(seen[0][:, 1:], (patch + finer).flatten(2).mT)


def test_each_feature_stands_at_the_centre_of_its_patch() -> None:
    """A feature that grows linearly over the image comes out as that ramp, borders repeated."""
    rows = placement_matrix([2 + 2 * i for i in range(9)], 20, 40)
    ramp = rows @ torch.tensor([2.0 + 2 * i for i in range(9)])
    expected = ((torch.arange(40) + 0.5) / 2).clamp(2, 18)
    assert_close(ramp, expected)


def test_the_backbone_is_left_alone() -> None:
    backbone = tiny_backbone()
    before = copy.deepcopy(backbone)
    run("strided", backbone, smooth(24, 24), (6, 6), (24, 24))
    assert repr(backbone) == repr(before)
    assert backbone.model.patch_embed.proj.stride == (4, 4)
    image01 = smooth(24, 24)
    with torch.no_grad():
        assert torch.equal(backbone(image01), before(image01))


def test_strided_is_skipped_without_patches() -> None:
    method = load_method("strided", backbone=mean_backbone(4))
    setting = Setting("resnet50", 2048, 32, (64, 64), (2, 2), (64, 64))
    assert "'resnet50' is none" in (method.skip_reason(setting) or "")
    with pytest.raises(UpbenchError, match="needs a plain ViT, whose patches can overlap; backbone 'mean'"):
        method(smooth(8, 8), torch.zeros(1, 3, 2, 2), (8, 8), backbone=mean_backbone(4))
    plain = Setting("vit", 384, 14, (224, 224), (16, 16), (224, 224), patch_size=14)
    assert method.skip_reason(plain) is None


# ------------------------------------------------------------------------------------------ shift_average


@pytest.mark.parametrize(
    ("stride", "shifts", "offsets"),
    [(4, 1, [0]), (4, 2, [-1, 1]), (14, 2, [-3, 4]), (14, 4, [-5, -2, 2, 5]), (4, 4, [-1, 0, 1, 2])],
)
def test_offsets(stride: int, shifts: int, offsets: list[int]) -> None:
    method: Any = load_method("shift_average", shifts=shifts)
    assert method.offsets(stride) == offsets


def test_interleaved_means_are_pooling_at_every_shift() -> None:
    """Of a backbone that averages patches, the sources are one average pooling of the mirrored image."""
    image01 = torch.rand(2, 3, 24, 32)
    _, sources = run("shift_average", mean_backbone(4), image01, (6, 8), (24, 32), shifts=4)
    mirrored = F.pad(image01, (1, 2, 1, 2), mode="reflect")
    assert_close(sources, F.avg_pool2d(mirrored, 4, stride=1))


def test_average_is_the_mean_of_maps_that_are_shifted_back() -> None:
    """By the definition: crop, run, interpolate on a grid that begins elsewhere, average."""
    backbone, image01 = mean_backbone(4), torch.rand(1, 3, 24, 32)
    dense, _ = run("shift_average", backbone, image01, (6, 8), (24, 32), shifts=2)
    mirrored = F.pad(image01, (1, 1, 1, 1), mode="reflect")
    total = torch.zeros(1, 3, 24, 32)
    for down in (-1, 1):
        for right in (-1, 1):
            low = backbone(mirrored[..., 1 + down : 25 + down, 1 + right : 33 + right])
            wide = F.interpolate(F.pad(low, (2, 2, 2, 2), mode="replicate"), scale_factor=4, mode="bilinear")
            total += wide[..., 8 - down : 32 - down, 8 - right : 40 - right]
    assert_close(dense, total / 4)


@pytest.mark.parametrize("mode", ["average", "interleave"])
def test_moving_the_image_by_a_spacing_moves_the_features(mode: str) -> None:
    """Plain features move with the image by whole strides only; these by parts of one, too."""

    def shifted(first: int, **options: Any) -> Tensor:
        part = wide[..., first : first + 40]
        return run("shift_average", mean_backbone(4), part, (8, 10), (32, 40), **options)[0]

    wide = torch.rand(1, 3, 32, 48)
    here, there = (shifted(first, shifts=2, mode=mode) for first in (0, 2))
    inner = slice(8, 28)
    assert_close(there[..., inner], here[..., 10:30])
    here, there = (shifted(first, shifts=1) for first in (0, 2))
    assert float((there[..., inner] - here[..., 10:30]).abs().max()) > 0.01


# ------------------------------------------------------------------------------------------ placement


@pytest.mark.parametrize(("size", "output"), [(6, 24), (6, 17), (6, 6), (9, 4), (7, 1), (1, 5)])
def test_placement_on_a_regular_grid_is_bilinear_resampling(size: int, output: int) -> None:
    centres = [(j + 0.5) * 5 for j in range(size)]
    matrix = placement_matrix(centres, 5 * size, output)
    assert_close(matrix, interpolation_matrix(size, output, "bilinear"))


def test_placement_reaches_every_pixel() -> None:
    matrix = placement_matrix([10, 11, 13], 40, 80)
    assert_close(matrix.sum(1), torch.ones(80))
    assert (matrix[:18, 0] == 1).all()
    assert (matrix[28:, 2] == 1).all()
