"""Errors that a user can act on, and the words they are told in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UpbenchError(Exception):
    """Bad input: its text is one line that names the thing and, where there is one, the nearest right one.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` was most likely meant to be, or None."""
    choices = list(choices)
    folded = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if match:
        return folded[match[0]]
    starts = sorted(choice for choice in choices if choice.lower().startswith(name.lower()) and name)
    return starts[0] if starts else None


def unknown(kind: str, name: str, choices: Iterable[str], more: str = "") -> UpbenchError:
    """The error for a name that is not known: what it was meant to be, or what there is.

    Args:
        kind: What the name stands for, as in "method".
        name: The name as it was given.
        choices: The names that would have been right.
        more: A clause to append, such as how to list the right names.
    """
    choices = sorted(choices)
    guess = nearest(name, choices)
    hint = f"did you mean '{guess}'?" if guess else f"known: {', '.join(choices) or 'none'}"
    return UpbenchError(f"unknown {kind} '{name}'; {hint}{'; ' + more if more else ''}")
