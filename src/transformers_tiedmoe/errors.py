"""The one error for what a user can cause: a wrong input, a damaged file, a full disk.

Any other exception is a bug of ours.
"""

import contextlib
from collections.abc import Iterator


class TiedMoeError(ValueError):
    """Say what was found, what was expected and what to do; the command line prints it as one paragraph."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any exception that a library raises on a user's files into a `TiedMoeError`.

    There are too many kinds of them to name, and none is a bug of ours.

    Args:
        what: the files, as the user named them; goes into the message.
    """
    try:
        yield
    except (TiedMoeError, OSError, ImportError, MemoryError):
        raise  # they say enough
    except Exception as error:
        raise TiedMoeError(
            f"cannot read {what}: {type(error).__name__}: {error}; expected a complete checkpoint as transformers "
            "saves it"
        ) from error
