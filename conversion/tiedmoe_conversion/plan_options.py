"""`PlanOptions`: what `tiedmoe plan` is given, a recipe and for how many GPUs to predict training.

Importing this file does not import torch, as `recipe.py`.
"""

import dataclasses
from dataclasses import dataclass

from . import recipe_types as kinds
from .recipe import ConversionRecipe
from .recipe_types import refusal


@dataclass(frozen=True)
class PlanOptions(ConversionRecipe):
    """A recipe that is planned and not run."""

    gpus: kinds.PositiveOrNone = dataclasses.field(
        default=None,
        metadata={"help": "Predict training on so many GPUs too: the memory of each, and what it sends in a step."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.gpus is not None and self.chooses_groups:
            raise refusal(
                f"gpus={self.gpus} is given beside budget or max_loss, which leave the groups open; give groups and "
                "pool_experts instead, such as `tiedmoe plan` prints them with the budget alone"
            )

    @property
    def recipe(self) -> ConversionRecipe:
        """The recipe alone."""
        return ConversionRecipe(
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(ConversionRecipe)}
        )
