"""The one error that a user's input can cause here: what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable

from transformers_tiedmoe.errors import TiedMoeError


class ConversionError(TiedMoeError):
    """Raised for what is wrong with a source, a recipe or a disk; no output is left then."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Suggest the one of the `known` words that is close to `word`, or list them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {known[:20]}" + (f" and {len(known) - 20} more" if len(known) > 20 else "")
