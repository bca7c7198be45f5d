"""The methods that make a pool from a group's experts. A new one is a new file here and a line below."""

from . import average, select, union
from .registry import METHODS, Group, LayerExperts, Method, Pool, RoutedInputs, register_method

__all__ = [
    "METHODS",
    "Group",
    "LayerExperts",
    "Method",
    "Pool",
    "RoutedInputs",
    "average",
    "register_method",
    "select",
    "union",
]
