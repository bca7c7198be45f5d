"""The methods that make a pool from a group's experts. A new one is a new file here and its name in NAMES."""

import importlib
from typing import Any

# In the order of the help. The modules are imported, and torch with them, when METHODS or another name of `base` is
# first asked for here: the command line needs the names alone to show its flags.
NAMES = ("align", "average", "least_squares", "prefit", "prototype", "select", "union")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    base = importlib.import_module(".base", __name__)
    for each in NAMES:
        importlib.import_module(f".{each}", __name__)
    return getattr(base, name)
