"""Methods as files that run without upbench: ONNX, or PyTorch's own `.pt2`.

An exported model is a method with its weights at fixed sizes. It takes `image` `[B, 3, h_img, w_img]`, RGB in
0..1 (normalised inside, with the method's statistics), and `features` `[B, C, h, w]`, both float32, and
returns `upsampled` `[B, C, H, W]`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench._version import __version__
from upbench.contracts.upsampler import Sizes
from upbench.errors import UpbenchError, unknown
from upbench.registry import find_method
from upbench.system.cache import replacing
from upbench.system.environment import check_sizes
from upbench.system.outputs import writable_file
from upbench.values import number

if TYPE_CHECKING:
    from torch import Tensor

    from upbench.contracts.upsampler import Upsampler

FORMATS = ("onnx", "pt2")
OPSET = 18
TOLERANCE = 1e-4
METADATA_FILE = "upbench.json"
INPUTS = ("image", "features")
OUTPUT = "upsampled"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        format: "onnx" or "pt2".
        difference: Largest absolute difference from the method's own output, for noise; None where nothing on
            this machine could run the file.
        metadata: What the file says of itself.
    """

    path: Path
    format: str
    difference: float | None
    metadata: dict[str, Any]


def export(
    method: str,
    out: str | os.PathLike[str],
    *,
    image_size: tuple[int, int],
    weights: str | os.PathLike[str] | Mapping[str, Tensor] = "default",
    format: str | None = None,
    backbone: str | None = None,
    channels: int | None = None,
    stride: int | None = None,
    feature_size: tuple[int, int] | None = None,
    output_size: tuple[int, int] | None = None,
    batch: int = 1,
    tolerance: float = TOLERANCE,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> Exported:
    """Loads a method and writes it to a file, checked against the method itself.

    Args:
        method: Name of the method.
        out: Path of the file, complete or not there.
        image_size: (h_img, w_img) of the guidance image in pixels.
        weights: As for `upbench.load_method`.
        format: One of `FORMATS`; what the suffix of `out` says by default.
        backbone: Whose features it is for; gives `channels` and `stride`.
        channels: C of the features; 384 by default.
        stride: Pixels per feature, from which `feature_size` follows; 14 by default.
        feature_size: (h, w) of the features.
        output_size: (H, W); that of the image by default.
        batch: Images at a time.
        tolerance: Largest difference from the method's own output, relative to its largest value where that
            is above 1.
        options: Options of the method's constructor.
        more: More of them, as keywords.

    Returns:
        What was written.

    Raises:
        UpbenchError: Unknown names, sizes that do not fit, a missing package, a method that cannot be
            exported, or a file whose output differs from the method's by more than `tolerance`.
    """
    from upbench.weights.load import load_resolved
    from upbench.weights.resolve import resolve

    options = {**(options or {}), **more}
    cls = find_method(method)
    cls.check_options(options)
    number("tolerance", tolerance, 0)
    path = Path(out)
    kind = _format(path, format)
    writable_file("exported method", path)
    if backbone is not None:
        known = _backbone(backbone)
        channels, stride = channels or known[0], stride or known[1]
    channels, stride = channels or 384, stride or 14
    feature_size = feature_size or (image_size[0] // stride, image_size[1] // stride)
    sizes = Sizes(channels, image_size, feature_size, output_size or image_size, batch)
    check_sizes(sizes)
    resolved = resolve(cls, weights)
    loaded = load_resolved(cls, resolved, channels, options=options)
    entry = resolved.entry
    about = {
        "weights": resolved.name if entry or resolved.path is None else resolved.path.name,
        "weights_sha256": resolved.sha256,
        "weights_license": entry.license if entry else "",
        "backbone": backbone or (entry.backbone if entry else ""),
        "options": options,
    }
    return export_method(loaded, path, sizes, format=kind, about=about, tolerance=tolerance)


def export_method(
    method: Upsampler,
    out: str | os.PathLike[str],
    sizes: Sizes,
    *,
    format: str | None = None,
    about: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a method to a file; the method itself stays as it is.

    Args:
        method: With its weights.
        out: Path of the file, complete or not there.
        sizes: Of inputs and output; the file works for these alone.
        format: One of `FORMATS`; what the suffix of `out` says by default.
        about: More to be written into the file's metadata; plain values.
        tolerance: As for `export`.

    Returns:
        What was written.

    Raises:
        UpbenchError: As `export`.
    """
    import torch

    path = writable_file("exported method", out)
    kind = _format(path, format)
    _check(method, sizes, kind)
    module = _module(method, sizes.output_size)
    inputs = sizes.inputs(torch.float32)
    metadata = _metadata(method, sizes, about or {})
    with torch.no_grad(), _quiet():
        expected = _guarded(method, kind, lambda: module(*inputs))
        data = _guarded(method, kind, lambda: _WRITERS[kind](module, inputs, metadata))
        difference = _difference(kind, data, inputs, expected)
    if difference is not None and not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise UpbenchError(
            f"method '{method.name}' exported to {kind} gives another output: it differs by "
            f"{difference:.1e}, more than the tolerance of {tolerance:g}"
        )
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return Exported(path, kind, difference, metadata)


def _format(path: Path, given: str | None) -> str:
    kind = given or path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise unknown(
            "export format", kind, FORMATS, "give the file one of these suffixes, or name the format"
        )
    return kind


def _backbone(name: str) -> tuple[int, int]:
    """Channels and stride of a backbone; listed ones are not loaded for that."""
    from upbench.features.backbones import list_backbones, load_backbone

    for info in list_backbones():
        if info.name == name:
            return info.channels, info.stride
    loaded = load_backbone(name, pretrained=False)
    return loaded.channels, loaded.stride


def _check(method: Upsampler, sizes: Sizes, kind: str) -> None:
    from upbench.contracts.upsampler import Setting

    if method.uses_backbone:
        raise UpbenchError(f"method '{method.name}' cannot be exported: it runs the backbone itself")
    check_sizes(sizes)
    setting = Setting(
        backbone="",
        channels=sizes.channels,
        stride=max(1, sizes.image_size[0] // sizes.feature_size[0]),
        image_size=sizes.image_size,
        feature_size=sizes.feature_size,
        output_size=sizes.output_size,
    )
    if reason := method.skip_reason(setting):
        raise UpbenchError(f"method '{method.name}' cannot be exported for these sizes: {reason}")
    if kind == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UpbenchError(f"export to onnx needs {' and '.join(missing)}: pip install 'upbench[export]'")


def _module(method: Upsampler, output_size: tuple[int, int]) -> Any:
    """The method on the CPU in float32, with its normalisation, as a function of image and features."""
    from torch import nn

    class Exportable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.method = copy.deepcopy(method).cpu().float().requires_grad_(False)

        def forward(self, image: Tensor, features: Tensor) -> Tensor:
            upsampled: Tensor = self.method(self.method.normalize(image), features, output_size)
            return upsampled

    return Exportable().eval()


def _metadata(method: Upsampler, sizes: Sizes, about: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {
        "upbench": __version__,
        "torch": torch.__version__,
        "method": method.name,
        "paper": method.paper,
        "license": method.license,
        **about,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(sizes).items()},
        "image": "RGB in 0..1; normalised inside with mean and std",
        "mean": list(method.mean),
        "std": list(method.std),
    }


def _write_pt2(module: Any, inputs: tuple[Tensor, Tensor], metadata: Mapping[str, Any]) -> bytes:
    import torch

    program = torch.export.export(module, inputs, strict=False)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
    return buffer.getvalue()


def _write_onnx(module: Any, inputs: tuple[Tensor, Tensor], metadata: Mapping[str, Any]) -> bytes:
    import torch

    program = torch.onnx.export(
        module,
        inputs,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=list(INPUTS),
        output_names=[OUTPUT],
    )
    assert program is not None
    proto = program.model_proto
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in nodes:
            del node.metadata_props[:]  # where in which file of this machine each was made
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    content: bytes = proto.SerializeToString()
    return content


_WRITERS: dict[str, Callable[..., bytes]] = {"onnx": _write_onnx, "pt2": _write_pt2}


def _difference(kind: str, data: bytes, inputs: tuple[Tensor, Tensor], expected: Tensor) -> float | None:
    """Largest difference of what the file gives from what the method gave."""
    import torch

    if kind == "pt2":
        found = torch.export.load(io.BytesIO(data)).module()(*inputs)
    elif importlib.util.find_spec("onnxruntime") is None:
        return None
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        arrays = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
        found = torch.from_numpy(session.run([OUTPUT], arrays)[0])
    return float((found - expected).abs().max())


def _guarded(method: Upsampler, kind: str, function: Callable[[], Any]) -> Any:
    """What a function returns; where it fails, one line that says why the method cannot be exported."""
    try:
        return function()
    except UpbenchError:
        raise
    except Exception as error:  # exporters have no common one
        raise UpbenchError(
            f"method '{method.name}' cannot be exported to {kind}: {_reason(error)}"
        ) from error


def _reason(error: BaseException) -> str:
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in texts:
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", text):
            return f"ONNX has no form of {found[1]}"
        if found := re.search(r"No decompositions? registered for.*?'([\w.]+)'", text):
            return f"ONNX has no form of {found[1]}"
    lines = [line.strip() for line in texts[-1].splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' remarks on themselves from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
