"""Conversion of an untied MoE checkpoint into a tied one, and back: recipe -> plan -> execute.

Example:
    >>> recipe = ConversionRecipe(source="allenai/OLMoE-1B-7B-0924", output="olmoe-g2", calibration="text.txt")
    >>> plan = make_plan(recipe)  # reads headers only
    >>> print(plan)
    >>> report = execute(plan)

or, where `budget` or `max_loss` leave the groups open, all of it at once: `report = convert(recipe)`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the command line reads `recipe.py` for its flags, and torch takes seconds to
    # import. Submodules are left to Python's own import.
    if not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        api = importlib.import_module(".api", __name__)
        globals().update({each: getattr(api, each) for each in api.__all__})
        if name in api.__all__:
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
