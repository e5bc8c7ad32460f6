"""The card that lies beside trained weights: what they were trained on, how, and how far they got. Imports
no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upbench.errors import printable
from upbench.system.progress import duration

if TYPE_CHECKING:
    from upbench.train.config import TrainConfig, TrainResult

ROWS = 12


def model_card(
    config: TrainConfig,
    result: TrainResult,
    curve: Sequence[Mapping[str, float]],
    views: int,
    machine: Mapping[str, Any],
) -> str:
    """The card in Markdown. What only people know (licences, purpose, faults) is left as a line to fill in.

    Args:
        config: Settings of the run.
        result: What it came to.
        curve: Rows with `step`, `loss` and, where it was measured, `val_cosine`.
        views: Size of the pool of training views.
        machine: As `upbench.system.environment.describe` returns it.
    """
    facts = {
        "Method": config.method,
        **({"Options": _options(config)} if config.options else {}),
        "Backbone": ", ".join(config.backbone),
        "Photos": ", ".join(Path(folder).name for folder in config.images),
        "Licence of the photos": "(to be filled in)",
        "Licence of the weights": "(to be filled in)",
        "Recipe": f"{config.views.recipe}: {_recipe(config)}",
        "Steps": _steps(config, result, views),
        "Optimiser": f"AdamW, rate {config.lr:g} ({config.schedule}, {config.warmup} steps of warm-up), "
        f"weight decay {config.weight_decay:g}, gradient norm at most {config.clip:g}",
        "Seed": config.seed,
        "Last loss": f"{result.loss:.4f} (smoothed)",
        "Validation": _validation(config, result),
        "Time": f"{duration(result.seconds)}, {machine['threads']} threads",
        "Machine": machine["gpu"] or machine["cpu"],
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        "Command": f"`{config.command(published=True)}`",
        "sha256": f"`{result.sha256}`",
    }
    lines = [f"# {Path(config.out).stem}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_entry(value)} |" for name, value in facts.items()]
    return "\n".join([*lines, "", "## Curve", "", *_curve(curve), ""])


def _entry(value: object) -> str:
    """A value in a table: names of folders and options are the user's, and must not end the entry."""
    return printable(value).replace("|", "\\|").replace("<", "&lt;")


def _options(config: TrainConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.options.items())


def _steps(config: TrainConfig, result: TrainResult, views: int) -> str:
    text = f"{result.steps} with batch {config.batch}: {result.images_seen} images of {views} views"
    if config.init == "none":
        return text
    before = f"{result.images_before} images" if result.images_before else "a number not told"
    return f"{text}, after {before} of `{Path(config.init).name}`"


def _recipe(config: TrainConfig) -> str:
    views = config.views
    sides = ", ".join(str(size) for size in config.guidance_sizes or (views.guidance_size,))
    return (
        f"target at {views.view_size} pixels, low-resolution features at {views.ratio[0]:g} to "
        f"{views.ratio[1]:g} of that, guidance at {sides}"
    )


def _validation(config: TrainConfig, result: TrainResult) -> str:
    if result.val_cosine is None or result.val_bilinear is None:
        return "not measured"
    folders = ", ".join(Path(folder).name for folder in config.val_images)
    return (
        f"cosine similarity {result.val_cosine:.4f}, bilinear {result.val_bilinear:.4f} "
        f"({config.val_views} photos of {folders})"
    )


def _curve(curve: Sequence[Mapping[str, float]]) -> list[str]:
    """About a dozen rows, evenly spread; rows with a measurement come before others."""
    rows = [row for row in curve if "val_cosine" in row] or list(curve)
    step = max(1, -(-len(rows) // ROWS))
    chosen = rows[::-1][::step][::-1]  # the last row is always there
    lines = ["| step | loss | validation cosine |", "|--:|--:|--:|"]
    for row in chosen:
        cosine = f"{row['val_cosine']:.4f}" if "val_cosine" in row else ""
        lines.append(f"| {row['step']} | {row['loss']:.4f} | {cosine} |")
    return lines
