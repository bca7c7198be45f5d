"""Command-line flags out of dataclass fields: the type and `metadata["help"]` of each field, listed nowhere else.

A list of texts with `metadata["repeats"]`, which names one of them in the help, is a flag that may be given again.
"""

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

SIMPLE_TYPES = (bool, int, float, str, Path)


@dataclass(frozen=True)
class FileOption:
    """A flag that names a file of fields."""

    name: str
    help: str
    metavar: str = "FILE"


def with_flags(
    run: Callable, config_class: type, arguments: tuple[str, ...] = (), file_option: FileOption | None = None
) -> Callable:
    """Return the function `run(given, as_json, file)` with a signature that typer turns into flags.

    Args:
        run: gets the fields that the user named as a dict, whether `--json` was there, and the named file or None.
        config_class: the dataclass; a field without a default becomes a required flag.
        arguments: fields that are given by position.
        file_option: a flag for a file that may give any field, so that none is required on the command line.
    """
    file_name = file_option.name if file_option else ""

    def callback(called: typer.Context, as_json: bool, **flags: Any) -> None:
        file = flags.pop(file_name, None)
        sources = {name: called.get_parameter_source(name) for name in flags}
        given = {
            name: _expanded(flags[name])
            for name, source in sources.items()
            if source is not None and source.name != "DEFAULT"
        }
        run(given, as_json, _expanded(file))

    hints = typing.get_type_hints(config_class)
    parameters = [_keyword("called", typer.Context)]
    for field in dataclasses.fields(config_class):
        parameters.append(_flag(field, hints[field.name], field.name in arguments, file_option is not None))
    if file_option is not None:
        option = typer.Option(f"--{file_option.name}", metavar=file_option.metavar, help=file_option.help)
        parameters.append(_keyword(file_option.name, Annotated[str | None, option], None))
    option = typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
    parameters.append(_keyword("as_json", Annotated[bool, option], False))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _keyword(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _flag(field: dataclasses.Field, hint: Any, is_argument: bool, is_optional: bool) -> inspect.Parameter:
    """Make one argument or flag: simple types as typer has them, lists, mappings and unions as YAML."""
    options: dict[str, Any] = {"help": field.metadata.get("help")}
    default = None if field.default is dataclasses.MISSING else field.default
    hint = _without_none(hint)
    is_repeated = hint == list[str] and (is_argument or "repeats" in field.metadata)
    if is_repeated:
        options["metavar"] = field.metadata.get("repeats", field.name.upper())
    elif hint not in SIMPLE_TYPES:
        is_list = hint is not Any and issubclass(typing.get_origin(hint), Sequence)
        options |= {"parser": _parse_list if is_list else _parse_yaml, "metavar": "LIST" if is_list else "YAML"}
        hint, default = str, None  # typer would parse the default, too
    flag = "--" + field.name.replace("_", "-")
    if is_argument:
        info = typer.Argument(**{"metavar": field.name.upper(), **options})
    else:
        info = typer.Option(f"{flag}/--no-{flag[2:]}" if hint is bool else flag, **options)
    has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    if has_default or is_optional:
        return _keyword(field.name, Annotated[hint | None, info], default)
    return _keyword(field.name, Annotated[hint, info])


def _without_none(hint: Any) -> Any:
    """Return `X` for `X | None`, and Any, which is read as YAML, for a larger union."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        left = [each for each in typing.get_args(hint) if each is not types.NoneType]
        return left[0] if len(left) == 1 else Any
    return hint


def _expanded(value: Any) -> Any:
    """Expand a leading `~` as the shell does in `--output ~/x`, and does not in `--output=~/x`."""
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        return [_expanded(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _parse_yaml(text: str) -> Any:
    # Here, as they import torch, which takes seconds.
    from transformers_tiedmoe.errors import TiedMoeError
    from transformers_tiedmoe.yaml_input import load_yaml

    try:
        return load_yaml(text, repr(text[:60]))
    except TiedMoeError as error:
        raise typer.BadParameter(str(error)) from error


def _parse_list(text: str) -> list:
    """Parse a list with or without brackets: `0,1,2`, `[0, 1, 2]` or `[[2, 3], [4, 5]]`."""
    value = _parse_yaml(f"[{text}]")
    return value[0] if len(value) == 1 and isinstance(value[0], list) else value
