"""FeatUp's implicit network: views against slow definitions, the fit by what it does to known features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.backbone import Backbone
from upbench.cost.macs import count_macs
from upbench.errors import UpbenchError
from upbench.methods.featup_implicit import (
    Downsampler,
    FeatUpImplicit,
    Network,
    Uncertainty,
    Views,
    blur_matrix,
    fit,
    observe,
    principal_axes,
    separable,
    variation,
)
from upbench.ops.basis import BasisOperator
from upbench.ops.jitter import Jitter
from upbench.testing import assert_close, tiny_backbone

BUDGET: dict[str, Any] = {
    "steps": 60,
    "views": 8,
    "batch": 2,
    "dim": 12,
    "frequencies": 6,
    "lr": 0.02,
    "dropout": 0.0,
    "side": 32,
}


class Pooled(nn.Module):
    """A 'backbone' whose high-resolution features are known: averages of a function of a pixel's colour."""

    name, stride, channels = "pooled", 8, 12
    resized = staticmethod(Backbone.resized)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = 2 * torch.randn(self.channels, 3, 1, 1, generator=generator)
        self.phase = torch.randn(self.channels, 1, 1, generator=generator)

    def truth(self, image: Tensor) -> Tensor:
        return (F.conv2d(image, self.weight) + self.phase).cos()

    def forward(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(self.truth(image), self.stride)


def photo(size: int) -> Tensor:
    """`[1, 3, size, size]` squares of colour and a dark disc."""
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (size, size))
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image[:, :, (y - size / 2) ** 2 + (x - size / 3) ** 2 < (size / 4) ** 2] *= 0.4
    return image


def method(**options: Any) -> FeatUpImplicit:
    return FeatUpImplicit(Pooled.channels, **{**BUDGET, **options}).eval()


def upsampled(implicit: Any, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
    return implicit(implicit.normalize(image), features, size, backbone=Pooled())


def test_fit_finds_high_resolution_features() -> None:
    image, backbone = photo(64), Pooled()
    low, truth = backbone(image), backbone.truth(image)
    implicit = method()
    fitted = fit(implicit, backbone, image[0], (32, 32))  # type: ignore[arg-type]
    assert fitted.losses[-10:].mean() < 0.4 * fitted.losses[:5].mean()

    start = fit(method(steps=1, lr=1e-9), backbone, image[0], (32, 32))  # type: ignore[arg-type]
    assert_close(start.low, fitted.low)
    error, before = ((f.downsampled - f.low).square().mean() for f in (fitted, start))
    assert error < 0.3 * before

    out = upsampled(implicit, image, low, (64, 64))
    bilinear = F.interpolate(low, (64, 64), mode="bilinear")
    ours, theirs = (F.cosine_similarity(x, truth, dim=1).mean() for x in (out, bilinear))
    assert ours > theirs + 0.005
    assert variation(out[0].norm(dim=0)) > variation(bilinear[0].norm(dim=0))  # sharper


def test_features_that_are_given_do_not_count_but_their_grid() -> None:
    implicit, image = method(steps=2), photo(64)
    one = upsampled(implicit, image, torch.randn(1, 12, 8, 8), (40, 40))
    assert_close(upsampled(implicit, image, torch.zeros(1, 12, 8, 8), (40, 40)), one)
    assert upsampled(implicit, image, torch.zeros(1, 12, 4, 4), (40, 40)).ne(one).any()


def test_works_in_inference_mode_and_leaves_the_generator_alone() -> None:
    implicit, image = method(steps=2), photo(32)
    state = torch.get_rng_state()
    with torch.inference_mode():
        inside = upsampled(implicit, image, torch.zeros(1, 12, 4, 4), (32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    outside = upsampled(implicit, image, torch.zeros(1, 12, 4, 4), (32, 32))
    assert_close(inside, outside)
    other = method(steps=2, seed=1)
    assert upsampled(other, image, torch.zeros(1, 12, 4, 4), (32, 32)).ne(outside).any()


def test_needs_a_backbone() -> None:
    with pytest.raises(UpbenchError, match=r"featup_implicit.*backbone"):
        FeatUpImplicit(12, **BUDGET)(torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, 4, 4), (32, 32))


def by_definition(jitter: Jitter, view: int, image: Tensor) -> Tensor:
    """A view with the library's own padding, interpolation and slicing."""
    height, width = jitter.size
    zoom = float(jitter.zoom[view])
    moved = F.pad(image[None], [jitter.pad] * 4, mode="reflect")
    if zoom > 1:
        moved = F.interpolate(moved, scale_factor=zoom, mode="bilinear")
    top, left = (int(n) for n in jitter.origin[view])
    moved = moved[0, :, top : top + height, left : left + width]
    return moved.flip(2) if jitter.mirrored[view] else moved


def test_views_by_their_definition() -> None:
    generator = torch.Generator().manual_seed(5)
    jitter = Jitter.sample(40, (18, 26), pad=6, max_zoom=1.8, generator=generator)
    image = torch.randn(2, 18, 26)
    moved = jitter.apply(image)
    assert_close(moved[0], image)  # the first view is the image
    for view in range(40):
        assert_close(moved[view], by_definition(jitter, view, image))
    assert 5 < int(jitter.mirrored.sum()) < 35
    assert 5 < int((jitter.zoom > 1).sum()) < 35


def test_downsampler_by_its_definition() -> None:
    """Views are drawn, their pixels weighted by saliency and window, cell by cell; nothing is drawn here."""
    stride, size = 4, (16, 24)
    generator = torch.Generator().manual_seed(2)
    jitter = Jitter.sample(5, size, pad=3, max_zoom=1.8, generator=generator)
    downsampler = Downsampler(6, stride)
    nn.init.normal_(downsampler.windows)
    features = torch.randn(*size, 6)
    with torch.no_grad():
        dense, magnitude = downsampler(features, *Views(jitter, size)[torch.arange(5)])
        norm = features.norm(dim=2, keepdim=True)
        salience = downsampler.saliency(torch.cat([norm, features], 2)).exp()
        seen = jitter.apply(torch.cat([salience, salience * norm, salience * features], 2).movedim(2, 0))
        rows, cols = downsampler.windows.exp()
        for i in range(size[0] // stride):
            for j in range(size[1] // stride):
                total = torch.zeros(5, 8)
                for a in range(8):
                    for b in range(8):
                        y, x = i * stride - 2 + a, j * stride - 2 + b
                        if 0 <= y < size[0] and 0 <= x < size[1]:
                            total += rows[a] * cols[b] * seen[:, :, y, x]
                expected = total[:, 1:] / total[:, :1]
                assert_close(magnitude[:, i, j], expected[:, 0])
                assert_close(dense[:, i, j], expected[:, 1:])


def test_few_views_are_kept_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    jitter = Jitter.sample(3, (8, 12), pad=1, max_zoom=1.5, generator=torch.Generator())
    kept = Views(jitter, (6, 6))[torch.tensor([2, 0])]
    monkeypatch.setattr("upbench.methods.featup_implicit.PCA_VIEWS", 2)
    for one, other in zip(kept, Views(jitter, (6, 6))[torch.tensor([2, 0])], strict=True):
        assert_close(one, other)


def test_more_views_than_the_components_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond are projected in small batches, on the same axes."""
    image, backbone = photo(32)[0], Pooled()
    implicit = method(views=21, dim=5)
    monkeypatch.setattr("upbench.methods.featup_implicit.PCA_VIEWS", 10)
    views, targets, components = observe(implicit, backbone, image)  # type: ignore[arg-type]
    assert targets.shape == (21, 4, 4, 5)
    axes, mean = components[:, :5], components[:, 5]
    scale = axes.norm(dim=0)
    expected = (backbone(views.apply(image)).movedim(1, 3) - mean) @ (axes / scale) / scale
    assert_close(targets, expected)


def test_principal_axes() -> None:
    samples = torch.randn(200, 6) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1]) + 2
    mean, axes, scale = principal_axes(samples, 3)
    _, values, vectors = torch.linalg.svd(samples - samples.mean(0), full_matrices=False)
    assert_close((axes.T @ vectors[:3].T).abs(), torch.eye(3))
    projected = (samples - mean) @ axes / scale
    assert_close(projected.square().mean(), torch.tensor(1.0))
    assert_close(scale, (values[:3].square() / 200).mean().sqrt())


def test_blur_is_a_reflected_convolution() -> None:
    taps = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
    taps = taps / taps.sum()
    features = torch.randn(7, 9, 3)
    padded = F.pad(features.movedim(2, 0), (2,) * 4, mode="reflect").unsqueeze(1)
    expected = F.conv2d(padded, (taps[:, None] * taps)[None, None])[:, 0].movedim(0, 2)
    assert_close(separable(features, blur_matrix(7), blur_matrix(9)), expected)
    for size in (1, 2):  # narrower than the kernel
        assert_close(blur_matrix(size).sum(1), torch.ones(size))


def test_uncertainty_is_the_likelihood_of_a_gaussian() -> None:
    layer, seen, target = Uncertainty(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    scale = (layer.scale(target) + 0.1).exp()
    expected = F.gaussian_nll_loss(seen, target, scale.square().expand_as(target))
    assert_close(layer(seen, target), expected)


def test_network_drops_whole_channels_in_training_only() -> None:
    network = Network(8, 3, dropout=0.5)
    image = torch.rand(5, 6, 3)
    assert network(image).ne(network(image)).any()
    assert_close(network.eval()(image), network(image))
    kept = network.train()._drop(torch.ones(5, 6, 1000)).flatten(0, 1)
    assert torch.equal(kept[0].expand_as(kept), kept)
    assert 0.4 < float((kept[0] == 0).float().mean()) < 0.6


def test_basis_operator_refuses_other_vectors() -> None:
    operator = BasisOperator(torch.randn(1, 3, 4, 5))
    assert operator(torch.randn(1, 1, 2, 1, 3)).shape == (1, 2, 4, 5)
    assert operator.nbytes() == 3 * 4 * 5 * 4
    with pytest.raises(UpbenchError, match="operator takes"):
        operator(torch.randn(1, 1, 2, 1, 4))


def test_macs_of_backbone_and_fit() -> None:
    """A network of one frequency by hand; doubling the steps doubles the fit and nothing else."""
    backbone = tiny_backbone()
    counts = []
    for steps in (5, 10):
        implicit = FeatUpImplicit(16, steps=steps, views=3, batch=2, dim=8, frequencies=1)
        inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, 8, 8)
        counts.append(implicit.macs(*inputs, (32, 32), backbone=backbone))
    first, second = (counted.by_operator for counted in counts)
    assert first["backbone"] == 3 * count_macs(backbone, torch.zeros(1, 3, 32, 32)).total
    described, pixels = 5 * 2 + 3, 32 * 32
    assert first["network"] == pytest.approx(pixels * (8 * described + 2 * 8 * 8), rel=0.6)  # norms besides
    assert second["fit"] == 2 * first["fit"]
    assert {k: v for k, v in first.items() if k != "fit"} == {k: v for k, v in second.items() if k != "fit"}
    assert "5 steps" in counts[0].note
    assert counts[0].total == sum(first.values())


@pytest.mark.parametrize("options", [{"steps": 0}, {"side": 0}, {"lr": 0.0}, {"dropout": 1.0}])
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UpbenchError, match=f"featup_implicit: {next(iter(options))}"):
        FeatUpImplicit.build(**options)
