"""How a method is called: normalisation, precision, backbones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from probing import CHANNELS, Attending, Bent, Filming, Resized, logits, probe, view
from torch import Tensor

from upbench.contracts.image import IMAGENET_MEAN, IMAGENET_STD, normalize_image
from upbench.contracts.sample import Camera
from upbench.contracts.upsampler import Upsampler
from upbench.dense.camera import CameraChoice
from upbench.dense.method import MethodCall, resized_guidance
from upbench.errors import UpbenchError
from upbench.registry import find_method
from upbench.testing import assert_close, tiny_backbone


class Noting(Upsampler):
    """Notes what it is given; its statistics are nobody else's."""

    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    linear = True
    given: tuple[Tensor, Tensor]

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        self.given = image, features
        return F.interpolate(features, output_size)


class Rerunning(Noting):
    """Runs the backbone."""

    uses_backbone = True
    linear = False

    def forward(self, image, features, output_size, backbone=None):
        self.given = image, features
        return F.interpolate(backbone(self.denormalize(image)).to(features.dtype), output_size)


class Precise(Noting):
    precise_image = True


for _method in (Noting, Rerunning, Precise):
    _method.name = _method.__name__.lower()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 16, 16), torch.randn(2, 16, 4, 4)


@pytest.mark.parametrize(
    ("statistics", "mean", "std"),
    [
        ("method", Noting.mean, Noting.std),
        ("backbone", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        ("imagenet", IMAGENET_MEAN, IMAGENET_STD),
        ("none", (0, 0, 0), (1, 1, 1)),
    ],
)
def test_the_guidance_is_normalised_as_the_protocol_says(statistics, mean, std):
    method, (image, features) = Noting(), inputs()
    call = MethodCall(method, backbone=tiny_backbone(), statistics=statistics)
    call.forward(image, features, (16, 16))
    assert_close(method.given[0], normalize_image(image, mean, std))
    call.operator(image, features, (16, 16))(torch.ones(2, 1, 3, 4, 4))
    assert_close(method.given[0], normalize_image(image, mean, std))


def test_a_backbones_statistics_need_a_backbone():
    with pytest.raises(UpbenchError, match="give one"):
        MethodCall(Noting(), statistics="backbone")


def test_a_method_computes_in_its_own_precision_and_answers_in_float32():
    image, features = inputs()
    for method, kind in ((Noting(), torch.bfloat16), (Precise(), torch.float32)):
        call = MethodCall(method, dtype=torch.bfloat16)
        out = call.forward(image, features, (16, 16))
        assert out.dtype == torch.float32
        assert [part.dtype for part in method.given] == [kind, torch.bfloat16]
        assert_close(out, F.interpolate(features, (16, 16)), terms=1, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["anyup", "raysup", "jbu"])
def test_operators_of_methods_in_half_precision_are_applied_in_float32(name):
    image, features = torch.rand(1, 3, 24, 24), torch.randn(1, CHANNELS, 6, 6)
    torch.manual_seed(0)
    exact = MethodCall(find_method(name).build(channels=CHANNELS))
    torch.manual_seed(0)
    method = find_method(name).build(channels=CHANNELS)
    call = MethodCall(method, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in method.parameters())
    operator = call.operator(image, features, (24, 24))
    found = operator.dense(operator.takes(features))
    assert found.dtype == torch.float32
    expected = exact.forward(image, features, (24, 24))
    # Weights of bfloat16 have 8 bits; their average over a window is no farther off than each of them.
    assert 0 < float((found - expected).abs().mean()) < 0.02 * float(expected.abs().max())


def test_a_probe_of_a_method_in_half_precision_stays_in_float32():
    weight, bias = probe()
    for method in (Resized, Attending, Bent):
        rough = logits(view(method(), dtype=torch.bfloat16), 1, weight, bias)
        exact = logits(view(method()), 1, weight, bias)
        assert rough.dtype == torch.float32
        apart = float((rough - exact).detach().abs().mean()) / float(exact.detach().abs().max())
        assert (
            apart == 0 if method is Resized else 0 < apart < 0.02
        )  # whose operator has no numbers of its own
        assert torch.autograd.grad(rough.sum(), weight)[0].isfinite().all()


def test_a_backbone_goes_to_methods_that_run_it_in_float32():
    backbone, (image, features) = tiny_backbone(), inputs()
    method = Rerunning()
    with pytest.raises(UpbenchError, match="'rerunning' runs the backbone itself and is given none"):
        MethodCall(method)
    call = MethodCall(method, backbone=backbone, dtype=torch.bfloat16)
    out = call.forward(image, features, (8, 8))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert not out.requires_grad
    assert call.operator(image, features, (8, 8)) is None
    expected = F.interpolate(backbone(method.denormalize(method.given[0])), (8, 8))
    assert_close(out, expected, terms=1, dtype=torch.bfloat16)
    MethodCall(Noting(), backbone=backbone).forward(image, features, (8, 8))  # is not given one


def test_the_method_is_put_into_eval_mode_and_asks_for_no_gradient():
    method = find_method("anyup").build(channels=CHANNELS).train()
    call = MethodCall(method)
    assert not method.training
    out = call.forward(torch.rand(1, 3, 16, 16), torch.randn(1, CHANNELS, 4, 4), (16, 16))
    assert not out.requires_grad


def test_cameras():
    camera = Camera(torch.tensor([[20.0, 20.0, 8.0, 8.0]]))
    asked = MethodCall(Filming(), camera=CameraChoice.parse("dataset*2"))
    assert asked.given_camera("one", camera).intrinsics.tolist() == [[40, 40, 8, 8]]
    with pytest.raises(UpbenchError, match="image 'one' has no camera"):
        asked.given_camera("one", None)
    assert MethodCall(Filming()).given_camera("one", camera) is None
    assert MethodCall(Noting(), camera=CameraChoice.parse("dataset")).given_camera("one", None) is None


def test_guidance_of_another_size_is_bilinear_without_antialiasing():
    image = torch.rand(1, 3, 12, 10)
    assert resized_guidance(image, (12, 10)) is image
    expected = F.interpolate(image, (5, 21), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(resized_guidance(image, (5, 21)), expected)
