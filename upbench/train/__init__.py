"""Training of methods on photos, without labels."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "upbench.train.loop": "train upsampling_loss cosine_loss scaled_mse learning_rate",
        "upbench.train.config": "TrainConfig TrainPaths TrainResult ViewConfig",
    },
)
