"""`upbench export`: a method in a file that runs without upbench."""

from __future__ import annotations

import argparse

from upbench.cli._parser import Command, check_sizes, integer, real, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("method", metavar="METHOD[:WEIGHTS]", help="which method, with which weights")
    add("--out", required=True, metavar="FILE", help="what to write, as in raysup.onnx")
    add("--format", metavar="onnx|pt2", help="ONNX, or PyTorch's own (default: the suffix of FILE)")
    add("--image-size", required=True, metavar="N|HxW", help="of the guidance image")
    add("--backbone", metavar="NAME", help="whose features it is for; gives channels and stride")
    add("--channels", type=integer, metavar="C", help="of the features (default: the backbone's, or 384)")
    add("--stride", type=integer, metavar="N", help="pixels per feature (default: the backbone's, or 14)")
    add("--feature-size", metavar="N|HxW", help="of the features (default: image size // stride)")
    add("--output-size", metavar="N|HxW", help="of the output (default: that of the image)")
    add("--batch", type=integer, default=1, metavar="N", help="images at a time (default: %(default)s)")
    add("--options", action="append", metavar="KEY=VALUE", help="an option of the method; repeatable")
    add("--tolerance", type=real, default=1e-4, metavar="X", help="of the check (default: %(default)s)")
    add("--plugin", action="append", default=[], metavar="FILE.py", help="a file with plugins; repeatable")


def call(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from upbench.cost.profile import parse_size
    from upbench.export import export
    from upbench.registry import load_plugin_files
    from upbench.results.cell import MethodSpec
    from upbench.system.outputs import emit

    check_sizes(arguments)
    load_plugin_files(arguments.plugin)
    spec = MethodSpec.parse(arguments.method)
    image, features, output = (
        parse_size(text) if text is not None else None
        for text in (arguments.image_size, arguments.feature_size, arguments.output_size)
    )
    assert image is not None
    done = export(
        spec.name,
        arguments.out,
        image_size=image,
        weights=spec.weights,
        format=arguments.format,
        backbone=arguments.backbone,
        channels=arguments.channels,
        stride=arguments.stride,
        feature_size=features,
        output_size=output,
        batch=arguments.batch,
        tolerance=arguments.tolerance,
        options=settings("--options", arguments.options or []),
    )
    if done.difference is None:
        checked = "not checked, as onnxruntime is not installed"
    else:
        checked = f"checked: differs from {spec.name} by at most {done.difference:.1e}"
    emit(f"{done.path}  {done.path.stat().st_size / 1e6:.1f} MB, {checked}")
    return 0


COMMAND = Command(
    "write a method to a file that runs without upbench",
    add_arguments,
    call,
    "Writes a method with its weights, at fixed sizes, as ONNX or .pt2. It takes images in 0..1.",
)
