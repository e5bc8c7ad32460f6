"""The one place that assembles a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from upbench.contracts.task import Scores, Task, number
from upbench.errors import UpbenchError, printable
from upbench.results.records import Record
from upbench.run.jobs import PlannedCell
from upbench.system import environment
from upbench.weights.load import options_unlike_training

LONGEST_REASON = 400
"""Characters; the traceback has the rest."""


def assemble(
    planned: PlannedCell,
    status: str,
    *,
    scores: Scores | None = None,
    reason: str = "",
    traceback: str = "",
    seconds: float = 0.0,
) -> Record:
    """The record of a cell.

    Args:
        planned: The cell, looked at.
        status: "ok", "skipped" or "failed".
        scores: What was found; for "ok".
        reason: Why there is nothing, in one line.
        traceback: Of the error. Both without the user's home folder.
        seconds: Wall time of the cell, which ends now.
    """
    scores = scores or Scores()
    started = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    return Record(
        planned.cell,
        status,
        reason=environment.without_home(reason),
        traceback=_escaped(environment.without_home(traceback)),
        metrics=scores.metrics,
        per_image=scores.per_image,
        row=planned.row,
        about=about(planned),
        columns=columns(planned.task),
        inputs=planned.inputs,
        data=planned.data,
        protocol=protocol_of(planned),
        environment=environment.describe(planned.place),
        warnings=[environment.without_home(text) for text in (*warnings_of(planned), *scores.notes)],
        started=started.isoformat(timespec="milliseconds"),
        seconds=round(seconds, 3),
    )


def describe_error(error: BaseException) -> str:
    """An error in one line that can be printed; its type where it was not foreseen."""
    try:
        text = printable(error)
    except Exception as worse:  # an error that cannot be told is a plugin's own
        text = f"(its text cannot be had: {type(worse).__name__})"
    if not isinstance(error, UpbenchError):
        name = type(error).__name__
        text = f"{name}: {text}" if text else name
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"


def _escaped(text: str) -> str:
    """Lines as a file in UTF-8 can hold them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def checked(planned: PlannedCell, scores: Scores) -> Scores:
    """What a task has found, in plain numbers.

    Raises:
        UpbenchError: It is not what the task declares: for every split that is scored and every metric a
            number for each seed, or one in all.
    """
    who = f"task '{planned.task.name}'"
    if not isinstance(scores, Scores):
        raise UpbenchError(f"{who} returns a {type(scores).__name__} where Scores were asked for")
    if lack := lacks(planned, scores.metrics):
        raise UpbenchError(f"{who} {lack}")
    metrics = {}
    for split, of_split in scores.metrics.items():
        metrics[split] = {
            name: [number(value, f"{who}, metric '{name}' on split '{split}'") for value in values]
            for name, values in of_split.items()
        }
        for name, values in metrics[split].items():
            wrong = [v for v in values if math.isinf(v) or (math.isnan(v) and name == planned.task.primary)]
            if wrong:
                raise UpbenchError(f"{who}: metric '{name}' on split '{split}' is {wrong[0]}")
    per_image = {}
    for split, held in scores.per_image.items():
        names = [str(name) for name in held["names"]]
        rows = [[number(v, f"{who}, images of split '{split}'") for v in seed] for seed in held["values"]]
        if any(len(row) != len(names) for row in rows):
            raise UpbenchError(f"{who}: values and names of the images of split '{split}' do not agree")
        per_image[split] = {"names": names, "values": rows}
    return Scores(metrics, per_image, [printable(note) for note in scores.notes])


def lacks(planned: PlannedCell, metrics: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """What a cell's metrics lack, as a clause; "" where they are all there."""
    declared = {metric.name for metric in planned.task.metrics}
    splits = planned.dataset.eval_splits
    missing = [split for split in splits if not metrics.get(split)]
    if missing or not splits:
        return f"gives no scores for split '{missing[0]}'" if missing else "has no split to score"
    for split, of_split in metrics.items():
        if set(of_split) != declared:
            odd = sorted(set(map(str, of_split)) ^ declared)
            return f"and its scores on '{split}' disagree about {', '.join(odd)}"
        counts = {len(values) for values in of_split.values()}
        if len(counts) != 1 or not counts <= {1, len(planned.cell.seeds)}:
            found = ", ".join(map(str, sorted(counts)))
            return f"gives {found} values for a metric on split '{split}', not one for each seed"
    return ""


def about(planned: PlannedCell) -> dict[str, Any]:
    """What a table says about a method beside its numbers."""
    cls = planned.method
    return {
        "title": cls.title or cls.name,
        "paper": cls.paper,
        "year": cls.year,
        "license": cls.license,
        "native_ratio": cls.native_ratio,
    }


def protocol_of(planned: PlannedCell) -> dict[str, Any]:
    """What a record says about the protocol."""
    protocol, task, setting = planned.protocol, planned.task, planned.setting
    recipe = protocol.recipe_for(task.settings().get("probe"), planned.cell.probe, planned.dataset.name)
    fixed = protocol.geometry.size(setting.stride) is not None
    return {
        **protocol.to_dict(),
        "source": protocol.source,
        "departures": list(protocol.departures),
        "image_size": list(setting.image_size) if fixed else None,
        "output_size": list(setting.output_size) if fixed else None,
        "recipe": recipe.to_dict() if "probe" in task.settings() else {},
    }


def columns(task: Task) -> list[Mapping[str, Any]]:
    """A task's metrics as records hold them, the primary one first."""
    ordered = sorted(task.metrics, key=lambda metric: metric.name != task.primary)
    main = {task.primary, *(task.headline or [metric.name for metric in ordered[:2]])}
    return [{**vars(metric), "main": metric.name in main} for metric in ordered]


def warnings_of(planned: PlannedCell) -> list[str]:
    """What a reader of a cell's numbers must know."""
    cell, found = planned.cell, []
    if cell.limit is not None:
        found.append(f"only the first {cell.limit} images of every split (--limit): not for reporting")
    if cell.probe:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(cell.probe.items()))
        found.append(f"probe settings differ from the protocol: {settings}")
    if cell.method.weights == "none":
        found.append("random weights")
    elif cell.method.options:
        unlike = options_unlike_training(planned.method, planned.weights, cell.method.options)
        if unlike:
            texts = [f"{name}={asked} (trained with {trained})" for name, (asked, trained) in unlike.items()]
            found.append(f"not retrained for {', '.join(texts)}")
    if smaller := budget_of(planned):
        settings = ", ".join(f"{key}={value}" for key, value in sorted(smaller.items()))
        found.append(f"options of the preset '{cell.protocol}', not the method's own: {settings}")
    return found


def budget_of(planned: PlannedCell) -> dict[str, Any]:
    """The options of a cell's method that are as the protocol has them (`Upsampler.preset_options`)."""
    options = planned.method.preset_options.get(planned.cell.protocol, {})
    return {key: value for key, value in options.items() if planned.cell.method.options.get(key) == value}


def row_of(planned: PlannedCell) -> str:
    """What tables call the row: the user's own label as it is, else the method's title and what differs from
    its defaults."""
    spec, cls = planned.cell.method, planned.method
    if spec.label:
        return spec.label
    title = cls.title or cls.name
    budget = budget_of(planned)
    own = {key: value for key, value in spec.options.items() if key not in budget}
    if budget and not own and spec.weights == "default" and not spec.camera:
        return f"{title}, {planned.cell.protocol} budget"
    return spec.named(title)
