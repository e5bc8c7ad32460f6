"""Words that are no command, option or name."""

from __future__ import annotations

from drill.case import Case, refused

CASES = [
    Case("commands", "misspelled", ("rnu",), refused("rnu", "did you mean 'run'")),
    Case("commands", "unknown-option", ("run", "--method", "all"), refused("--method", "--methods")),
    Case("commands", "extra-word", ("list", "methods", "extra"), refused("extra")),
    Case("commands", "no-records", ("report", "nowhere"), refused("nowhere")),
    Case("commands", "unknown-method", ("run", "--methods", "rayup"), refused("rayup", "raysup")),
    Case("commands", "unknown-task", ("run", "--tasks", "sge"), refused("sge", "seg")),
    Case("commands", "unknown-protocol", ("run", "--protocol", "quik"), refused("quik", "quick")),
]
