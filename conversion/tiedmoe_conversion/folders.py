"""Where a conversion writes: its output and its statistics, neither of them in, or around, what it reads."""

from pathlib import Path

from transformers_tiedmoe.workdir import check_apart, check_output, expand

from .recipe import ConversionRecipe


def output_folder(recipe: ConversionRecipe) -> Path:
    """Return the absolute path of the recipe's output, new or empty.

    Raises:
        TiedMoeError: it cannot be written; or it is, holds or lies in the source, the calibration text or the statistics, or
            the statistics do so with one of the others.
    """
    inputs = {"source": recipe.source, "calibration text": recipe.calibration}
    if recipe.statistics is None:
        return check_output(recipe.output, inputs)
    check_apart(recipe.statistics, inputs, "statistics")
    return check_output(recipe.output, {**inputs, "statistics": Path(expand(recipe.statistics))})


def statistics_folder(recipe: ConversionRecipe) -> Path:
    """Return where the recipe's statistics are: the folder that it names, or a hidden one beside OUTPUT."""
    if recipe.statistics is not None:
        return Path(expand(recipe.statistics))
    output = Path(expand(recipe.output)).absolute()
    return output.parent / f".{output.name}.statistics"
