"""Every method and task keeps to the device that it is given: on a GPU that is pretended (`pretend_gpu`).

Where there is a GPU the contract's own check (`gpu`) says more.
"""

from __future__ import annotations

import copy

import pytest
import torch
from pretend_gpu import PretendTensor, pretend_gpu, to_gpu

from upbench.contracts.sample import Camera, Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense.tiles import upsample_tiles
from upbench.dense.view import Upsampled
from upbench.registry import find_method, find_task, plugins
from upbench.testing import MethodCase, toy_case

METHODS = sorted(set(plugins("method")) - {"featup_implicit"})  # which fits by gradients: see `pretend_gpu`
GEOMETRY = "square"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on"),
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch knows no CUDA to pretend"),
]


def moved(case: MethodCase, dtype: torch.dtype = torch.float32) -> Upsampler:
    """The case's method on the GPU, its backbone with it."""
    method = to_gpu(copy.deepcopy(case.method).to(dtype))
    if case.backbone is not None:
        method.attach_backbone(to_gpu(case.backbone))
    return method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_forward(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method(name))
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    with torch.no_grad():
        expected = case.method(image, features, geometry.output)
        with pretend_gpu(monkeypatch):
            image = image.to("cuda", torch.float32 if case.cls.precise_image else dtype)
            out = moved(case, dtype)(image, features.to("cuda", dtype), geometry.output)
            assert isinstance(out, PretendTensor)
            assert out.dtype == dtype
            error = (out.cpu().float() - expected).abs()
    scale = float(expected.abs().max().clamp(min=1))
    if dtype == torch.float32:
        assert float(error.max()) < 1e-3 * scale
    else:
        assert float(error.mean()) < 0.05 * scale


@pytest.mark.parametrize("name", METHODS)
def test_probe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the method's operator where it has one."""
    case = MethodCase(find_method(name))
    geometry = case.geometry(GEOMETRY)
    _, features = case.inputs(geometry)
    samples = [Sample("one", torch.rand(3, *geometry.image), torch.ones(geometry.output, dtype=torch.bool))]
    weight, bias = torch.randn(5, case.channels), torch.randn(5)
    crop = slice(2, 9), slice(1, 7)
    with torch.no_grad():
        expected = Upsampled(case.method, samples, features, geometry.output).logits(0, weight, bias, crop)
        with pretend_gpu(monkeypatch):
            upsampled = Upsampled(moved(case), samples, features, geometry.output, device="cuda")
            out = upsampled.logits(0, weight.to("cuda"), bias.to("cuda"), crop)
            assert isinstance(out, PretendTensor)
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method(name))
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    with torch.no_grad(), pretend_gpu(monkeypatch):
        method, image, features = moved(case), image.to("cuda"), features.to("cuda")
        whole = method(image, features, geometry.output)
        for rows, cols, values in upsample_tiles(method, image, features, geometry.output, tile=8):
            assert isinstance(values, PretendTensor)
            torch.testing.assert_close(values.cpu(), whole[..., rows, cols].cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ray_coordinates", ["origin_direction", "plucker"])
def test_cameras(ray_coordinates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MethodCase(find_method("raysup"), {"ray_coordinates": ray_coordinates})
    geometry = case.geometry(GEOMETRY)
    image, features = case.inputs(geometry)
    height, width = geometry.image
    camera = Camera(torch.tensor([[width, width, width / 2, height / 2]]), torch.eye(4)[None])
    with torch.no_grad():
        expected = case.method(image, features, geometry.output, camera=camera)
        with pretend_gpu(monkeypatch):
            there = camera.to("cuda")
            out = moved(case)(image.to("cuda"), features.to("cuda"), geometry.output, camera=there)
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(plugins("task")))
def test_task(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy_case(find_task(name))
    noise, evaluator = case.noise(), case.task.evaluator(case.dataset)
    with torch.no_grad():
        expected = case.task.loss(noise, case.target, case.valid)
        with pretend_gpu(monkeypatch):
            there = (tensor.to("cuda") for tensor in (noise, case.target, case.valid))
            loss = case.task.loss(*there)
            assert isinstance(loss, PretendTensor)
            torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
            for prediction, sample in zip(noise.to("cuda"), case.samples, strict=True):
                evaluator.update(prediction.cpu(), sample)


def test_the_pretence_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(3)
    with pretend_gpu(monkeypatch):
        there = torch.zeros(3, device="cuda")
        assert there.device.type == "cuda"
        assert isinstance(there + 1, PretendTensor)
        assert isinstance(there + torch.tensor(1.0), PretendTensor)  # numbers may come from the CPU
        assert isinstance(torch.tensor([1.0, 2.0], device="cuda"), PretendTensor)
        assert not isinstance(there.cpu(), PretendTensor)
        assert float(there.copy_(here).sum()) == 3
        assert there[torch.tensor([0, 2])].tolist() == [1, 1]
        with pytest.raises(RuntimeError, match=r"aten::add of tensors on cuda \[\[3\]\] and cpu \[\[3\]\]"):
            there + here
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device="cuda")
