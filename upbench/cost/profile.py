"""What methods cost at given sizes: the rows of `upbench profile`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from upbench.contracts.upsampler import Sizes
from upbench.cost import measure as cost
from upbench.errors import UpbenchError, named
from upbench.features import backbones
from upbench.registry import match_names, plugins
from upbench.results.cell import MethodSpec
from upbench.system.environment import check_sizes
from upbench.system.progress import say, track
from upbench.values import LARGEST_SIDE, whole
from upbench.weights.load import load_method


def profile(
    methods: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    channels: int | None = None,
    stride: int | None = None,
    output: tuple[int, int] | None = None,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    backbone: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures every method at every size; see `upbench.cost.measure` for what the numbers mean.

    Args:
        methods: `NAME[:WEIGHTS]`; wildcards and "all" are allowed.
        sizes: (h, w) of guidance images.
        channels: C of the features; 384 where neither it nor a backbone is given.
        stride: Pixels of the image per feature; 14 likewise.
        output: (H, W) of the output; the size of the image where None.
        batch: Images at a time.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16".
        backbone: Name of the backbone that the features come from; methods that run it need one, and are
            left out of a wildcard without. Its weights are random: they cost the same.

    Yields:
        `Cost.to_dict()` with the method's row name in front, one a method and size.

    Raises:
        UpbenchError: An unknown name, a size that is too small for the stride or too large for the memory, a
            device that is not there, channels or a stride that are not the backbone's, or a method that runs
            the backbone without one.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    running = None
    if backbone is not None:
        running = backbones.load_backbone(backbone, device, pretrained=False)
        channels = _same("channels", channels, running.channels, backbone)
        stride = _same("stride", stride, running.stride, backbone)
    channels, stride = channels or 384, stride or 14
    for size in sizes:
        if min(size) < stride:
            raise UpbenchError(f"size {size[0]}x{size[1]} is smaller than the stride {stride}")
        feature_size = (size[0] // stride, size[1] // stride)
        check_sizes(Sizes(channels, size, feature_size, output or size, batch), device)
    pairs = _matches(methods, with_backbone=running is not None)
    jobs = [(name, spec, size) for name, spec in ((name, spec) for spec, name in pairs) for size in sizes]
    for name, spec, (height, width) in track(jobs, "profile"):
        method = load_method(name, spec.weights, channels, backbone=running, **spec.options)
        measured = cost.measure(
            method,
            channels=channels,
            image_size=(height, width),
            feature_size=(height // stride, width // stride),
            output_size=output or (height, width),
            batch=batch,
            device=device,
            dtype=dtype,
            backbone=running,
        )
        yield {"method": name, **measured.to_dict()}


def _same(what: str, given: int | None, its_own: int, backbone: str) -> int:
    if given not in (None, its_own):
        raise UpbenchError(f"backbone '{backbone}' has {what} {its_own}, asked for {given}")
    return its_own


def _matches(methods: Sequence[str], with_backbone: bool) -> list[tuple[MethodSpec, str]]:
    """The methods that a list of names and wildcards stands for."""
    known = plugins("method")
    pairs = []
    for spec in (MethodSpec.parse(text) for text in methods):
        for name in match_names("method", spec.name, known):
            if with_backbone or not known[name].uses_backbone:
                pairs.append((spec, name))
            elif name == spec.name:
                raise UpbenchError(f"method '{name}' runs the backbone itself: name one with --backbone")
            else:
                say(f"{name} left out: it runs the backbone itself; name one with --backbone")
    return pairs


def table_row(measured: dict[str, Any]) -> dict[str, str]:
    """A measurement in the words of a table."""
    macs, peak = measured["macs"], measured["peak_memory_bytes"]
    sizes = {name: "x".join(map(str, measured[f"{name}_size"])) for name in ("image", "feature", "output")}
    return {
        "method": measured["method"],
        "image": sizes["image"],
        "features": sizes["feature"],
        "output": sizes["output"],
        "params (M)": f"{measured['parameters'] / 1e6:.3f}",
        "MACs (G)": "–" if macs is None else f"{macs / 1e9:.2f}",
        f"{measured['device']} (ms)": f"{measured['latency_ms']:.1f}",
        "quartiles": f"{measured['latency_q25_ms']:.1f}–{measured['latency_q75_ms']:.1f}",
        "peak (MB)": "–" if peak is None else f"{peak / 1e6:.0f}",
        "remarks": "; ".join(measured["warnings"]),
    }


def parse_size(text: str) -> tuple[int, int]:
    """`N` or `HxW` as (height, width).

    Raises:
        UpbenchError: Neither of these.
    """
    found = re.fullmatch(r"([0-9]{1,18})(?:x([0-9]{1,18}))?", text.strip())
    if not found or not int(found[1]) or (found[2] and not int(found[2])):
        raise UpbenchError(f"expected a size such as 448 or 480x640, got {named(text)}")
    height, width = int(found[1]), int(found[2] or found[1])
    whole(f"a side of size {named(text)}", max(height, width), most=LARGEST_SIDE)
    return height, width
