"""The methods that make a pool from a group's experts. A new one is a new file here and a line below."""

from . import align, average, least_squares, prefit, prototype, select, union
from .base import METHODS, Group, LayerExperts, Method, Pool, RoutedInputs, Sizes, register_method

__all__ = [
    "METHODS",
    "Group",
    "LayerExperts",
    "Method",
    "Pool",
    "RoutedInputs",
    "Sizes",
    "align",
    "average",
    "least_squares",
    "prefit",
    "prototype",
    "register_method",
    "select",
    "union",
]
