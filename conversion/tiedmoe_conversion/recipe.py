"""`ConversionRecipe`: everything that decides a conversion, as a dataclass or as YAML, checked in one place.

What needs the source to be checked (which layers have experts, how many) is checked by `make_plan`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import ConversionError, did_you_mean
from .methods import METHODS

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ConversionRecipe:
    """How to turn a source checkpoint into a tied one.

    Every field's `metadata["help"]` is the help of the command-line flag that is made from it.

    Raises:
        ConversionError: a field that is wrong whatever the source is.
    """

    source: str = field(metadata={"help": "The untied checkpoint: a local folder or a Hugging Face Hub id."})
    output: str = field(metadata={"help": "The folder to write; it must be new or empty."})
    group_size: int = _option(2, "Consecutive MoE layers that share one pool of experts.")
    skip_first: int = _option(2, "MoE layers left untied at the start.")
    skip_last: int = _option(2, "MoE layers left untied at the end.")
    groups: Sequence[Sequence[int]] | None = _option(
        None, "Layer indices per pool, such as [[2, 3], [4, 5]]; overrides the three numbers above."
    )
    method: str = _option("average", "How a group's experts become a pool: average, select or union.")
    method_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": 'The method\'s own options, such as {"layer": "last"}.'}
    )
    revision: str | None = _option(None, "Branch, tag or commit of a source on the Hub.")
    max_shard_size: str = _option("5GB", "Largest weight file to write, such as 500MB or 5GB.")
    allow_pickle: bool = _option(
        False, "Read .bin files too, with torch.load(weights_only=True), where a source has no safetensors."
    )

    def __post_init__(self):
        for name in ("source", "output"):
            value = getattr(self, name)
            if not isinstance(value, (str, Path)) or not str(value).strip():
                raise ConversionError(f"{name}={value!r}; expected a folder" + " or a hub id" * (name == "source"))
            object.__setattr__(self, name, str(value))  # the class is frozen
        for name, least in (("group_size", 1), ("skip_first", 0), ("skip_last", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConversionError(f"{name}={value!r}; expected an integer of at least {least}")
        if self.groups is not None:
            object.__setattr__(self, "groups", _check_groups(self.groups))
        if self.method not in METHODS:
            raise ConversionError(f"unknown method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        if not isinstance(self.method_options, Mapping):
            raise ConversionError(f"method_options={self.method_options!r}; expected a mapping of names to values")
        object.__setattr__(self, "method_options", dict(self.method_options))
        METHODS[self.method].check_options(self.method_options)
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConversionError(
                f"revision={self.revision!r}; expected a branch, a tag or a commit as text (quote it in YAML)"
            )
        if not isinstance(self.allow_pickle, bool):
            raise ConversionError(f"allow_pickle={self.allow_pickle!r}; expected true or false")
        parse_size(self.max_shard_size)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ConversionRecipe":
        """The recipe with these fields; unknown and missing ones are refused by name."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise ConversionError(f"a recipe has no field {name!r}; {did_you_mean(name, names)}")
        missing = [name for name in ("source", "output") if name not in fields]
        if missing:
            raise ConversionError(f"the recipe has no {' and no '.join(missing)}; every recipe names both")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "ConversionRecipe":
        """The recipe in the YAML file `path`, in which `overrides` replace fields before anything is checked."""
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConversionError(f"cannot read the recipe {path}: {error}") from error
        if not isinstance(fields, dict):
            raise ConversionError(
                f"the recipe {path} holds {type(fields).__name__}; expected lines such as 'source: …'"
            )
        return cls.from_dict({**fields, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON and YAML values; `from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["groups"] = None if self.groups is None else [list(group) for group in self.groups]
        return fields

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe as YAML, every field of it, so that the file stands on its own."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


def parse_size(size: str | int) -> int:
    """Bytes from a number of bytes or from text such as "500MB" (powers of ten, as in transformers)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().upper()
    try:
        number = float(text[:-2]) * SIZE_UNITS[text[-2:]]
    except (KeyError, ValueError):
        number = 0
    if not 1 <= number < float("inf"):
        raise ConversionError(f"max_shard_size={size!r}; expected a number and one of {list(SIZE_UNITS)}, such as 5GB")
    return int(number)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_groups(groups: Any) -> tuple[tuple[int, ...], ...]:
    """`groups` as tuples; whether its layers have experts is for the plan to see."""
    if not _is_list(groups) or not groups or not all(_is_list(group) for group in groups):
        raise ConversionError(f"groups={groups!r}; expected lists of layer indices, such as [[2, 3], [4, 5]]")
    owner: dict[int, int] = {}
    for p, group in enumerate(groups):
        if not group:
            raise ConversionError(f"group {p} is empty; expected layer indices, such as [2, 3]")
        for layer in group:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
                raise ConversionError(f"group {p} names layer {layer!r}; expected an integer from 0")
            if layer in owner:
                raise ConversionError(
                    f"layer {layer} is in group {owner[layer]} and in group {p}; a layer reads one pool: "
                    "remove it from one of them"
                )
            owner[layer] = p
    return tuple(tuple(group) for group in groups)
