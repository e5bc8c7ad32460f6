"""Where a method's checkpoint comes from, and how it gets into the method."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "upbench.contracts.weights": "Weights weights_fingerprint",
        "upbench.weights.load": "load_method read_state trained_options images_seen options_unlike_training",
        "upbench.weights.resolve": "ResolvedWeights ListedWeights list_weights weights_reason CHECKPOINTS",
    },
)
