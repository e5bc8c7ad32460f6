"""Checkpoint files: what they state, looked through first, and what they hold."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {"upbench.system.checkpoint.read": "check_tensors read_checkpoint read_metadata state_of"},
)
