"""The papers' segmentation probe as their code trains it, beside ours: the same steps, in turn, in one run.

    python benchmarks/papers.py [--methods bilinear,raysup] [--classes 21,151] [--repeats 3] [--out FILE]

Both train under `raysup-seg` (448 pixels, two images a step, flips, AdamW) on features that are computed
before the clock starts, from the same initial weights on the same batches; that they do is seen from the
losses, whose largest difference is shown. What is timed:

    dense        features of C channels at 448x448, a 1x1 convolution, PyTorch's loss, autograd through both
    ours         the probe on low-resolution features, the loss in strips; operators made for each step
    ours, kept   the same with operators that were made once, as those of splits that fit in memory are
    seeds        ours with several seeds (`--seeds`) in one pass, by ours with one
    variants     ours under the schedules of RaysUp, AnyUp and JAFAR in one pass, by ours under one
    evaluation   ours, from low-resolution features to the confusion matrix and boundaries, by the product of
                 the probe with dense features that are there already, and its argmax

Rounds run everything once, in turn; tables have medians of images a second and of the rounds' ratios, with
the smallest and the largest. Memory by the number of images is looked at from outside, with the real command:
`python benchmarks/scale.py --preset raysup-seg --images 250,1000`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upbench.contracts.dataset import Dataset
from upbench.contracts.sample import IGNORE, Sample
from upbench.dense.method import MethodCall
from upbench.dense.view import UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate.batches import streams
from upbench.evaluate.probe import Head, Probe, TrainingSet, View, train_probes
from upbench.evaluate.schedule import learning_rate_factor
from upbench.evaluate.score import evaluate_probes
from upbench.features.images import SplitImages
from upbench.registry import find_protocol, find_task
from upbench.system import environment
from upbench.weights.load import load_method

STRIDE = 14
KEEP = 10**12
SCHEDULES = ("cosine", "epoch_cosine", "oscillating")
GOALS = {"bilinear": 5.0, "raysup": 3.0}
SEED_GOAL, EVALUATION_GOAL = 1.3, 2.0


def main() -> int:
    """Measures, prints the tables, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--methods", default="bilinear,raysup")
    add("--classes", default="21,151", help="of the datasets")
    add("--side", type=int, default=448, help="of images and outputs, a multiple of 14")
    add("--channels", type=int, default=384)
    add("--steps", type=int, default=4, help="of a training")
    add("--seeds", type=int, default=3, help="that are trained in one pass")
    add("--repeats", type=int, default=3)
    add("--out", type=Path, metavar="FILE", help="JSON file; written after every row")
    arguments = parser.parse_args()
    rows = []
    try:
        for name in arguments.methods.split(","):
            for classes in map(int, arguments.classes.split(",")):
                rows.append(measure(name, classes, arguments))
                print("\n".join(lines(rows[-1])), flush=True)
                if arguments.out:
                    found = {"environment": environment.describe("cpu"), "rows": rows}
                    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    except UpbenchError as error:
        parser.error(str(error))
    return 0


class Photos(Dataset):
    """Blurred noise with labels in blocks."""

    targets = frozenset({"label"})

    def __init__(self, count: int, side: int, classes: int) -> None:
        super().__init__(None)
        self.name = "photos"  # type: ignore[misc]
        self.classes = tuple(f"class {n}" for n in range(classes))  # type: ignore[misc]
        generator = torch.Generator().manual_seed(0)
        self.samples = []
        for number in range(count):
            coarse = torch.rand(1, 3, 30, 30, generator=generator)
            image = F.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1)
            blocks = torch.randint(classes, (1, 1, 12, 12), generator=generator).float()
            label = F.interpolate(blocks, (side, side))[0, 0].to(torch.uint8)
            label[:6] = IGNORE
            self.samples.append(Sample(f"{number}", (image * 255).to(torch.uint8), label=label))

    def names(self, split: str) -> list[str]:
        """See `Dataset`."""
        return [sample.name for sample in self.samples]

    def read(self, split: str, index: int) -> Sample:
        """See `Dataset`."""
        return self.samples[index]

    def fingerprint(self, split: str) -> str:
        """See `Dataset`."""
        return str(len(self.samples))


class Features:
    """Features in memory, as a store gives them."""

    def __init__(self, count: int, channels: int, cells: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.maps = torch.randn(count, channels, cells, cells, generator=generator)

    def __len__(self) -> int:
        return len(self.maps)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """`[B, C, h, w]`."""
        return self.maps[list(indices)]


@dataclass
class Case:
    """What both sides train on.

    Attributes:
        call: The method.
        images: Plain and mirrored.
        features: Likewise.
        classes: K.
        recipe: Of the protocol, with as many epochs as the steps take.
    """

    call: MethodCall
    images: dict[bool, SplitImages]
    features: dict[bool, Features]
    classes: int
    recipe: Any

    @classmethod
    def of(cls, name: str, classes: int, arguments: argparse.Namespace) -> Case:
        """Random images and features for a method."""
        side, channels = arguments.side, arguments.channels
        rules = find_protocol("raysup-seg")()
        rules.geometry = replace(rules.geometry, side=side)  # type: ignore[type-var]
        recipe = replace(rules.recipe, epochs=1)
        count = arguments.steps * recipe.batch_size
        data = Photos(count, side, classes)
        images = {m: SplitImages(data, "train", rules, stride=STRIDE, mirrored=m) for m in (False, True)}
        features = {m: Features(count, channels, side // STRIDE, int(m)) for m in (False, True)}
        method = load_method(name, weights="none", channels=channels)
        return cls(MethodCall(method, statistics="imagenet"), images, features, classes, recipe)

    def views(self, keep: bool) -> dict[bool, View]:
        """Our view of both variants; keep: whether operators are kept."""
        budget = KEEP if keep else -KEEP
        return {
            mirrored: View(
                self.images[mirrored],
                UpsampledSplit(self.call, self.images[mirrored], self.features[mirrored], budget=budget),
            )
            for mirrored in (False, True)
        }

    def ours(
        self, views: dict[bool, View], seeds: Sequence[int], schedules: Sequence[str] = ("cosine",)
    ) -> list[Probe]:
        """A training; the probes under the first schedule."""
        channels = int(self.features[False].maps.shape[1])
        data = TrainingSet(views[False], channels, _no_moments, lambda: views[True])
        recipes = [replace(self.recipe, schedule=schedule) for schedule in schedules]
        heads = [Head(find_task("seg")(), self.classes, recipe) for recipe in recipes]
        return train_probes(heads, data, list(seeds))[0]

    def dense(self) -> float:
        """The same training, as the papers' code has it; its loss over the last tenth of the steps."""
        recipe, count = self.recipe, len(self.images[False])
        channels = int(self.features[False].maps.shape[1])
        head = nn.Conv2d(channels, self.classes, 1)
        bound, generator = channels**-0.5, torch.Generator().manual_seed(0)
        with torch.no_grad():  # as `Recipe.init` "conv" draws them
            for part in (head.weight, head.bias):
                part.copy_(bound * (2 * torch.rand(part.shape, generator=generator) - 1))
        optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        size = self.images[False].output_size
        losses = []
        batches = streams(count, size, recipe, [0], [torch.Generator().manual_seed(0)])
        steps = count // recipe.batch_size
        for number, (shown,) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * learning_rate_factor(number, steps, recipe)
            images = self.images[shown.flipped]
            picture = torch.stack([images.image(i) for i in shown.indices])
            label = images.truth(shown.indices).target("label")
            features = self.call.forward(
                picture, self.features[shown.flipped].batch(shown.indices), size(shown.indices[0])
            )
            loss = F.cross_entropy(head(features), label, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        tail = losses[-max(1, len(losses) // 10) :]
        return sum(tail) / len(tail)


def _no_moments() -> Any:
    raise UpbenchError("the papers' heads are not conditioned")


def measure(name: str, classes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender in every round."""
    case = Case.of(name, classes, arguments)
    count, kept, made = len(case.images[False]), case.views(True), case.views(False)
    many = range(arguments.seeds)
    found: dict[str, Any] = {}

    def dense() -> None:
        found["dense"] = case.dense()

    def ours() -> None:
        found["ours"] = case.ours(made, [0])[0].loss

    contenders: dict[str, Callable[[], object]] = {
        "dense": dense,
        "ours": ours,
        "ours, kept": lambda: case.ours(kept, [0]),
        "seeds": lambda: case.ours(made, many),
        "seeds, kept": lambda: case.ours(kept, many),
        "variants": lambda: case.ours(made, [0], SCHEDULES),
        "variants, kept": lambda: case.ours(kept, [0], SCHEDULES),
        **dict(evaluations(case, kept, made)),
    }
    seconds: dict[str, list[float]] = {key: [] for key in contenders}
    for turn in range(arguments.repeats + 1):  # the first one warms up
        for key, run in contenders.items():
            started = time.perf_counter()
            run()
            if turn:
                seconds[key].append(time.perf_counter() - started)
    return {
        "method": name,
        "classes": classes,
        "side": arguments.side,
        "channels": arguments.channels,
        "threads": torch.get_num_threads(),
        "images": count,
        "seeds": arguments.seeds,
        "seconds": seconds,
        "loss_difference": abs(found["dense"] - found["ours"]) / abs(found["dense"]),
    }


def evaluations(
    case: Case, kept: dict[bool, View], made: dict[bool, View]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Ours, with and without kept operators, and a product with its argmax for as many images."""
    channels, size = int(case.features[False].maps.shape[1]), case.images[False].output_size(0)
    rules, task = case.images[False].protocol, find_task("seg")()
    weight, bias = torch.randn(case.classes, channels), torch.randn(case.classes)
    probe = Probe(weight, bias, 0.0, 0)
    dense = torch.randn(channels, size[0] * size[1])

    def ours(views: dict[bool, View]) -> Callable[[], object]:
        def run() -> object:
            evaluator = task.evaluator(case.images[False].dataset, rules)
            return evaluate_probes(task, [probe], [evaluator], views[False], rules)

        return run

    def product() -> None:
        for _ in range(len(case.images[False])):
            torch.addmm(bias[:, None], weight, dense).argmax(0)

    yield "evaluation", ours(made)
    yield "evaluation, kept", ours(kept)
    yield "product and argmax", product


def lines(row: dict[str, Any]) -> Iterator[str]:
    """One case as Markdown."""
    seconds, images = row["seconds"], row["images"]

    def rate(key: str) -> str:
        return f"{images / statistics.median(seconds[key]):.2f}"

    def ratio(a: str, b: str) -> tuple[float, str]:
        each = [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        middle = statistics.median(each)
        return middle, f"{middle:.2f} ({min(each):.2f}-{max(each):.2f})"

    def verdict(met: bool) -> str:
        return "met" if met else "not met"

    yield ""
    yield (
        f"{row['method']}, {row['classes']} classes, {row['channels']} channels, {row['side']} pixels, "
        f"{row['threads']} threads; losses differ by {row['loss_difference']:.1e}"
    )
    yield "| | images a second | ratio | goal | |"
    yield "|---|--:|--:|--:|---|"
    yield f"| dense | {rate('dense')} | | | |"
    goal = GOALS.get(row["method"])
    for key in ("ours", "ours, kept"):
        middle, text = ratio("dense", key)
        judged = f"at least {goal:g} | {verdict(middle >= goal)}" if goal else "|"
        yield f"| {key} | {rate(key)} | {text} | {judged} |"
    for key, count in (("seeds", row["seeds"]), ("variants", len(SCHEDULES))):
        for suffix in ("", ", kept"):
            middle, text = ratio(key + suffix, "ours" + suffix)
            judged = f"under {SEED_GOAL} | {verdict(middle < SEED_GOAL)}"
            yield f"| {count} {key}{suffix}: time by one's | {rate(key + suffix)} | {text} | {judged} |"
    for key in ("evaluation", "evaluation, kept"):
        middle, text = ratio(key, "product and argmax")
        judged = f"at most {EVALUATION_GOAL:g} | {verdict(middle <= EVALUATION_GOAL)}"
        yield f"| {key}: time by product and argmax | {rate(key)} | {text} | {judged} |"


if __name__ == "__main__":
    raise SystemExit(main())
