"""`convert`: recipe -> (choice of groups) -> plan -> execution, in one call."""

import contextlib
from collections.abc import Callable
from typing import Any

from transformers_tiedmoe.hub import check_upload, push_to_hub

from .calibration.inputs import open_calibration
from .checkpoint.reader import open_source
from .checkpoint.writer import Progress
from .folders import output_folder
from .layout.source_model import SourceModel, read_config
from .plan import make_plan
from .recipe import ConversionRecipe
from .run import execute
from .search import choose, preview


def convert(
    recipe: ConversionRecipe, progress: Progress | None = None, show: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """Convert by a recipe, whose groups may be left to its `budget` or `max_loss`.

    Args:
        recipe: what to do.
        progress: called as `progress(done, total, what)`.
        show: called with what has been decided before it is done: the curve of loss against bytes where groups were chosen,
            and the plan. Both can be printed by rich.

    Returns:
        `execute`'s report, under `choice` the curve where groups were chosen, and under `pushed_to` the Hub's commit.

    Raises:
        ConversionError: whatever is wrong with the recipe, the source or the text; nothing is left then.
    """
    show = show or (lambda what: None)
    if recipe.push_to_hub is not None:
        check_upload(recipe.push_to_hub)
    output_folder(recipe)
    with contextlib.ExitStack() as stack:
        calibration = None
        opened = open_source(recipe.source, recipe.revision, recipe.allow_pickle)
        source = SourceModel.map(opened, read_config(opened))
        choice = {}
        if recipe.budget is not None or recipe.max_loss is not None:
            preview(recipe, source)  # refuses what cannot be, before text is read
            calibration = stack.enter_context(open_calibration(recipe, source))
            assert calibration is not None, "a recipe with a budget names calibration text"
            chosen = choose(recipe, calibration, progress)
            recipe, choice = chosen.recipe, {"choice": chosen.summary()}
            show(chosen)
        plan = make_plan(recipe, source)
        show(plan)
        report = execute(plan, progress, calibration) | choice
    if recipe.push_to_hub is not None:
        message = f"{plan.config.family} with tied experts, from {plan.source.name}"
        report["pushed_to"] = push_to_hub(recipe.output, recipe.push_to_hub, message)
    return report
