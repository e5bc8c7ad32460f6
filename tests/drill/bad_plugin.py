"""Methods and tasks that misbehave in every way that a drill could think of. Loaded as a plugin file."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from upbench import Metric, Scores, Task, Upsampler
from upbench.contracts.operator import FunctionOperator, Operator


class Strange(BaseException):
    """No `Exception`, and not the user's Ctrl-C either."""


class Mute(Exception):
    """An error whose text cannot be had."""

    def __str__(self):
        raise RuntimeError("no text")


class Dressed(torch.Tensor):
    """A tensor that means more than its numbers."""


def _raise(error):
    raise error


def _deep(number):
    return _deep(number + 1) + 1


# What a method does: with its image and its features, and to what it would return.
INPUTS = {
    "changes_features": lambda image, features: features.mul_(0),
    "changes_a_view": lambda image, features: features[:, 0].zero_(),
    "changes_image": lambda image, features: image.zero_(),
    "changes_by_numpy": lambda image, features: features.detach().numpy().fill(0),
    "changes_data": lambda image, features: features.data.mul_(0),
    "exits": lambda image, features: sys.exit(0),
    "strange": lambda image, features: _raise(Strange("not an Exception")),
    "memory": lambda image, features: _raise(MemoryError),
    "recursion": lambda image, features: _deep(0),
    "mute": lambda image, features: _raise(Mute),
    "surrogate": lambda image, features: _raise(ValueError("half a character: \ud83d, \x1b[31mred")),
    "wordy": lambda image, features: _raise(ValueError("word " * 100_000)),
    "no_gradients": lambda image, features: torch.set_grad_enabled(False),
    "doubles": lambda image, features: torch.set_default_dtype(torch.float64),
}
OUTPUTS = {
    "complex": lambda out: out * 1j,
    "integer": lambda out: out.to(torch.int32),
    "boolean": lambda out: out > 0,
    "nan": lambda out: out * torch.nan,
    "infinite": lambda out: out + torch.inf,
    "small": lambda out: out[..., :-1],
    "one_pixel": lambda out: out[..., :1, :1],
    "no_batch": lambda out: out[0],
    "elsewhere": lambda out: out.to("meta"),
    "dressed": lambda out: out.as_subclass(Dressed),
    "nothing": lambda out: None,
    "numpy": lambda out: out.detach().numpy(),
    "sparse": lambda out: out.to_sparse(),
}


class Bad(Upsampler):
    """Its features are dense, and computed once an image."""

    name = "bad"

    def __init__(self, channels: int = 6, how: str = "") -> None:
        super().__init__(channels)
        self.how = how

    def forward(self, image, features, output_size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.how in INPUTS:
                INPUTS[self.how](image, features)
            out = F.interpolate(features, output_size, mode="bilinear")
            return OUTPUTS.get(self.how, lambda same: same)(out)


class BadLinear(Bad):
    """Its forward is its operator: it is called in the middle of a probe's training."""

    name = "bad_linear"
    linear = True


class BadOperator(Bad):
    """What its operator gives is bad."""

    name = "bad_operator"

    def operator(self, image, features, output_size, camera=None):
        if self.how == "text":
            return "an operator"
        return _Operator(self, image, output_size)


class _Operator(Operator):
    def __init__(self, method, image, output_size):
        self.method, self.image, self.output_size = method, image, output_size

    def __call__(self, values):
        out = F.interpolate(values.sum(1), self.output_size)
        return OUTPUTS.get(self.method.how, lambda same: same)(out)

    def crop(self, rows, cols):
        return FunctionOperator(lambda values: self(values[:, None]), self.output_size).crop(rows, cols)


class BadCamera(Upsampler):
    """Changes its camera."""

    name = "bad_camera"
    uses_camera = True

    def forward(self, image, features, output_size, camera=None):
        if camera is not None:
            camera.intrinsics.mul_(3)
        return F.interpolate(features, output_size)


class BadBackbone(Upsampler):
    """Changes the backbone, or what it gives."""

    name = "bad_backbone"
    uses_backbone = True

    def __init__(self, channels: int = 6, how: str = "") -> None:
        super().__init__(channels)
        self.how = how

    def forward(self, image, features, output_size, backbone=None):
        own = backbone(self.denormalize(image))
        if self.how == "output":
            own.mul_(0)
        else:
            backbone.scale.mul_(0)
        return F.interpolate(features, output_size) + own.mean()


class BadSkip(Bad):
    """Cannot even say whether it can run."""

    name = "bad_skip"

    @classmethod
    def skip_reason(cls, setting):
        raise LookupError("skip_reason itself")


class BadTask(Task):
    """Gives what is no score. `DRILL_HOW` says what."""

    name = "bad_task"
    title = "Bad"
    metrics = tuple(Metric(name, name.title(), higher_is_better=True) for name in ("score", "other"))
    primary = "score"
    datasets = ("toy",)

    def evaluate(self, context):
        how, scores = os.environ["DRILL_HOW"], Scores()
        splits = context.dataset.eval_splits
        if how == "nothing":
            return None
        if how == "no_splits":
            return scores
        if how == "no_values":
            return Scores({split: {"score": [], "other": []} for split in splits})
        if how == "by_hand":
            return Scores({split: {"score": [torch.tensor(1.0)], "other": [2]} for split in splits})
        if how == "too_many":
            return Scores({split: {"score": [1.0] * 9, "other": [1.0] * 9} for split in splits})
        value = {
            "none": None,
            "text": "0.5",
            "complex": torch.tensor(1 + 2j),
            "several": torch.zeros(2),
            "nan": float("nan"),
            "infinite": float("inf"),
            "half": float("nan"),
        }[how]
        for split in splits:
            found = {"score": 1.0, "other": value} if how == "half" else {"score": value, "other": 1.0}
            scores.add(split, found)
        return scores


class Vandal(Task):
    """Scribbles over all that its context hands out. Comes before other tasks of a run, by its name."""

    name = "a_vandal"
    title = "Vandal"
    metrics = (Metric("damage", "Damage", higher_is_better=True),)
    primary = "damage"
    datasets = ("toy",)

    def evaluate(self, context):
        scores = Scores()
        for split in context.dataset.splits:
            images, store, dense = context.samples(split), context.features(split), context.dense(split)
            for index in range(len(images)):
                for _ in range(2):  # what is read, and what was kept
                    framed, stored = images.framed(index), images.stored(index)
                    for part in (framed, stored, framed.camera, stored.camera):
                        for value in vars(part).values():
                            if isinstance(value, torch.Tensor):
                                value.zero_()
                store.batch([index]).zero_()
                store.features(index).numpy().fill(0)
                dense.batch([index]).dense().zero_()
                images.truth([index]).valid.zero_()
            moments = store.moments()
            moments.sum.zero_()
            moments.outer.zero_()
        for split in context.dataset.eval_splits:
            scores.add(split, {"damage": 1.0})
        return scores


class VandalOfResults(Task):
    """Changes what its cells share."""

    name = "vandal_of_results"
    title = "Vandal of results"
    metrics = (Metric("damage", "Damage", higher_is_better=True),)
    primary = "damage"
    datasets = ("toy",)

    def evaluate(self, context):
        scores, shared = Scores(), context.shared("zeros", lambda: {"list": [torch.zeros(3)]})["list"][0]
        for split in context.dataset.eval_splits:
            scores.add(split, {"damage": shared.sum()})
        shared.add_(1)
        return scores


class StopsProcess(Upsampler):
    """Its process is stopped when it is probed: each time, or the first time only."""

    name = "stops_process"

    def __init__(self, channels: int = 6, how: str = "always") -> None:
        super().__init__(channels)
        self.how = how

    def forward(self, image, features, output_size):
        return F.interpolate(features, output_size)

    def operator(self, image, features, output_size, camera=None):
        mark = Path(os.environ["DRILL_MARK"])
        if self.how == "always" or not mark.exists():
            if self.how == "once":
                mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return None
