"""What a run would do, without doing it: `upbench run --dry-run`."""

from __future__ import annotations

from typing import Any

from upbench.results.records import FOLDER
from upbench.run.config import RunConfig
from upbench.run.jobs import PlannedCell
from upbench.run.loop import finished
from upbench.run.plan import make_plan
from upbench.run.worker import Worker
from upbench.values import user_path


def preview(config: RunConfig) -> tuple[list[dict[str, Any]], list[str]]:
    """The cells of a run as rows for a list, and notes on the features that they need.

    Args: config: What would be run.

    Raises:
        UpbenchError: What `run` would raise before it writes anything.
    """
    worker = Worker()
    plan = make_plan(config, worker.backbone)
    said: list[str] = []
    done = finished(user_path(config.out) / FOLDER, plan, said.append, rename=False)
    rows = [_row(planned, planned.cell.key in done) for planned in plan]
    notes = list(_features(worker, [p for p in plan if not p.skip and p.cell.key not in done]))
    return rows, [*said, *notes]


def _row(planned: PlannedCell, is_done: bool) -> dict[str, Any]:
    cell = planned.cell
    status = "skip" if planned.skip else "finished" if is_done else "run"
    images = ", ".join(f"{split} {facts['images']}" for split, facts in planned.data.items())
    return {
        "status": status,
        "row": planned.row,
        "task": cell.task,
        "backbone": cell.backbone,
        "dataset": cell.dataset,
        "protocol": planned.protocol.label,
        "images": images,
        "weights": planned.weights.name if planned.weights.path else "",
        "reason": planned.skip,
    }


def _features(worker: Worker, pending: list[PlannedCell]) -> list[str]:
    """Which features are there, and which are to be computed."""
    notes: dict[tuple[object, ...], str] = {}
    for planned in pending:
        for split in planned.splits:
            key = (*planned.shares, split)
            if key in notes or planned.task.content != "images":
                continue
            data = worker.data(planned)
            choice = data.choice(split)
            stores = [data.features(split, mirrored) for mirrored in ((False, True) if choice else (False,))]
            have, all_of_them = sum(s.on_disk() for s in stores), sum(map(len, stores))
            state = "there" if have >= all_of_them else f"{have} of {all_of_them} images there"
            if choice and have < all_of_them:
                state = f"{choice.why}; {state}" if choice.stored else choice.why
            elif choice:
                state = "there, plain and mirrored"
            notes[key] = f"features of {planned.cell.dataset}/{split} by {planned.cell.backbone}: {state}"
    return list(notes.values())
