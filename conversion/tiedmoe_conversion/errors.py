"""The one error that a user's input can cause here: what was found, what was expected, what to do."""

import difflib
from collections.abc import Iterable

from transformers_tiedmoe.errors import TiedMoeError


class ConversionError(TiedMoeError):
    """Raised for whatever a source, a recipe or a full disk can do wrong; the disk is then unchanged."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` where one of the `known` words is close to `word`, else the list of them."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {known[:20]}" + (f" and {len(known) - 20} more" if len(known) > 20 else "")
