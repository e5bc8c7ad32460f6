"""Evaluation of trained probes on a split: all seeds in one pass over the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol as Interface

import torch
from torch import Tensor

from upbench.contracts.geometry import resized
from upbench.contracts.operator import FunctionOperator
from upbench.contracts.protocol import Protocol, Scoring
from upbench.contracts.task import Evaluator, Truth
from upbench.dense.untouched import Untouched
from upbench.dense.view import Batch, UpsampledSplit
from upbench.errors import UpbenchError
from upbench.evaluate.probe import Probe, View
from upbench.features.images import SplitImages
from upbench.system.ahead import ahead
from upbench.system.progress import Bar

_STRIP_BYTES = 1 << 20
"""Outputs of a strip of rows on a CPU: what stays in its cache."""

_BATCH_BYTES = 1 << 29
"""Outputs of a batch of images elsewhere."""

_AHEAD = 4
"""Batches that are read while an earlier one is evaluated."""

_CHECK_EVERY = 32
"""Images between two looks at whether outputs are finite."""


class Scored(Interface):
    """What is asked of a task (`upbench.evaluate.task.ProbeTask`)."""

    def decode(self, prediction: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a probe on one split.

    Attributes:
        metrics: By name, in the metric's unit.
        per_image: The primary metric of each image alone; nan where it has no valid pixel.
        names: The images.
    """

    metrics: dict[str, float]
    per_image: list[float]
    names: list[str]


@torch.no_grad()
def evaluate_probes(
    task: Scored,
    probes: Sequence[Probe],
    evaluators: Sequence[Evaluator],
    view: View,
    protocol: Protocol,
    progress: Bar | None = None,
) -> list[Evaluation]:
    """Metrics of probes on a split.

    Args:
        task: Says what a prediction means.
        probes: Trained for the same method, backbone and task.
        evaluators: A fresh one for each probe.
        view: The method's view of the split.
        protocol: Says what predictions are compared with.
        progress: Told once for each image and probe.

    Raises:
        UpbenchError: Images without the task's ground truth, or outputs that are not finite.
    """
    images, dense, scoring = view.images, view.dense, protocol.scoring
    assert isinstance(images, SplitImages)
    assert isinstance(dense, UpsampledSplit)
    watch = _Watch(dense)
    values: list[list[Tensor]] = [[] for _ in probes]
    names: list[str] = []

    def read(indices: list[int]) -> tuple[list[int], object]:
        return indices, images.prefetch(indices)

    batches = _batches(dense, images, probes, scoring)
    for indices, _held in ahead(read, batches, int(images.reads), _AHEAD):
        batch = dense.batch(indices)
        tokens = None if view.tokens is None else view.tokens(indices)
        truth = _truth(images, indices, scoring, dense)
        names += truth.names
        for place, (probe, evaluator) in enumerate(zip(probes, evaluators, strict=True)):
            if scoring.at == "output":
                answer = _at_output(task, probe, batch, tokens, watch)
            else:
                answer, seen = _elsewhere(task, probe, batch, tokens, images, indices, protocol, watch)
                truth = replace(truth, valid=truth.valid & seen)
            given = Untouched("the task's evaluator", truth=truth.valid, label=truth.label, depth=truth.depth)
            values[place].append(evaluator.update(answer, truth))
            given.check()  # the other seeds are scored with it, too
            if progress:
                progress.advance(len(indices))
        watch.look(indices)
    watch.look((), always=True)
    per_image = [torch.cat([v.double().cpu() for v in of_probe]).tolist() for of_probe in values]
    return [
        Evaluation(evaluator.compute(), own, names)
        for evaluator, own in zip(evaluators, per_image, strict=True)
    ]


def _batches(
    dense: UpsampledSplit, images: SplitImages, probes: Sequence[Probe], scoring: Scoring
) -> Iterator[list[int]]:
    """Frames that are evaluated together: those of an image, or a few images of one size on a GPU."""
    if scoring.at != "output":
        yield from (images.windows(image) for image in range(images.count))
        return
    most = 1
    if dense.call.device.type != "cpu":
        height, width = dense.output_size(0)
        most = max(1, _BATCH_BYTES // (4 * height * width * len(probes[0].weight)))
    group: list[int] = []
    for index in range(len(dense)):
        if group and (len(group) == most or dense.output_size(index) != dense.output_size(group[0])):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _truth(images: SplitImages, indices: list[int], scoring: Scoring, dense: UpsampledSplit) -> Truth:
    if scoring.at == "output":
        return images.truth(indices, dense.call.device)
    if scoring.at == "frame":
        framed = [images.framed(i, images.frame(i).size) for i in indices]
        return Truth.stack(framed, dense.call.device)
    return Truth.stack([images.original(indices[0])], dense.call.device)


def _at_output(task: Scored, probe: Probe, batch: Batch, tokens: Tensor | None, watch: _Watch) -> Tensor:
    """Answers at the size of the output, on a CPU a strip of rows at a time."""
    height, width = batch.parts[0].size
    strips = batch.split.call.device.type == "cpu" and not any(
        isinstance(part.view, FunctionOperator) for part in batch.parts
    )
    rows = height
    if strips:  # whole rows of low-resolution cells, as operators work on tiles of these
        cell = max(1, round(height / int(batch.parts[0].features.shape[-2])))
        rows = cell * max(1, _STRIP_BYTES // (4 * cell * width * len(probe.weight)))
    answer: Tensor | None = None
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        part = batch if rows >= height else batch.crop((strip, slice(0, width)))
        logits = probe.outputs(part, tokens)
        watch.add(logits)
        made = task.decode(logits)
        if rows >= height:
            return made
        if answer is None:
            answer = made.new_empty(*made.shape[:-2], height, width)
        answer[..., strip, :] = made
    assert answer is not None
    return answer


def _elsewhere(
    task: Scored,
    probe: Probe,
    batch: Batch,
    tokens: Tensor | None,
    images: SplitImages,
    indices: list[int],
    protocol: Protocol,
    watch: _Watch,
) -> tuple[Tensor, Tensor]:
    """Answers at the size of the frame, or of the stored image, and which of their pixels were seen."""
    scoring, logits = protocol.scoring, probe.outputs(batch, tokens)
    watch.add(logits)
    frames = [images.frame(i) for i in indices]
    own = [logits[row, :, : part[0], : part[1]] for row, part in enumerate(batch.sizes)]
    nearest = scoring.enlarge == "labels"  # the argmax of what nearest enlarges is the argmax enlarged
    if scoring.at == "frame":
        enlarged = [resized(one, frame.size, nearest) for one, frame in zip(own, frames, strict=True)]
        answer = task.decode(torch.stack(enlarged))
        return answer, torch.ones_like(logits[:, :1, :1, :1], dtype=torch.bool)[:, 0]
    whole, seen = protocol.geometry.assemble(frames, own, nearest)
    return task.decode(whole[None]), seen[None]


class _Watch:
    """Whether outputs are finite, looked at now and then: each look waits for the device."""

    def __init__(self, dense: UpsampledSplit) -> None:
        self.dense = dense
        self.extremes: list[Tensor] = []
        self.indices: list[int] = []

    def add(self, logits: Tensor) -> None:
        self.extremes += torch.aminmax(logits)  # a sum of large numbers would be infinite, too

    def look(self, indices: Sequence[int], always: bool = False) -> None:
        """Raises UpbenchError where some output since the last look was not finite."""
        self.indices += indices
        if not self.extremes or (len(self.indices) < _CHECK_EVERY and not always):
            return
        if not bool(torch.stack(self.extremes).isfinite().all()):
            cause = self.dense.explain(self.indices)
            raise cause or UpbenchError("the probe's weights are not finite: its training diverged")
        self.extremes, self.indices = [], []
