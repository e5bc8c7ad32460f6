"""RaysUp against the official outputs; cameras, checkpoints, cost, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from upbench.contracts.sample import Camera
from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.layers.rays import default_intrinsics, ray_directions
from upbench.methods.raysup import RaysUp
from upbench.testing import assert_close
from upbench.testing.closeness import allowed
from upbench.weights.load import load_method

ROUNDING = allowed(torch.float32)  # of averages of numbers below 1

DIM = 64  # of a branch


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state of ours under the official key names."""
    names = {"center": "center", "horizontal": "horiz", "vertical": "vert", "corners": "corners"}
    renamed = {}
    for key, tensor in state.items():
        _, branch, rest = key.split(".", 2)
        renamed[f"image_tokenizer.img_encoder.enc_{names[branch]}.{rest}"] = tensor
    return renamed


@pytest.fixture
def model() -> RaysUp:
    torch.manual_seed(0)
    return RaysUp(channels=16).eval()


def camera(batch: int = 1, **changes: float) -> Camera:
    values = {"fx": 60.0, "fy": 50.0, "cx": 28.0, "cy": 21.0, **changes}
    pose = torch.eye(4).repeat(batch, 1, 1)
    return Camera(torch.tensor([[values[n] for n in ("fx", "fy", "cx", "cy")]]).repeat(batch, 1), pose)


@pytest.mark.parametrize("case", range(1, 6))
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "raysup"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        size = tuple(json.loads(file.metadata()["output_size"]))
    weights = load_file(folder / "case1.safetensors")
    state = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    method = load_method("raysup", weights=state, channels=stored["features"].shape[1])
    views = Camera(stored["fxfycxcy"], stored["c2w"])
    with torch.inference_mode():
        outputs = [method(stored["image"], stored["features"], size, camera=views)]
        if case != 3:  # all but this have the camera that stands in for none
            outputs.append(method(stored["image"], stored["features"], size))
        views = Camera(stored["fxfycxcy"].double(), stored["c2w"].double())
        exact = method.double()(stored["image"].double(), stored["features"].double(), size, camera=views)
    for output in outputs:
        assert_close(output, stored["output"], reference=exact)


def test_parameters_and_checkpoints(model: RaysUp) -> None:
    state = official(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 102_592
    same = load_method("raysup", weights=state, channels=16)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))
    small = RaysUp(dim=128)
    assert RaysUp.options_from(official(small.state_dict())) == {"dim": 128, "encoder": "decoupled"}
    loaded = load_method("raysup", weights=official(small.state_dict()))
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in small.parameters()]
    lacking = {key: t for key, t in state.items() if "enc_vert.1.norm2.bias" not in key}
    with pytest.raises(UpbenchError, match=r"lacks encoder\.vertical\.1\.norm2\.bias"):
        load_method("raysup", weights=lacking)
    with pytest.raises(UpbenchError, match="left over"):
        load_method("raysup", weights={**state, "extra": torch.zeros(1)})


def test_no_camera_is_the_identity_pose_over_the_image(model: RaysUp) -> None:
    image, features = torch.randn(2, 3, 42, 56), torch.randn(2, 16, 6, 8)
    plain = Camera(default_intrinsics(image))
    assert plain.intrinsics.tolist() == [[56, 42, 28, 21]] * 2
    assert_close(model(image, features, (42, 56)), model(image, features, (42, 56), camera=plain))


def test_a_camera_matters_its_position_does_not(model: RaysUp) -> None:
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 16, 6, 8)
    here = model(image, features, (42, 56), camera=camera())
    moved = camera()
    moved.pose[0, :3, 3] = torch.tensor([3.0, -2.0, 9.0])
    assert_close(model(image, features, (42, 56), camera=moved), here)
    wide = model(image, features, (42, 56), camera=camera(fx=20))
    assert (wide - here).abs().max() > 1e-3


def test_rays() -> None:
    """Straight on at the centre, by the focal lengths elsewhere, and turned by the pose."""
    image = torch.zeros(1, 3, 40, 60)
    view = Camera(torch.tensor([[30.0, 40.0, 30.0, 20.0]]))
    rays = ray_directions(image, (5, 3), view)
    assert rays.shape == (1, 3, 5, 3)
    assert_close(rays.norm(dim=1), torch.ones(1, 5, 3))
    assert_close(rays[0, :, 2, 1], torch.tensor([0.0, 0.0, 1.0]))
    corner = torch.tensor([(10 - 30) / 30, (4 - 20) / 40, 1.0])
    assert_close(rays[0, :, 0, 0], corner / corner.norm())
    turn = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    pose = torch.eye(4)[None].clone()
    pose[0, :3, :3] = turn
    turned = ray_directions(image, (5, 3), Camera(view.intrinsics, pose))
    assert_close(turned, torch.einsum("ij,bjhw->bihw", turn, rays))


def test_original_size_is_a_maximum_over_the_batch(model: RaysUp) -> None:
    """As in the official code: a neighbour with a larger principal point changes this image's rays."""
    image = torch.zeros(2, 3, 40, 60)
    own = Camera(torch.tensor([[30.0, 40.0, 30.0, 20.0], [30.0, 40.0, 15.0, 20.0]]))
    alone = ray_directions(image[1:], (4, 6), Camera(own.intrinsics[1:]))
    together = ray_directions(image, (4, 6), own)[1:]
    assert (alone - together).abs().max() > 0.1


@pytest.mark.parametrize(("grid", "size"), [((3, 2), (30, 20)), ((1, 1), (9, 7)), ((8, 8), (4, 3))])
def test_maps_smaller_than_the_window(model: RaysUp, grid: tuple[int, int], size: tuple[int, int]) -> None:
    """The window shrinks to the map; every output is an average of its values."""
    features = torch.rand(1, 16, *grid)
    output = model(torch.randn(1, 3, 28, 28), features, size)
    assert output.shape == (1, 16, *size)
    low, high = features.amin((2, 3), keepdim=True), features.amax((2, 3), keepdim=True)
    assert ((output >= low - ROUNDING) & (output <= high + ROUNDING)).all()
    if grid == (1, 1):
        assert_close(output, features.expand(output.shape))


def test_kernel_size_has_an_effect() -> None:
    """A window of one cell is the nearest neighbour."""
    image, features = torch.randn(1, 3, 42, 56), torch.randn(1, 16, 6, 8)
    output = RaysUp(kernel_size=1).eval()(image, features, (42, 56))
    assert_close(output, F.interpolate(features, (42, 56), mode="nearest-exact"))


@pytest.mark.parametrize("options", [{"dim": 100}, {"dim": 0}, {"kernel_size": 0}])
def test_refused_options(options: dict[str, Any]) -> None:
    with pytest.raises(UpbenchError, match="raysup"):
        RaysUp.build(**options)


def expected_macs(image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int], channels: int) -> int:
    """By hand, for whole ratios and one image; what is counted is told in `upbench.cost.macs`."""
    pixels, low, high = (a * b for a, b in (image, grid, size))
    taps = (1, 3, 3, 4)
    stems = 3 * DIM * sum(taps)
    blocks = 2 * DIM * DIM * (2 * taps[0] + taps[1] + taps[2] + taps[3])
    norms = 5 * DIM * 2 * (2 + 1 + 1 + 1)
    encoder = pixels * (stems + blocks + norms)
    pooling = 4 * DIM * (max(pixels, low) * (grid != image) + max(pixels, high) * (size != image))
    rotation = 4 * DIM * (low + high)  # one addcmul per channel
    attention = high * 6 * 6 * (4 * DIM + channels)
    return encoder + pooling + rotation + attention


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [((112, 84), (8, 6), (112, 84)), ((56, 56), (8, 8), (112, 112)), ((112, 112), (8, 8), (56, 56))],
)
def test_macs_equal_a_hand_count(
    model: RaysUp, image: tuple[int, int], grid: tuple[int, int], size: tuple[int, int]
) -> None:
    counted = count_macs(_Bound(model, size), torch.randn(1, 3, *image), torch.randn(1, 16, *grid))
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected_macs(image, grid, size, 16), rel=0.02)


def test_macs_of_the_paper_setting() -> None:
    """448 pixels, 32 x 32 x 384 features: about 100 thousand MACs a pixel, nearly all in the encoder."""
    total = expected_macs((448, 448), (32, 32), (448, 448), 384)
    assert 20e9 < total < 26e9


def test_random_weights_begin_close_to_bilinear_interpolation():
    """What the initial bias is for: without it, attention begins as a box over the whole window."""
    fine = F.interpolate(torch.randn(1, 8, 6, 6), (32, 32), mode="bicubic")
    coarse = F.adaptive_avg_pool2d(fine, 16)
    method = load_method("raysup", "none", channels=8)
    image = method.normalize(F.interpolate(torch.rand(1, 3, 4, 4), (64, 64), mode="bilinear"))

    def error() -> float:
        with torch.no_grad():
            return float((method(image, coarse, (32, 32)) - fine).square().mean())

    ours = error()
    for branch in method.encoder.children():
        nn.init.zeros_(branch[-1].conv2.bias)
    assert ours < 0.5 * error()
