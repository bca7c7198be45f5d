"""The one error for what a user can cause: a wrong input, a damaged file, a full disk; everything else is a bug of ours."""


class TiedMoeError(ValueError):
    """Say what was found, what was expected and what to do; the command line prints it as one paragraph."""
