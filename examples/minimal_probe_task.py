"""A task with a linear probe: which pixels are nearer than two metres?

Try it with `--plugin examples/minimal_probe_task.py --tasks near`.
"""

import torch
import torch.nn.functional as F

from upbench import Evaluator, Metric, ProbeTask


class Near(ProbeTask):
    name = "near"
    target = "depth"
    metrics = (Metric("accuracy", "Accuracy", higher_is_better=True, unit="%"),)
    primary = "accuracy"

    def outputs(self, dataset, protocol):
        return 1

    def loss(self, prediction, target, valid):
        near = (target < 2).float()
        losses = F.binary_cross_entropy_with_logits(prediction[:, 0], near, reduction="none")
        return (losses * valid).sum() / valid.sum().clamp(min=1)

    def evaluator(self, dataset, protocol):
        return Accuracy()


class Accuracy(Evaluator):
    def __init__(self):
        self.own = [torch.tensor([torch.nan])]

    def update(self, prediction, truth):
        right = (prediction[:, 0] > 0) == (truth.target("depth") < 2)
        own = 100 * (right & truth.valid).sum((1, 2)) / truth.valid.sum((1, 2))
        self.own.append(own)
        return own

    def compute(self):
        return {"accuracy": float(torch.cat([own.cpu() for own in self.own]).nanmean())}
