"""Trains every variant of a run's YAML with one budget, each from random weights.

    python benchmarks/raysup_ablation.py --images DIR --steps N [more flags of `upbench train`]
    upbench run --config configs/raysup_ablation.yaml

A row whose `weights` are a .safetensors file is trained into that file with the row's options; of rows that
share a file, the first one's. Files that are there are left as they are and unfinished trainings go on, so
the same command goes on after an interruption. The table at the end shows what each file says of its
training; the exit code is 1 where they differ in their budget, the seed or the backbone.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Mapping
from pathlib import Path

from upbench.cli.dispatch import main as upbench
from upbench.cli.inventory.listing import as_text
from upbench.errors import UpbenchError
from upbench.results.cell import MethodSpec
from upbench.run.config import RunConfig
from upbench.system.checkpoint import read_metadata
from upbench.weights.load import load_method

SHARED = ("backbone", "recipe", "steps", "images_seen", "seed")
"""What all files must have in common."""


def main() -> int:
    """Trains what is missing, then prints what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/raysup_ablation.yaml"))
    parser.add_argument(
        "--only", default="*", metavar="NAME", help="files to train, wildcards such as 'window*'"
    )
    arguments, flags = parser.parse_known_args()
    try:
        variants = find_variants(RunConfig.load(arguments.config))
        for file, spec in variants.items():
            if fnmatch.fnmatchcase(file.stem, arguments.only) and not file.is_file():
                options = [word for k, v in spec.options.items() for word in ("--options", f"{k}={v}")]
                code = upbench(["train", spec.name, "--out", str(file), "--resume", *options, *flags])
                if code:
                    return code
        return summary(variants)
    except UpbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def find_variants(config: RunConfig) -> dict[Path, MethodSpec]:
    """The checkpoints that rows name by their path, with the first row of each."""
    found: dict[Path, MethodSpec] = {}
    for spec in config.methods:
        if spec.weights.endswith(".safetensors"):
            found.setdefault(Path(spec.weights), spec)
    return found


def summary(variants: Mapping[Path, MethodSpec]) -> int:
    """Prints a row for each file that there is; 1 where their budgets differ."""
    rows, seen = [], set()
    for file, spec in variants.items():
        if not file.is_file():
            continue
        facts = read_metadata(file)
        method = load_method(spec.name, file)
        seen.add(tuple(facts.get(name, "") for name in SHARED))
        rows.append(
            {
                "file": file.stem,
                "options": ", ".join(f"{k}={v}" for k, v in spec.options.items()) or "as released",
                "parameters": f"{sum(p.numel() for p in method.parameters()):,}",
                **{name: facts.get(name, "") for name in (*SHARED, "loss")},
            }
        )
    print(as_text(rows))
    if len(seen) > 1:
        print(f"error: these files differ in {', '.join(SHARED)}: not one budget", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
