"""Conversion of an untied MoE checkpoint into a tied one, and back: recipe -> plan -> execute.

Example:
    >>> recipe = ConversionRecipe(source="allenai/OLMoE-1B-7B-0924", output="olmoe-g2", group_size=2)
    >>> plan = make_plan(recipe)  # reads headers only
    >>> print(plan)
    >>> report = execute(plan)
"""

from .errors import ConversionError
from .execute import execute
from .methods import METHODS
from .plan import Plan, make_plan
from .recipe import ConversionRecipe
from .untie import untie

__all__ = ["METHODS", "ConversionError", "ConversionRecipe", "Plan", "execute", "make_plan", "untie"]
