"""Soft routing: how many experts a token uses, under one budget. Imports nothing of training or conversion."""

from .budget import layer_budgets
from .lapsum import soft_top_k
from .options import SoftMoeOptions
from .softmoe import active_experts, fixed_top_k

__all__ = ["SoftMoeOptions", "active_experts", "fixed_top_k", "layer_budgets", "soft_top_k"]
