"""A task that trains nothing: are upsampled features, averaged over each patch, the backbone's own?

Try it with `--plugin examples/minimal_task.py --tasks fidelity`.
"""

import torch.nn.functional as F

from upbench import Metric, Scores, Task


class Fidelity(Task):
    name = "fidelity"
    metrics = (Metric("cosine", "Cosine", higher_is_better=True),)
    primary = "cosine"

    def evaluate(self, context):
        scores = Scores()
        for split in context.dataset.eval_splits:
            features, dense, own = context.features(split), context.dense(split), []
            for i in range(len(dense)):
                low, high = features.batch([i]), dense.batch([i]).dense()
                averaged = F.adaptive_avg_pool2d(high, low.shape[-2:])
                own.append(F.cosine_similarity(averaged, low).mean())
            scores.add(split, {"cosine": sum(own) / len(own)}, context.samples(split).names, own)
        return scores
