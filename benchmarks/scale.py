"""Time and memory of `upbench run` by the number of training images; the size of ADE20K is 20,000.

    python benchmarks/scale.py --images 250,1000,4000 --methods bilinear,raysup --work DIR --out FILE.json
    python benchmarks/scale.py --python OTHER/.venv/bin/python --images 250,1000     # another checkout

Photos of 320x240 pixels with label maps are drawn once into the work folder (shapes and noise, the same ones
each time; an interrupted call goes on). For each number of images and each method the real command runs in a
process of its own: segmentation, one seed, one epoch, a small split to evaluate on. The first method finds no
features. Then it runs once more, with two seeds, until its first training step: everything but the training
is there. A method is NAME or NAME:WEIGHTS, as in `upbench run`.

Columns: seconds of each stage (start: until the first progress bar, and what lies between two stages; check:
the dataset reads its files for the first time; features; upsampling: operators that are kept, before the
training; training; evaluation). `anonymous` is the largest resident memory of the process and its children
that is not a file's, `mapped` the largest part that is (libraries, and operators that were moved to files:
the system takes those pages back when it needs them), `peak` what the kernel says of the whole process
(`ru_maxrss`). `second run` is the time from its start to its first training step, and `read` what it had read
from files by then.

Stages are told apart by the progress bars, which a launcher in the measured process notes with their times;
memory is looked at from outside, ten times a second. The verdict at the end compares the two largest sizes.
docs/performance.md shows what this printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

# The launcher runs in the measured process, whichever edition that is: nothing of upbench is imported here.

CLASSES = ("background", "box", "disc", "wedge", "ring", "bar", "patch", "dot")
WIDTH, HEIGHT = 320, 240
STAGES = ("start", "check", "features", "cost", "upsampling", "training", "evaluation")
SECONDS_BETWEEN_LOOKS = 0.1
FLAT, LINEAR = 1.1, 1.15
"""The verdict's own limits: growth of memory between the two largest sizes, and the exponent of time."""


def main() -> int:
    """Measures each size and method, prints the table and the verdict, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--images", default="250,1000,4000", help="sizes of the training split")
    add("--validation", type=int, default=40, metavar="N", help="images to evaluate on")
    add("--methods", default="bilinear", help="one run each, in this order")
    add("--backbone", default="efficientnet_lite0", help="'dinov2_vits14_focus' for features of usual size")
    add("--preset", default="quick", help="name of the protocol")
    add("--work", type=Path, default=Path("runs/scale"), metavar="DIR", help="photos, features, records")
    add("--keep", action="store_true", help="leave features and records where they are")
    add("--python", default=sys.executable, metavar="FILE", help="interpreter with the upbench to measure")
    add("--out", type=Path, metavar="FILE", help="JSON file; written after every row")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    sizes = sorted(int(size) for size in arguments.images.split(","))
    draw(work / "photos", "train", sizes[-1])
    draw(work / "photos", "val", arguments.validation)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        data = linked(work, size, arguments.validation)
        try:
            for method in arguments.methods.split(","):
                row = measure(arguments, data, size, method)
                print(f"{size} images, {method}: {said(row)}", file=sys.stderr, flush=True)
                rows.append(row)
                if arguments.out:
                    write(arguments, rows)
        finally:
            if not arguments.keep:
                shutil.rmtree(data, ignore_errors=True)
    print("\n".join([*table(rows), "", *verdict(rows)]))
    return 1 if any("error" in row for row in rows) else 0


def measure(arguments: argparse.Namespace, data: Path, size: int, method: str) -> dict[str, Any]:
    """A row: the first run, and the start of the second."""
    command = [
        *("run", "--datasets", f"folder:{data / 'data'}", "--methods", method, "--tasks", "seg"),
        *("--backbones", arguments.backbone, "--preset", arguments.preset, "--device", "cpu"),
        *("--probe", "epochs=1", "--out", str(data / "records" / method.replace(os.sep, "_"))),
    ]
    row: dict[str, Any] = {"images": size, "method": method, "backbone": arguments.backbone}
    cache = data / "cache"
    first = watch(arguments.python, [*command, "--seeds", "1"], data / "first", cache, size)
    row |= {"seconds": first.seconds, "stages": first.stages(), "memory": first.memory()}
    row |= {"peak": first.peak, "features_bytes": folder_bytes(cache / "features")}
    if first.code:
        return row | {"error": first.log[-400:]}
    second = watch(
        arguments.python, [*command, "--seeds", "2"], data / "second", cache, size, until_first_step=True
    )
    step = second.first_step()
    if step is None:
        return row | {"error": second.log[-400:]}
    row["second"] = {"seconds": step["time"] - second.started, "read_bytes": step["read"]}
    row["second"] |= {"stages": second.stages(), "memory": second.memory()}
    return row


@dataclass
class Watched:
    """A run that was watched from outside.

    Attributes:
        started: When, in seconds of `time.time`.
        seconds: How long it took.
        code: Its exit code; 0 where it was stopped at its first step.
        log: What it wrote.
        marks: What the launcher noted, in order.
        samples: (time, anonymous bytes, bytes of files) of the processes together.
        peak: `ru_maxrss` in bytes.
    """

    started: float
    seconds: float = 0.0
    code: int = 0
    log: str = ""
    marks: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    peak: int = 0

    def first_step(self) -> dict[str, Any] | None:
        """The mark of the first training step."""
        return next((m for m in self.marks if m["event"] == "first" and m["stage"] == "training"), None)

    def spans(self) -> Iterator[tuple[str, float, float]]:
        """(stage, from, to), in order and without a gap: what no bar covers is "start"."""
        before, stage = self.started, "start"
        for mark in self.marks:
            if mark["event"] == "first":
                continue
            yield stage, before, mark["time"]
            before = mark["time"]
            stage = {"open": mark["stage"], "trained": "evaluation"}.get(mark["event"], "start")
        yield stage, before, self.started + self.seconds

    def stages(self) -> dict[str, float]:
        """Seconds of each stage."""
        found = dict.fromkeys(STAGES, 0.0)
        for stage, start, end in self.spans():
            found[stage] += end - start
        return found

    def memory(self) -> dict[str, dict[str, int]]:
        """Peaks of anonymous memory and of mapped files, in bytes: of each stage, and of "all"."""
        found: dict[str, dict[str, int]] = {"all": {"anonymous": 0, "mapped": 0}}
        spans = list(self.spans())
        place = 0
        for moment, anonymous, mapped in self.samples:
            while place + 1 < len(spans) and moment >= spans[place][2]:
                place += 1
            for name in (spans[place][0], "all"):
                held = found.setdefault(name, {"anonymous": 0, "mapped": 0})
                held["anonymous"] = max(held["anonymous"], anonymous)
                held["mapped"] = max(held["mapped"], mapped)
        return found


def watch(
    python: str, command: Sequence[str], folder: Path, cache: Path, size: int, until_first_step: bool = False
) -> Watched:
    """Runs a command of upbench under the launcher.

    Args:
        python: The interpreter.
        command: After `upbench`.
        folder: For the log and the marks; made anew.
        cache: `UPBENCH_CACHE` of the run.
        size: How many images there are: tells the launcher when the training has ended.
        until_first_step: Whether to end it there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marks = folder / "marks.jsonl"
    environment = {**os.environ, "UPBENCH_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    words = [python, str(Path(__file__).resolve()), "--launch", str(marks), str(size), *command]
    with (folder / "log.txt").open("w") as log:
        watched = Watched(time.time())
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
        stopped = False
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                watched.samples.append((time.time(), *resident(process.pid)))
                if until_first_step and not stopped and _seen(marks, '"training"', '"first"'):
                    os.killpg(process.pid, signal.SIGKILL)
                    stopped = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    watched.seconds = time.time() - watched.started
    watched.code = 0 if stopped else process.returncode
    watched.log = (folder / "log.txt").read_text(errors="replace")
    watched.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if marks.is_file():
        lines = marks.read_text().splitlines(keepends=True)
        watched.marks = [json.loads(line) for line in lines if line.endswith("\n")]
    return watched


def _seen(marks: Path, *words: str) -> bool:
    return marks.is_file() and any(
        all(word in line for word in words) for line in marks.read_text().splitlines()
    )


def resident(pid: int) -> tuple[int, int]:
    """Anonymous bytes and bytes of mapped files of a process and its children; zeros where /proc is not."""
    anonymous = mapped = 0
    waiting = [pid]
    while waiting:
        place = Path("/proc") / str(waiting.pop())
        try:
            status = (place / "status").read_text()
            children = (place / "task" / place.name / "children").read_text()
        except OSError:
            continue
        waiting += map(int, children.split())
        values = dict(line.split(":", 1) for line in status.splitlines() if line.startswith("Rss"))
        numbers = {name: int(value.split()[0]) * 1024 for name, value in values.items()}
        anonymous += numbers.get("RssAnon", 0) + numbers.get("RssShmem", 0)
        mapped += numbers.get("RssFile", 0)
    return anonymous, mapped


# The measured process


def launch(marks: Path, size: int, command: Sequence[str]) -> None:
    """`upbench COMMAND` in this process; the progress bars leave marks in a file.

    Args:
        marks: The file, a JSON object a line: `event` ("open", "first" step, "trained", "close"), `stage`,
            `time`, and `read`, the bytes that this process has read.
        size: Images of the training split.
        command: The words after `upbench`.
    """
    try:
        progress = import_module("upbench.system.progress")
    except ImportError:  # the first edition
        progress = import_module("upbench.progress")
    original: Callable[..., Any] = progress._open  # type: ignore[attr-defined]

    def opened(description: str, total: int | None, done: int) -> Any:
        bar = original(description, total, done)
        stage = stage_of(description)
        if stage is not None:
            _mark_steps(bar, stage, math.ceil(size / 8), lambda event: _write(marks, event, stage))
        return bar

    progress._open = opened  # type: ignore[attr-defined]
    sys.argv = ["upbench", *command]
    sys.path.pop(0)  # this script's folder
    runpy.run_module("upbench", run_name="__main__")


def stage_of(description: str) -> str | None:
    """The stage that a progress bar stands for; None for one that only counts others."""
    for start, stage in (("checking ", "check"), ("features of ", "features"), ("moments of ", "features")):
        if description.startswith(start):
            return stage
    if description == "cost":
        return "cost"
    if " · upsampling " in description:
        return "upsampling"
    return "training" if description.endswith(" · seg") else None


def _mark_steps(bar: Any, stage: str, steps: int, mark: Callable[[str], None]) -> None:
    """Lets a bar tell of its beginning, its first step, the end of the training, and its end."""
    advance, close = bar.advance, bar.close
    before = bar.done
    told: set[str] = set()

    def tell(event: str) -> None:
        if event not in told:
            told.add(event)
            mark(event)

    def advanced(count: int = 1) -> None:
        advance(count)
        tell("first")
        if stage == "training" and bar.done - before >= steps:
            tell("trained")

    def closed() -> None:
        close()
        tell("close")

    tell("open")
    bar.advance, bar.close = advanced, closed


def _write(marks: Path, event: str, stage: str) -> None:
    line = {"event": event, "stage": stage, "time": time.time(), "read": _bytes_read()}
    with marks.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _bytes_read() -> int:
    """What this process has read by calls to the system; 0 where that is not told."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.split("rchar:")[1].split()[0])


# Photos


def draw(folder: Path, split: str, count: int) -> None:
    """Draws the photos and label maps of a split that are not there yet."""
    images, labels = folder / split, folder / f"{split}annot"
    for place in (images, labels):
        place.mkdir(parents=True, exist_ok=True)
    there = {path.stem for path in images.glob("*.jpg")}
    for index in range(count):
        name = f"{index:06d}"
        if name not in there:
            picture, label = photo(index if split == "train" else 10**9 + index)
            _whole(labels / f"{name}.png", label)  # the photo last: it says that both are there
            _whole(images / f"{name}.jpg", picture)
            if index % 1000 == 999:
                print(f"{index + 1} of {count} photos drawn", file=sys.stderr, flush=True)


def photo(seed: int) -> tuple[Any, Any]:
    """A picture of some shapes before a slope of colours, with noise, and its label map; the same for a
    seed."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    rows, cols = np.mgrid[0:HEIGHT, 0:WIDTH]
    slope = random.uniform(-0.3, 0.3, (2, 3))
    base = random.uniform(40, 200, 3) + rows[..., None] * slope[0] + cols[..., None] * slope[1]
    picture = Image.fromarray(base.clip(0, 255).astype("uint8"))
    label = Image.new("L", (WIDTH, HEIGHT), 0)
    for _ in range(random.integers(4, 9)):
        kind = int(random.integers(1, len(CLASSES)))
        x, y = random.uniform(0, WIDTH), random.uniform(0, HEIGHT)
        w, h = random.uniform(20, 110, 2)
        colour = tuple(int(v) for v in (random.uniform(0, 255, 3) * 0.5 + kind * 16).clip(0, 255))
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        for target, fill in ((ImageDraw.Draw(picture), colour), (ImageDraw.Draw(label), kind)):
            if kind % 3 == 0:
                target.polygon([(box[0], box[3]), (x, box[1]), (box[2], box[3])], fill=fill)
            elif kind % 3 == 1:
                target.rectangle(box, fill=fill)
            else:
                target.ellipse(box, fill=fill)
    noisy = np.asarray(picture, dtype=np.float32) + random.normal(0, 8, (HEIGHT, WIDTH, 1))
    return Image.fromarray(noisy.clip(0, 255).astype("uint8")), label


def _whole(path: Path, picture: Any) -> None:
    """Saves a picture to a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    picture.save(temporary)
    temporary.replace(path)


def linked(work: Path, size: int, validation: int) -> Path:
    """A folder for the runs on so many images, with a dataset in `data` that holds links to the photos."""
    folder = work / f"{size}"
    data = folder / "data"
    for split, count in (("train", size), ("val", validation)):
        for name, suffix in ((split, "jpg"), (f"{split}annot", "png")):
            (data / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                target = data / name / f"{index:06d}.{suffix}"
                if not target.exists():
                    os.link(work / "photos" / name / target.name, target)
    (data / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# What is printed


def write(arguments: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """All rows so far, as JSON."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    about = "import json; {}; print(json.dumps(describe()))"
    found = None
    for module in ("upbench.system.environment", "upbench.environment"):
        code = about.format(f"from {module} import describe; import torch")
        done = subprocess.run(
            [arguments.python, "-c", code], capture_output=True, text=True, check=False, cwd=arguments.work
        )
        if done.returncode == 0:
            found = json.loads(done.stdout)
            break
    result = {"arguments": settings, "environment": found, "rows": list(rows)}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def said(row: dict[str, Any]) -> str:
    """A row in a few words."""
    if "error" in row:
        return f"failed: {' '.join(row['error'].split())[-200:]}"
    return f"{row['seconds']:.0f} s, {_gb(row['memory']['all']['anonymous'])} GB anonymous"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each size and method, in Markdown."""
    titles = ["images", "method", *STAGES, "all (s)", "anonymous (GB)", "mapped (GB)", "peak (GB)"]
    titles += ["features (GB)", "second run (s)", "read (GB)", "anonymous then (GB)"]
    lines = [f"| {' | '.join(titles)} |", f"|--:|---|{'--:|' * (len(titles) - 2)}"]
    for row in rows:
        memory, second = row["memory"]["all"], row.get("second")
        cells = [f"{row['images']}", row["method"], *(f"{row['stages'][stage]:.1f}" for stage in STAGES)]
        cells += [f"{row['seconds']:.1f}", _gb(memory["anonymous"]), _gb(memory["mapped"]), _gb(row["peak"])]
        cells.append(_gb(row["features_bytes"]))
        if second:
            then = second["memory"]["all"]["anonymous"]
            cells += [f"{second['seconds']:.1f}", _gb(second["read_bytes"]), _gb(then)]
        else:
            cells += ["failed", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each method, how memory and time grow between the two largest sizes."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and "error" not in row]
        if len(own) < 2:
            continue
        small, large = own[-2:]
        ratio = large["images"] / small["images"]
        before, after = (row["memory"]["all"]["anonymous"] for row in (small, large))
        growth = after / before if before else math.nan
        each = (after - before) / (large["images"] - small["images"])
        parts = [
            f"{method}, {small['images']} to {large['images']} images: anonymous memory x {growth:.2f} "
            f"({each / 1e3:+.0f} kB an image), {'flat' if growth <= FLAT else 'not flat'}"
        ]
        for stage in ("features", "training"):
            times = [row["stages"][stage] for row in (small, large)]
            if min(times) > 0:
                exponent = math.log(times[1] / times[0]) / math.log(ratio)
                kind = "linear" if exponent <= LINEAR else "more than linear"
                parts.append(f"{stage} ~ images^{exponent:.2f}, {kind}")
        lines.append("; ".join(parts))
    return lines


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--launch"]:
        launch(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
