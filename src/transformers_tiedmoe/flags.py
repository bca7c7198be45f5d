"""Command-line flags out of dataclass fields: the type and `metadata["help"]` of each field, listed nowhere else."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

SIMPLE_TYPES = (bool, int, float, str, Path)


def with_flags(run: Callable, config_class: type, arguments: tuple[str, ...], is_optional: bool = False) -> Callable:
    """The function `run(given, as_json, recipe)` with a signature that typer turns into flags.

    Args:
        run: gets the fields that the user named as a dict, whether `--json` was there, and the `--recipe` file or None.
        config_class: the dataclass. A flag that is not given is not in `given`: its default stays in one place.
        arguments: fields that are given by position.
        is_optional: `--recipe FILE` exists and may give any field, so that none is required on the command line.
    """

    def callback(as_json: bool, recipe: Path | None = None, **flags: Any) -> None:
        run({name: value for name, value in flags.items() if value is not None}, as_json, recipe)

    hints = typing.get_type_hints(config_class)
    parameters = [
        _parameter(field, hints[field.name], field.name in arguments, is_optional)
        for field in dataclasses.fields(config_class)
    ]
    # Click takes arguments in the order of the signature, Python wants keyword-only parameters in none.
    if is_optional:
        help = "YAML file with these fields; arguments and flags override it."
        option = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help=help)]
        parameters.append(_keyword("recipe", option, None))
    help = "Print one JSON object on stdout, and nothing else there."
    parameters.append(_keyword("as_json", Annotated[bool, typer.Option("--json", help=help)], False))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameter(field: dataclasses.Field, hint: Any, is_argument: bool, is_optional: bool) -> inspect.Parameter:
    """One flag: `None` where it was not given, its real default only in the help text."""
    is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    options: dict[str, Any] = {"help": field.metadata.get("help")}
    if not is_required and field.default not in (None, dataclasses.MISSING):
        options["show_default"] = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    else:
        options["show_default"] = False
    hint = _without_none(hint)
    if hint not in SIMPLE_TYPES:
        is_list = typing.get_origin(hint) in (list, tuple, *_SEQUENCES)
        options |= {"parser": _parse_list if is_list else _parse_yaml, "metavar": "LIST" if is_list else "YAML"}
        hint = str  # the parser's business
    if is_argument:
        info = typer.Argument(**options, metavar=field.name.upper())
    else:
        flag = "--" + field.name.replace("_", "-")
        info = typer.Option(f"{flag}/--no-{flag[2:]}" if hint is bool else flag, **options)
    if is_required and not is_optional:
        return _keyword(field.name, Annotated[hint, info], inspect.Parameter.empty)
    return _keyword(field.name, Annotated[hint | None, info], None)


_SEQUENCES = (typing.get_origin(typing.Sequence[int]),)


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = [each for each in typing.get_args(hint) if each is not types.NoneType]
    return hint


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{text!r} is no YAML: {error}") from error


def _parse_list(text: str) -> list:
    """A list with its brackets or without: `0,1,2`, `[0, 1, 2]` and `[[2, 3], [4, 5]]`."""
    value = _parse_yaml(f"[{text}]")
    return value[0] if len(value) == 1 and isinstance(value[0], list) else value
