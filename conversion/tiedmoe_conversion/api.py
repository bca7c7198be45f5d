"""The public names of `tiedmoe_conversion`, which imports them when one is first asked for."""

from .errors import ConversionError
from .methods import METHODS
from .plan import Plan, make_plan
from .recipe import ConversionRecipe
from .run import convert, execute
from .search import choose, preview
from .untying import untie
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
