"""Conversion of an untied MoE checkpoint into a tied one, and back: recipe -> plan -> execute.

Example:
    >>> recipe = ConversionRecipe(source="allenai/OLMoE-1B-7B-0924", output="olmoe-g2", calibration="text.txt")
    >>> plan = make_plan(recipe)  # reads headers only
    >>> print(plan)
    >>> report = execute(plan)

or, where `budget` or `max_loss` leave the groups open, all of it at once: `report = convert(recipe)`.
"""

from .convert import convert
from .errors import ConversionError
from .methods import METHODS
from .plan import Plan, make_plan
from .recipe import ConversionRecipe
from .run import execute
from .search import choose, preview
from .untie import untie
from .verify import verify_folder

__all__ = [
    "METHODS",
    "ConversionError",
    "ConversionRecipe",
    "Plan",
    "choose",
    "convert",
    "execute",
    "make_plan",
    "preview",
    "untie",
    "verify_folder",
]
