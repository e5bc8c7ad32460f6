"""FeatUp's bilateral stack against the official outputs; sizes, chunks, operator, checkpoints, cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from upbench.cost.macs import count_macs
from upbench.cost.measure import _Bound
from upbench.errors import UpbenchError
from upbench.methods import featup_jbu
from upbench.methods.featup_jbu import FeatUpJBU
from upbench.ops.operator import project
from upbench.ops.resample import to_size
from upbench.testing import assert_close
from upbench.weights.load import load_method


@pytest.fixture
def model() -> FeatUpJBU:
    """Its temperatures, widths and last bias are not those that it begins with."""
    torch.manual_seed(0)
    model = FeatUpJBU(channels=16, dim=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("case", range(1, 5))
def test_golden(golden_dir: Path, case: int) -> None:
    folder = golden_dir / "featup_jbu"
    stored = load_file(folder / f"case{case}.safetensors")
    with safe_open(folder / f"case{case}.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = stored if metadata["weights"] == "in this file" else load_file(folder / "case1.safetensors")
    state = {key.removeprefix("weights."): t for key, t in weights.items() if key.startswith("weights.")}
    image, features = stored["image"], stored["features"]
    method = load_method("featup_jbu", weights=state, channels=features.shape[1])
    size = tuple(json.loads(metadata["output_size"]))
    tracked = method(image, features, size)
    assert tracked.requires_grad
    with torch.no_grad():
        plain = method(image, features, size)
        operator = method.operator(image, features, size)
        whole = operator(project(torch.eye(method.channels), operator.takes(features), 1))
        exact = method.double()(image.double(), features.double(), size)
    for found in (plain, whole, tracked):
        assert_close(found, stored["output"], reference=exact)


@pytest.mark.parametrize(("channels", "count"), [(32, 25_988), (48, 27_284), (384, 172_772)])
def test_parameters(channels: int, count: int) -> None:
    assert sum(p.numel() for p in FeatUpJBU(channels).parameters()) == count


@pytest.mark.parametrize("size", [(64, 80), (50, 61), (4, 5), (3, 200)])
def test_every_size_comes_from_sixteen_times(model: FeatUpJBU, size: tuple[int, int]) -> None:
    image, features = torch.randn(1, 3, 30, 34), torch.randn(1, 16, 4, 5)
    with torch.no_grad():
        expected = to_size(model(image, features, (64, 80)), size)
        assert_close(model(image, features, size), expected)


def test_chunks_change_nothing(model: FeatUpJBU, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel at a time, kernels of a strip of four rows at a time."""
    image, features = torch.randn(2, 3, 60, 68), torch.randn(2, 16, 4, 5)
    with torch.no_grad():
        expected = model(image, features, (56, 70))
        monkeypatch.setattr(featup_jbu, "_BUDGET", 1)
        monkeypatch.setattr("upbench.ops.window.doubling._BUDGET", {"cpu": 1})
        monkeypatch.setattr("upbench.ops.reassemble._BUDGET", {"cpu": 1})
        assert_close(model(image, features, (56, 70)), expected)


@pytest.mark.parametrize("norm", [False, True])
def test_operator_equals_dense_and_crops(norm: bool) -> None:
    """Mixing channels and the norm before it happen to the sources, the bias is one more row of them."""
    model = FeatUpJBU(16, dim=8, norm=norm).eval()
    image, features, weight = torch.randn(2, 3, 60, 68), torch.randn(2, 16, 5, 6), torch.randn(3, 16)
    with torch.no_grad():
        for size in ((80, 96), (70, 61), (100, 90)):
            dense = torch.einsum("kc,bchw->bkhw", weight, model(image, features, size))
            operator = model.operator(image, features, size)
            projected = project(weight, operator.takes(features), operator.groups)
            assert_close(operator(projected), dense)
            crop = operator.crop(slice(20, 31), slice(7, 8))
            assert_close(crop(projected), dense[:, :, 20:31, 7:8])
            assert crop.nbytes() < operator.nbytes()
            half = operator.to(torch.float16)
            assert half.nbytes() == operator.nbytes() // 2
            projected = project(weight, half.takes(features), 1)
            assert (half(projected) - dense).abs().max() < 0.02 * dense.abs().max()


def test_norm(model: FeatUpJBU) -> None:
    """The same as the stack on features that were normalised beforehand."""
    normed = FeatUpJBU(16, dim=8, norm=True).eval()
    nn.init.normal_(normed.norm.weight)
    normed.load_state_dict({**normed.state_dict(), **model.state_dict()})
    image, features = torch.randn(1, 3, 40, 40), 3 + torch.randn(1, 16, 3, 3)
    scaled = (features - features.mean(1, keepdim=True)) / (
        features.var(1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    scaled = scaled * normed.norm.weight.view(-1, 1, 1)
    assert_close(normed(image, features, (48, 48)), model(image, scaled, (48, 48)))


def lightning(state: dict[str, Tensor]) -> dict[str, object]:
    """A checkpoint of the official training: everything that its module holds, and the trainer's entries."""
    tensors = {f"upsampler.{key}": tensor for key, tensor in state.items() if not key.startswith("norm.")}
    tensors |= {f"model.1.{key}": tensor for key, tensor in state.items() if key.startswith("norm.")}
    tensors |= {"model.0.model.cls_token": torch.zeros(1, 1, 16), "downsampler.w": torch.ones(7, 7)}
    tensors |= {"scale_net.net.weight": torch.zeros(1, 16, 1, 1)}
    return {"state_dict": tensors, "epoch": 4, "global_step": 2000, "pytorch-lightning_version": "2.2"}


@pytest.mark.parametrize("norm", [False, True])
def test_files_as_they_are_published(tmp_path: Path, norm: bool) -> None:
    theirs = FeatUpJBU(16, dim=8, norm=norm)
    torch.save(lightning(theirs.state_dict()), tmp_path / "dino16_jbu_stack_cocostuff.ckpt")
    loaded = load_method("featup_jbu", tmp_path / "dino16_jbu_stack_cocostuff.ckpt", channels=16)
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(UpbenchError, match="for 16 channels, asked for 384"):
        load_method("featup_jbu", tmp_path / "dino16_jbu_stack_cocostuff.ckpt")


def test_checkpoints_that_do_not_fit(model: FeatUpJBU) -> None:
    tensors: dict[str, Tensor] = lightning(model.state_dict())["state_dict"]
    with pytest.raises(UpbenchError, match=r"has decoder\.weight left over"):
        load_method("featup_jbu", {**tensors, "decoder.weight": torch.ones(1)}, channels=16)
    with pytest.raises(UpbenchError, match=r"has up5\.range_temp left over"):
        load_method("featup_jbu", {**tensors, "upsampler.up5.range_temp": torch.ones(1)}, channels=16)
    lacking = {key: tensor for key, tensor in tensors.items() if key != "upsampler.up3.sigma_spatial"}
    with pytest.raises(UpbenchError, match=r"lacks up3\.sigma_spatial"):
        load_method("featup_jbu", lacking, channels=16)


def test_published_weights() -> None:
    """Files of one name in two folders do not take one another's place."""
    files = [entry.file for entry in FeatUpJBU.weights.values()]
    assert len(set(files)) == len(files) == 11 + 1  # and our own
    assert FeatUpJBU.weights["dinov2"].source.endswith("/no_norm/dinov2_jbu_stack_cocostuff.ckpt")
    assert FeatUpJBU.weights["dinov2_norm"].source.endswith("pretrained/dinov2_jbu_stack_cocostuff.ckpt")


def test_refused_options() -> None:
    with pytest.raises(UpbenchError, match="featup_jbu: dim 0"):
        FeatUpJBU.build(dim=0)


def test_macs_equal_a_hand_count() -> None:
    """Per pixel of a stage: two projections, 49 products, a sum, kernels to 8 x 8 cells, applied."""
    c, h, w, pixels = 32, 8, 8, 96 * 112
    method = FeatUpJBU(c).eval()
    expected = h * w * c * c
    for stage in range(1, 5):
        cells = 4**stage * h * w
        expected += 3 * max(pixels, cells)  # the image on this grid
        expected += cells * (3 * 32 + 32 * 32 + 49 * 32 + 49 + 52 * 49 + 49 * 49)
        expected += cells * (7 * 7 * 8 + 7 * 8 * 8 + 8 * 8 * c)
        expected += sum(16 * 2 * n * n for n in (2 ** (stage - 1) * h, 2 ** (stage - 1) * w))  # matrices
    counted = count_macs(
        _Bound(method, (16 * h, 16 * w)), torch.randn(1, 3, 96, 112), torch.randn(1, c, h, w)
    )
    assert counted.uncounted == ()
    assert counted.total == pytest.approx(expected, rel=0.02)
