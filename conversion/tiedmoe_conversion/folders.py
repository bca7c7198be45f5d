"""Where a conversion writes: its output and its statistics, neither of which may be in, or around, what it reads."""

import contextlib
from pathlib import Path

from transformers_tiedmoe.errors import TiedMoeError
from transformers_tiedmoe.files import check_apart, expand
from transformers_tiedmoe.output_place import check_output, partial_folder
from transformers_tiedmoe.workdir import discard_folder

from .recipe import ConversionRecipe


def output_folder(recipe: ConversionRecipe) -> Path:
    """Return the absolute path of the recipe's output, new or empty.

    Raises:
        TiedMoeError: it cannot be written; or it is, holds or lies in the source, the calibration text or the
            statistics, or the statistics do so with one of the others.
    """
    inputs = {"source": recipe.source, "calibration text": recipe.calibration}
    if recipe.statistics is None:
        try:
            return check_output(recipe.output, inputs)
        except TiedMoeError:
            _remove_leftover(recipe)
            raise
    check_apart(recipe.statistics, inputs, "statistics")
    return check_output(recipe.output, {**inputs, "statistics": Path(expand(recipe.statistics))})


def _remove_leftover(recipe: ConversionRecipe) -> None:
    """Delete the hidden statistics of a run that was killed just before it removed them."""
    output = Path(expand(recipe.output)).absolute()
    if output.is_dir() and any(output.iterdir()) and not partial_folder(output).exists():
        with contextlib.suppress(TiedMoeError):  # in use
            discard_folder(hidden_statistics(output))


def statistics_folder(recipe: ConversionRecipe) -> Path:
    """Return where the recipe's statistics are: the folder that it names, or a hidden one beside OUTPUT."""
    return hidden_statistics(recipe.output) if recipe.statistics is None else Path(expand(recipe.statistics))


def hidden_statistics(output: str | Path) -> Path:
    """Return the folder beside `output` for statistics that are deleted with the conversion's end."""
    path = Path(expand(output)).absolute()
    return path.parent / f".{path.name}.statistics"
