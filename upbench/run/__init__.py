"""A run: its configuration, its plan, and the loop over its cells.

The package can be called: `upbench.run(config)` is `upbench.run.loop.run(config)`, as it was when this was a
module's function, and as one wants to write it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Run(ModuleType):
    def __call__(self, config: Any, debug: bool = False) -> Any:
        """See `upbench.run.loop.run`."""
        from upbench.run.loop import run

        return run(config, debug)


sys.modules[__name__].__class__ = _Run
