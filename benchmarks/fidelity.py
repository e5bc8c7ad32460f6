"""How close upsampled features come to the ones that the backbone gives at full resolution; no labels.

    python benchmarks/fidelity.py --images DIR [--methods nearest,bilinear,raysup,anyup:FILE] [--limit 40]

Every photo is cut to its central square and seen at 448 pixels: for a patch of 14, a native map of 32x32.
The same square at 224 and at 112 pixels gives maps of 16x16 and 8x8, which each method brings to 32x32 (x2,
x4), guided by the photo at `--guidance` pixels. Numbers are means over photos with their standard errors:
the cosine similarity and the squared error (features scaled by the native map's standard deviation), and
the paired difference of the cosine to bilinear's. A method is NAME or NAME:WEIGHTS, as in `upbench run`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from upbench.contracts.backbone import Backbone
from upbench.contracts.upsampler import Upsampler
from upbench.errors import UpbenchError
from upbench.features.backbones import load_backbone
from upbench.results.records import write_json
from upbench.system.cache import sha256_file
from upbench.system.environment import describe
from upbench.system.progress import bar
from upbench.train.config import ViewConfig
from upbench.train.views import View, ViewPool, compute, find_photos, upright_size
from upbench.weights.load import load_method

RATIOS = (2, 4)
VIEW_SIZE = 448


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--images", required=True, action="append", help="folder with photos; may be repeated"
    )
    parser.add_argument("--methods", default="nearest,bilinear,raysup,anyup")
    parser.add_argument("--backbone", default="dinov2_vits14_focus")
    parser.add_argument("--limit", type=int, default=40, help="photos, evenly spread")
    parser.add_argument("--guidance", type=int, default=VIEW_SIZE, help="side of the guidance in pixels")
    parser.add_argument("--out", type=Path, help="JSON file with every photo's numbers")
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Per-photo numbers of every method and ratio, with what is needed to repeat them."""
    backbone = load_backbone(arguments.backbone)
    methods = {spec: method(spec, backbone.channels) for spec in arguments.methods.split(",")}
    methods.setdefault("bilinear", load_method("bilinear", channels=backbone.channels))
    photos = find_photos(arguments.images)
    chosen = [photos[i * len(photos) // arguments.limit] for i in range(min(arguments.limit, len(photos)))]
    pool = native_pool(chosen, backbone)
    rows: dict[str, dict[str, list[float]]] = {}
    with bar("fidelity", len(methods) * len(RATIOS) * len(pool)) as progress:
        for spec, model in methods.items():
            for ratio in RATIOS:
                numbers = []
                for i in range(len(pool)):
                    numbers.append(compare(model, pool, i, ratio, arguments.guidance))
                    progress.advance()
                cosines, errors = (list(column) for column in zip(*numbers, strict=True))
                rows[f"{spec} x{ratio}"] = {"cosine": cosines, "mse": errors}
    return {
        "backbone": arguments.backbone,
        "guidance": arguments.guidance,
        "photos": [photo.name for photo in chosen],
        "weights": {spec: weights_of(spec) for spec in methods},
        "rows": rows,
        "environment": describe("cpu"),
    }


def method(spec: str, channels: int) -> Upsampler:
    """The method that NAME or NAME:WEIGHTS stands for."""
    name, _, weights = spec.partition(":")
    return load_method(name, weights or "default", channels=channels)


def weights_of(spec: str) -> str | None:
    """SHA-256 of the weights that NAME or NAME:WEIGHTS stands for, or None where there are none."""
    from upbench.registry import find_method
    from upbench.weights.resolve import resolve

    name, _, weights = spec.partition(":")
    return resolve(find_method(name), weights or "default").sha256


def native_pool(photos: list[Path], backbone: Backbone) -> ViewPool:
    """The central squares of photos, with native features and those at the sizes that the ratios start
    from."""
    side = VIEW_SIZE // backbone.stride
    config = ViewConfig(view_size=VIEW_SIZE, guidance_size=VIEW_SIZE, precision="fp32")
    views = []
    for photo in photos:
        width, height = upright_size(photo)
        square = min(width, height)
        box = (float((width - square) // 2), float((height - square) // 2), float(square))
        cells = tuple(sorted(side // ratio for ratio in RATIOS))
        views.append(View(photo, sha256_file(photo), box, False, cells, side, (0, 0, side)))
    return compute(views, backbone, config)


@torch.no_grad()
def compare(model: Upsampler, pool: ViewPool, index: int, ratio: int, guidance: int) -> tuple[float, float]:
    """Mean cosine similarity and scaled squared error of one photo."""
    batch = pool.read([index], pool.views[index].output // ratio).shrunk(guidance)
    dense = model(model.normalize(batch.image), batch.features, (batch.output, batch.output))
    error = (dense - batch.target).square().mean() / batch.target.var()
    return F.cosine_similarity(dense, batch.target, dim=1).mean().item(), error.item()


def table(result: dict[str, object]) -> str:
    """The means with their standard errors, in Markdown."""
    rows: dict[str, dict[str, list[float]]] = result["rows"]  # type: ignore[assignment]
    lines = ["| method | ratio | cosine | MSE | cosine - bilinear |", "|---|--:|--:|--:|--:|"]
    for key, row in rows.items():
        spec, _, ratio = key.rpartition(" ")
        cosine, bilinear = row["cosine"], rows[f"bilinear {ratio}"]["cosine"]
        paired = [a - b for a, b in zip(cosine, bilinear, strict=True)]
        gain = "" if spec == "bilinear" else mean_and_error(paired, sign="+")
        lines.append(
            f"| {spec} | {ratio} | {mean_and_error(cosine)} | {mean_and_error(row['mse'])} | {gain} |"
        )
    return "\n".join(lines)


def mean_and_error(values: list[float], sign: str = "") -> str:
    """As in "0.8421 ± 0.0032" (the standard error of the mean)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):{sign}.4f} ± {error:.4f}"


if __name__ == "__main__":
    sys.exit(main())
