"""Command line of the renderer: `python -m tools.interiors --help`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from upbench.datasets.interiors.files import SPLITS, SUFFIXES
from upbench.errors import UpbenchError, unknown

from .assets import find_llvm, locate

FIRST_SEEDS = {"train": 1000, "val": 2000, "val_heldout": 3000}
"""Seeds that the shipped splits begin with; no seed is in two splits."""

PACKAGES = {"mitsuba": "mitsuba", "mitsuba_oidn": "mitsuba-oidn", "skimage": "scikit-image"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.interiors",
        description="Renders scenes of the dataset 'interiors'. Scenes that are finished are kept.",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="which models may be shown (default: train)"
    )
    parser.add_argument("--seed", type=int, help="seed of the first scene (default: the split's own)")
    parser.add_argument("--count", type=int, default=1, help="number of scenes (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for <split>.jsonl and <split>/")
    parser.add_argument("--size", type=int, default=448, help="side of the image in pixels (default: 448)")
    parser.add_argument("--spp", type=int, default=16, help="samples a pixel (default: 16)")
    parser.add_argument("--threads", type=int, default=0, help="threads to render with (default: all)")
    parser.add_argument("--variant", default="llvm_ad_rgb", help="Mitsuba variant (default: llvm_ad_rgb)")
    parser.add_argument(
        "--assets",
        type=Path,
        help="folder of the assets (default: $UPBENCH_RENDER_ASSETS or ~/.cache/upbench/render)",
    )
    return parser.parse_args(argv)


def start_mitsuba(variant: str, threads: int) -> None:
    """Imports Mitsuba and selects its variant.

    Raises:
        UpbenchError: a package or LLVM is missing.
    """
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UpbenchError(f"rendering needs {', '.join(missing)}: pip install 'upbench[render]'")
    if variant.startswith("llvm"):
        find_llvm()
    import drjit
    import mitsuba

    variants = [name for name in mitsuba.variants() if name.endswith("_ad_rgb")]  # rays are traced in arrays
    if variant not in variants:
        raise unknown("variant", variant, variants)
    mitsuba.set_variant(variant)
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    if threads:
        drjit.set_thread_count(threads)


def finished(out: Path, split: str, size: int, spp: int) -> set[int]:
    """Seeds that have an index line of this size and quality, and all their files."""
    index = out / f"{split}.jsonl"
    if not index.is_file():
        return set()
    lines = [json.loads(line) for line in index.read_text().splitlines() if line.endswith("}")]
    last = {line["seed"]: line for line in lines}
    return {
        seed
        for seed, line in last.items()
        if (line["size"], line["spp"]) == (size, spp)
        and all((out / split / f"{seed}{suffix}").is_file() for suffix in SUFFIXES)
    }


def append_line(index: Path, line: dict[str, Any]) -> None:
    """Adds a line to an index; one that was cut off by a crash is removed first."""
    text = index.read_text() if index.is_file() else ""
    if text and not text.endswith("\n"):
        index.write_text(text[: text.rfind("\n") + 1])
    with index.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Renders what the options ask for; returns the exit code: 1 if a scene failed, 2 for bad input."""
    args = parse(argv)
    first = FIRST_SEEDS[args.split] if args.seed is None else args.seed
    try:
        if args.size < 16 or args.spp < 1 or args.count < 1 or first < 0:
            raise UpbenchError(
                "--size must be at least 16, --spp and --count at least 1, --seed not negative"
            )
        assets = locate(args.assets)
        start_mitsuba(args.variant, args.threads)
        from .scene import Studio, make_scene

        studio = Studio(assets)
        (args.out / args.split).mkdir(parents=True, exist_ok=True)
    except (UpbenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    failed = 0
    done = finished(args.out, args.split, args.size, args.spp)
    for number, seed in enumerate(range(first, first + args.count), start=1):
        where = f"[{number}/{args.count}] {args.split} {seed}"
        if seed in done:
            print(f"{where}: already there", flush=True)
            continue
        start = time.monotonic()
        try:
            line = make_scene(studio, args.split, seed, args.size, args.spp, args.out / args.split)
        except (RuntimeError, ValueError, UpbenchError) as error:
            failed += 1
            print(f"{where}: failed ({error})", file=sys.stderr, flush=True)
            continue
        append_line(args.out / f"{args.split}.jsonl", line)
        print(f"{where}: {line['kind']}, {time.monotonic() - start:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
