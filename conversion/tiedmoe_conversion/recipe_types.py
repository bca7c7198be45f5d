"""The types of a recipe's fields, as pydantic checks them, and how an error about one reads.

Importing this file does not import torch: the command line makes its flags from a recipe's fields.
"""

import math
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from .methods import NAMES

if TYPE_CHECKING:
    from .errors import ConversionError

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
STRICT = ConfigDict(strict=True)  # "2" is not 2, and True is not 1


def refusal(message: str) -> "ConversionError":
    """Return the error with this message."""
    from .errors import ConversionError  # here, as it imports torch, which takes seconds

    return ConversionError(message)


class Expected(str):
    """In an annotation: what an error says was expected."""


def _as_text(value: Any) -> Any:
    """Return a path or a hub id as text, with the home folder in place of `~`."""
    return os.path.expanduser(value) if isinstance(value, (str, Path)) else value


def _as_dict(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(each) for each in value) if isinstance(value, list) else value


def _in_one_group(groups: Any) -> Any:
    owner: dict[int, int] = {}
    for p, group in enumerate(groups or ()):
        for layer in group:
            if owner.setdefault(layer, p) != p or group.count(layer) > 1:
                raise ValueError(
                    f"layer {layer} is in group {owner[layer]} and in group {p}; a layer reads one pool: "
                    "remove it from one of them"
                )
    return groups


def _as_steps(then: Any) -> Any:
    """Return every further step as `{method: options}`, with the short forms written out."""
    steps = [then] if isinstance(then, (str, Mapping)) else then
    if not isinstance(steps, (list, tuple)):
        return then
    steps = [{each: {}} if isinstance(each, str) else each for each in steps]
    return tuple(
        {name: {} if options is None else options for name, options in each.items()}
        if isinstance(each, Mapping) and len(each) == 1
        else each
        for each in steps
    )


def _as_pool_size(size: Any) -> Any:
    """Return a number, or a multiple of the source's as text such as "1.5x"; anything else unchanged."""
    if isinstance(size, (list, tuple)) and size:
        return tuple(_as_pool_size(each) for each in size)
    text = size.strip().lower() if isinstance(size, str) else ""
    return int(text) if text.isdecimal() and len(text) < 10 else text or size


def _is_factor(text: str) -> str:
    factor = float(text.removesuffix("x")) if text.endswith("x") else 0.0
    if not 0 < factor < math.inf:
        raise ValueError
    return text


def _is_size(size: Any) -> Any:
    parse_size(size)
    return size


def parse_size(size: str | int) -> int:
    """Return the bytes from a number of bytes or from text such as "500MB" (powers of ten, as in transformers)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().upper()
    try:
        number = float(text[:-2]) * SIZE_UNITS[text[-2:]]
    except (KeyError, ValueError):
        number = 0
    if not 1 <= number < float("inf"):
        raise refusal(f"max_shard_size={size!r}; expected a number and one of {list(SIZE_UNITS)}, such as 5GB")
    return int(number)


Count = Annotated[int, Field(ge=0), Expected("an integer of at least 0")]
Positive = Annotated[int, Field(ge=1), Expected("an integer of at least 1")]
PositiveOrNone = Annotated[Positive | None, Expected("an integer of at least 1")]
Switch = Annotated[bool, Expected("true or false")]
Seed = Annotated[int, Field(ge=0, lt=2**63), Expected("an integer from 0, of 63 bits")]
BlockSizeOrNone = Annotated[Annotated[int, Field(ge=2)] | None, Expected("an integer of at least 2")]
# Not blank, and no NUL: no file system and no hub knows such a name.
_Text = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]
Source = Annotated[_Text, Expected("a folder or a hub id")]
Folder = Annotated[_Text, Expected("a folder")]
FolderOrNone = Annotated[_Text | None, Expected("a folder")]
Data = Annotated[_Text | None, Expected("a file, a folder or a dataset")]
Repository = Annotated[_Text | None, Expected("account/model")]
Revision = Annotated[str | None, Expected("a branch, a tag or a commit as text (quote it in YAML)")]
ShardSize = Annotated[str, PlainValidator(_is_size)]
Groups = Annotated[
    Annotated[Sequence[Annotated[Sequence[Count], Field(min_length=1)]], Field(min_length=1)] | None,
    BeforeValidator(_as_tuples),
    AfterValidator(_in_one_group),
    Expected("lists of layer indices, such as [[2, 3], [4, 5]]"),
]
MethodName = Annotated[str, Expected(f"one of {', '.join(NAMES)}")]
Options = Annotated[dict[str, Any], BeforeValidator(_as_dict), Expected("a mapping of names to values")]
Steps = Annotated[
    Sequence[Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]],
    BeforeValidator(_as_steps),
    Expected("methods such as prefit, or [{prefit: {steps: 100}}]"),
]
_PoolSize = Annotated[int, Field(ge=1)] | Annotated[str, AfterValidator(_is_factor)]
PoolSizes = Annotated[
    _PoolSize | Annotated[Sequence[_PoolSize], Field(min_length=1)] | None,
    BeforeValidator(_as_pool_size),
    Expected("a number such as 96, times the source's such as 1.5x"),
]
Budget = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None, Expected("a fraction of the source's bytes such as 0.6")
]
Routing = Annotated[str, Field(pattern="^(top_k|softmoe)$"), Expected("top_k or softmoe")]
Share = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Expected("a share such as 0.75")]
Loss = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Expected("nats such as 0.02")]


def adapters(fields_class: type) -> dict[str, tuple[TypeAdapter, str]]:
    """Return, for each field of a dataclass, what checks it and what an error says was expected."""
    hints = typing.get_type_hints(fields_class, include_extras=True)
    return {
        name: (
            TypeAdapter(hint, config=STRICT),
            next((each for each in reversed(typing.get_args(hint)) if isinstance(each, Expected)), ""),
        )
        for name, hint in hints.items()
    }


def checked(name: str, value: Any, adapter: TypeAdapter, expected: str) -> Any:
    """Check the field `name`, and return its value in the type that the recipe holds.

    Raises:
        ConversionError: the first thing that pydantic finds, in our words.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{each}]" for each in first["loc"] if isinstance(each, int))
        found = f"{name}{place}={repr(first['input'])[:200]}; expected {expected}"
        # A validator of ours has written the whole message.
        raise refusal(str(first["ctx"]["error"]) if first["type"] == "value_error" else found) from error
