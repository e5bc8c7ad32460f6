"""The command line, one file a command."""

from upbench._lazy import lazily

__getattr__, __dir__ = lazily(__name__, {"upbench.cli.dispatch": "main"})
