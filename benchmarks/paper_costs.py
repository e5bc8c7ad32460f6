"""What the tables of papers take: seconds an image on this machine, and the hours that follow from them.

    python benchmarks/paper_costs.py [--methods bilinear,raysup,anyup] [--classes 21,151] [--threads 2] \\
        [--protocol raysup-seg] [--backbone dinov2_vits14_focus] [--images 4] [--out FILE.json]
    python benchmarks/paper_costs.py --table FILE.json

The first measures, for each method and number of classes, on images of noise under the protocol: the
backbone, training and evaluation as `upbench run` does them, and the same by a plain loop as the official
code runs it (backbone, dense features, a 1x1 convolution and autograd for every image of every epoch, and the
whole validation split after each). Training is the difference of runs with one and three epochs, evaluation
that of runs with one and three times as many images, so that neither holds what is done once; operators are
computed anew for every batch, as for splits that fit neither into memory nor into files beside it.

The second reads `configs/papers` and prints a line for each dataset of each table: images, steps, cells, and,
for segmentation of the size and the backbone that were measured, hours for each method. They are
extrapolated: seconds an image times the images of all epochs. Features of training images and of their mirror
images are computed once for all methods; their hours stand apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.dataset import Dataset
from upbench.contracts.protocol import Protocol
from upbench.contracts.sample import Sample
from upbench.contracts.upsampler import Upsampler
from upbench.dense import view
from upbench.errors import UpbenchError
from upbench.features.backbones import load_backbone
from upbench.registry import find_protocol, plugins
from upbench.results.records import FOLDER
from upbench.run import context
from upbench.run.config import RunConfig
from upbench.run.loop import run
from upbench.system import environment
from upbench.system.progress import be_quiet
from upbench.weights.load import load_method

CONFIGS = Path(__file__).parents[1] / "configs" / "papers"
SAME_SIZE = ("vit_small_patch14_dinov2.lvd142m", "dinov2_vits14_focus")
"""Backbones that take as long as one another: DINOv2 ViT-S/14."""
EPOCHS = (1, 3)
TIMES = (1, 3)
"""How many times as many images as `--images` the validation splits have."""


def main() -> int:
    """Measures, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--methods", default="bilinear,raysup,anyup")
    add("--classes", default="21,151")
    add("--protocol", default="raysup-seg")
    add("--backbone", default="dinov2_vits14_focus")
    add("--images", type=int, default=4, help="of the training split")
    add("--threads", type=int, default=torch.get_num_threads())
    add(
        "--cpu-time",
        action="store_true",
        help="CPU seconds instead of wall time: for a busy machine, one thread",
    )
    add("--repeats", type=int, default=3, help="medians are over these")
    add("--out", type=Path, metavar="FILE.json")
    add("--table", type=Path, metavar="FILE.json", help="print what follows from an earlier measurement")
    arguments = parser.parse_args()
    try:
        if arguments.table:
            print("\n".join(table(json.loads(arguments.table.read_text()))))
            return 0
        text = json.dumps(measure(arguments), indent=1) + "\n"
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")
    return 0


class Noise(Dataset):
    """Images and labels of noise, a little larger than what is seen of them."""

    targets = frozenset({"label"})
    images, times, side = 4, 1, 448

    def names(self, split: str) -> list[str]:
        """See `Dataset`."""
        return [f"{i}" for i in range(self.images * (self.times if split == "val" else 1))]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset`."""
        draw = torch.Generator().manual_seed(index + (1000 if split == "val" else 0))
        size = (self.side, self.side * 5 // 4)
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw)
        label = torch.randint(len(self.classes), size, dtype=torch.uint8, generator=draw)
        return Sample(self.names(split)[index], image, label=label)

    def fingerprint(self, split: str) -> str:
        """See `Dataset`."""
        return f"{split} {self.images} {self.times} {self.side} {len(self.classes)}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds an image, for each method and number of classes."""
    torch.set_num_threads(arguments.threads)
    be_quiet(True)
    context.VIEW_BYTES = view.SCRATCH_BUDGET = (
        0  # nothing is kept: as for splits larger than memory and files
    )
    protocol: Protocol = find_protocol(arguments.protocol)()
    backbone = load_backbone(arguments.backbone)
    side = protocol.geometry.frames((448, 560), backbone.stride)[0].size[0]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    result: dict[str, Any] = {
        "environment": environment.describe(),
        "threads": arguments.threads,
        "seconds": "CPU" if arguments.cpu_time else "wall",
        "protocol": protocol.label,
        "backbone": arguments.backbone,
        "side": side,
        "images": arguments.images,
        "rows": [],
    }
    image = torch.rand(2, 3, side, side)
    with torch.inference_mode():
        result["backbone_s"] = median(lambda: backbone(image), clock, arguments.repeats) / 2
    for count in map(int, arguments.classes.split(",")):
        for method in arguments.methods.split(","):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["UPBENCH_CACHE"] = str(Path(folder) / "cache")
                _ours(
                    arguments, method, count, side, Path(folder)
                )  # features and costs are there from here on
                ours = [_ours(arguments, method, count, side, Path(folder)) for _ in range(arguments.repeats)]
            row = {"method": method, "classes": count}
            row |= {name: statistics.median(each[name] for each in ours) for name in ours[0]}
            upsampler = load_method(method, channels=backbone.channels)
            row |= _official(upsampler, backbone, image, count, clock)
            result["rows"].append(row)
            print(row, file=sys.stderr)
    return result


def _ours(arguments: argparse.Namespace, method: str, count: int, side: int, out: Path) -> dict[str, float]:
    """Seconds an image of a step of training, and of evaluation, in `upbench run`."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    seconds: dict[tuple[int, int], float] = {}
    for epochs, times in ((EPOCHS[0], TIMES[0]), (EPOCHS[1], TIMES[0]), (EPOCHS[0], TIMES[1])):
        name = f"noise{count}x{times}"
        if name not in plugins("dataset"):
            facts = {"images": arguments.images, "times": times, "side": side, "title": name}
            labels = tuple(f"class {i}" for i in range(count))
            type(name, (Noise,), {**facts, "name": name, "classes": labels, "__module__": __name__})
        config = RunConfig(
            methods=[method],
            backbones=[arguments.backbone],
            datasets=[name],
            protocol=arguments.protocol,
            probe={"epochs": epochs},
            seeds=1,
            device="cpu",
            out=str(out),
        )
        started = time.process_time()
        (record,) = run(config)
        taken = time.process_time() - started
        if record.status != "ok":
            raise UpbenchError(f"{method}: {record.reason}")
        seconds[epochs, times] = taken if arguments.cpu_time else record.seconds
    base = seconds[EPOCHS[0], TIMES[0]]
    steps = arguments.images * (EPOCHS[1] - EPOCHS[0])
    more = arguments.images * (TIMES[1] - TIMES[0])
    return {
        "train_s": max(0.0, seconds[EPOCHS[1], TIMES[0]] - base) / steps,
        "evaluate_s": max(0.0, seconds[EPOCHS[0], TIMES[1]] - base) / more,
    }


def _official(
    method: Upsampler, backbone: Any, image: Tensor, count: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds an image of the plain loop: of a training step on two images, and of the evaluation of one."""
    size = (image.shape[-2], image.shape[-1])
    head = nn.Conv2d(backbone.channels, count, 1)
    label = torch.randint(count, (len(image), *size))
    optimizer = torch.optim.AdamW(head.parameters())
    method.eval()

    def dense(images: Tensor) -> Tensor:
        with torch.no_grad():
            features = backbone(images)
            more = {"backbone": backbone} if method.uses_backbone else {}
            return method(method.normalize(images), features, size, **more)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(dense(image)), label).backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            hit = head(dense(image[:1])).argmax(1) * count + label[:1]
            torch.bincount(hit.flatten(), minlength=count * count)

    steps = median(step, clock)
    return {"official_train_s": steps / len(image), "official_evaluate_s": median(evaluate, clock)}


def median(call: Callable[[], object], clock: Callable[[], float], repeats: int = 3) -> float:
    """Median of the seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        started = clock()
        call()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:])


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: what each dataset of each table takes."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    titles = ["table", "protocol", "dataset", "images", "steps", "cells", "features (h)"]
    titles += [f"{method} (h)" for method in methods]
    yield f"| {' | '.join(titles)} |"
    yield "|---|---|---|" + "--:|" * (len(titles) - 3)
    for file in sorted(CONFIGS.glob("*.yaml")):
        for part in RunConfig.load(file).each():
            yield from _lines(file.stem, part, result, methods)


def _lines(name: str, part: RunConfig, result: Mapping[str, Any], methods: list[str]) -> Iterator[str]:
    datasets, found = plugins("dataset"), None
    with suppress(UpbenchError):
        found = find_protocol(part.protocol)
    for dataset in part.datasets:
        cells = len(part.methods) * len(part.backbones) * len(part.tasks)
        if found is None or dataset not in datasets:
            missing = part.protocol if found is None else dataset
            yield (
                f"| {name} | {part.protocol} | {dataset} | {missing} is not there | | {cells} | |"
                + " |" * len(methods)
            )
            continue
        protocol, cls = found(), datasets[dataset]
        train, scored = (cls.counts.get(split, 0) for split in (cls.train_split, cls.eval_splits[0]))
        recipe = protocol.recipe_for(dataset=dataset)
        steps = recipe.epochs * -(-train // recipe.batch_size)
        entries = [f"{train:,} / {scored:,}", f"{steps:,}", str(cells)]
        alike = set(part.backbones) <= {*SAME_SIZE, result["backbone"]} and part.tasks == ("seg",)
        if alike and result["side"] == protocol.geometry.frames((448, 560), 14)[0].size[0]:
            seen = train * (2 if recipe.flip else 1) + scored
            entries.append(f"{seen * result['backbone_s'] / 3600:.1f}")
            rows = [_nearest(result, method, len(cls.classes)) for method in methods]
            entries += [_hours(row, train, scored, recipe.epochs) for row in rows]
        else:
            entries += ["–"] * (1 + len(methods))
        yield f"| {name} | {part.protocol} | {dataset} | {' | '.join(entries)} |"


def _nearest(result: Mapping[str, Any], method: str, classes: int) -> Mapping[str, Any]:
    """The measured row of a method whose number of classes is nearest."""
    rows = [row for row in result["rows"] if row["method"] == method]
    return min(rows, key=lambda row: abs(row["classes"] - classes))


def _hours(row: Mapping[str, Any], train: int, scored: int, epochs: int) -> str:
    """Ours and the official loop's, as in "1.2 (official 30)"."""
    ours = epochs * train * row["train_s"] + scored * row["evaluate_s"]
    official = epochs * (train * row["official_train_s"] + scored * row["official_evaluate_s"])
    return f"{_figures(ours / 3600)} (official {_figures(official / 3600)})"


def _figures(hours: float) -> str:
    return f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
