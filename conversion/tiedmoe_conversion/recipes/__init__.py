"""Recipes that ship with the package, each a YAML file here: `tiedmoe convert --recipe NAME`.

A file's first comment says what the recipe does, `# Parameters:` what comes out. Nothing here imports torch.
"""

from pathlib import Path

import yaml

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of all shipped recipes, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> str:
    """Return the text of the shipped recipe `name`.

    Raises:
        ConversionError: there is none of that name.
    """
    if name not in recipe_names():
        from ..errors import ConversionError, did_you_mean  # here, as it imports torch, which takes seconds

        raise ConversionError(f"no recipe {name!r} ships with tiedmoe; {did_you_mean(name, recipe_names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def shipped_recipes() -> list[dict[str, str]]:
    """Describe every shipped recipe.

    Returns:
        Per recipe its `name`, `method` (with what refines it), `parameters` before and after, and a `summary`.
    """
    return [_described(name) for name in recipe_names()]


def _described(name: str) -> dict[str, str]:
    text = read_recipe(name)
    fields = yaml.safe_load(text)  # our own file
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    parameters = [line for line in comments if line.startswith("Parameters: ")]
    return {
        "name": name,
        "method": ", then ".join([fields["method"], *fields.get("then", [])]),
        "parameters": parameters[0].removeprefix("Parameters: "),
        "summary": " ".join(line for line in comments if line not in parameters),
    }
