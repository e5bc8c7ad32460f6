"""The official code of RaysUp and AnyUp, from checkouts that the user names, under weights of ours.

Their packages are imported from the checkout, so this belongs into a process of its own (`gpu_cases.py`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.layers.rays import default_intrinsics
from upbench.ops.window.natten_window import neighbourhood_attention

Forward = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


def official_forward(kind: str, checkout: Path, ours: Upsampler, device: str, dtype: torch.dtype) -> Forward:
    """A forward of official code with the weights of `ours`.

    Args:
        kind: "raysup", "anyup", "anyup-chunked" (256 queries at a time) or "anyup-natten".
        checkout: Folder of the repository.
        ours: The method whose parameters it gets.
        device: Where it runs.
        dtype: Of its parameters and inputs.

    Returns:
        (image, features, output size) to the dense features.

    Raises:
        UpbenchError: The checkout is not there or lacks something that its code needs.
    """
    if not checkout.is_dir():
        raise UpbenchError(f"no checkout of the official code in {checkout}")
    sys.path.insert(0, str(checkout))
    try:
        return (_raysup if kind == "raysup" else _anyup)(kind, ours, device, dtype)
    except ImportError as error:
        raise UpbenchError(f"official {kind}: {error}") from error


def _raysup(kind: str, ours: Upsampler, device: str, dtype: torch.dtype) -> Forward:
    module = importlib.import_module("src.upsampler.raysup")
    _serve_natten(module)
    model = with_weights_of(ours, module.RaysUp()).to(device, dtype).eval()

    def forward(image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        pose = torch.eye(4, device=image.device, dtype=image.dtype).expand(len(image), 4, 4)
        output: Tensor = model(image, features, (pose, default_intrinsics(image).to(image.dtype)), size)
        return output

    return forward


def _anyup(kind: str, ours: Upsampler, device: str, dtype: torch.dtype) -> Forward:
    model = with_weights_of(ours, importlib.import_module("anyup.model").AnyUp())
    if kind == "anyup-natten":
        attention = importlib.import_module("anyup.layers.attention.natten_attention")
        _serve_natten(attention)
        plain = model.cross_decode
        model.cross_decode = attention.NATTENCrossAttentionBlock(
            qk_dim=plain.cross_attn.attention.embed_dim,
            num_heads=4,
            window_ratio=plain.window_ratio,
            use_params_from=plain,
        )
    model = model.to(device, dtype).eval()
    options: dict[str, Any] = {"q_chunk_size": 256} if kind == "anyup-chunked" else {}

    def forward(image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        output: Tensor = model(image, features, size, **options)
        return output

    return forward


def with_weights_of(ours: Upsampler, official: nn.Module) -> nn.Module:
    """Loads our parameters into an official module, by the names that `convert_state` knows."""
    state = ours.state_dict()
    theirs = {}
    for key, tensor in official.state_dict().items():
        names = list(type(ours).convert_state({key: tensor}))
        lacking = [name for name in names if name not in state]
        if lacking:
            raise UpbenchError(f"official {ours.name}: nothing of ours stands for {key} ({lacking[0]})")
        theirs[key] = torch.cat([state[name] for name in names]).view_as(tensor)
    official.load_state_dict(theirs)
    return official


def _serve_natten(module: Any) -> None:
    """Where NATTEN has no compiled kernels, lets official code take what there is of it."""
    import natten

    if natten.HAS_LIBNATTEN:
        return
    if torch.cuda.is_available():
        natten.allow_flex_compile()

    def na2d(
        q: Tensor, k: Tensor, v: Tensor, kernel_size: Any, dilation: Any, stride: int = 1, backend: str = ""
    ) -> Tensor:
        return neighbourhood_attention(q, k, v, tuple(kernel_size), tuple(dilation), q.shape[-1] ** -0.5)

    module.na2d = na2d
