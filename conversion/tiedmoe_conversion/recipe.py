"""`ConversionRecipe`: everything that decides a conversion, as a dataclass or as YAML, checked in one place.

What needs the source to be checked (which layers have experts, how many) is checked by `make_plan`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import ConversionError, did_you_mean
from .methods import METHODS, Method

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
    method: str = _option("least_squares", f"How a group's experts become a pool: {', '.join(METHODS)}.")
    method_options: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": 'The method\'s own options, such as {"layer": "last"}.'}
    )
    pool_experts: str | int | Sequence[str | int] | None = _option(
        None,
        "Experts per pool: a number, or times the source's such as 1.5x, or one per pool; the method's own by default.",
    )
    then: Sequence[str | Mapping[str, Any]] = field(
        default_factory=tuple,
        metadata={"help": "Methods that refine the pool afterwards, such as prefit or [{prefit: {steps: 100}}]."},
    )
    residual_rank: int = _option(
        0, "Rank of a low-rank residual that every layer adds to its pool's weights; 0 is none."
    )
    budget: float | None = _option(
        None, "Choose groups and pool sizes: this fraction of the source's bytes, such as 0.6, at the least loss."
    )
    max_loss: float | None = _option(
        None,
        "Choose groups and pool sizes: the fewest bytes that add at most this to the held-out loss (nats per token).",
    )
    calibration: str | None = _option(
        None, "Text for the methods that need it and for the losses: a file, a folder, a Hub dataset, or austen."
    )
    calibration_tokens: int = _option(32768, "Tokens of the text to fit on; a quarter as many again are held out.")
    calibration_block_size: int = _option(
        512, "Tokens in a sequence of the text; the source must know so many positions."
    )
    statistics: str | None = _option(
        None, "Folder that keeps what the text told about the source, for further conversions of it."
    )
    measure: bool = _option(
        True, "With calibration text: the loss before and after, routing agreement and dead slots, in report and card."
    )
    seed: int = _option(0, "Of the choice of text, and of every method that draws.")
    push_to_hub: str | None = _option(None, "Hub repository to upload the result to, such as account/model.")
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
        object.__setattr__(self, "then", _check_then(self.then))
        if self.pool_experts is not None:
            object.__setattr__(self, "pool_experts", _check_pool_experts(self.pool_experts))
        self._check_numbers()
        if self.revision is not None and not isinstance(self.revision, str):
            raise ConversionError(
                f"revision={self.revision!r}; expected a branch, a tag or a commit as text (quote it in YAML)"
            )
        if not isinstance(self.allow_pickle, bool):
            raise ConversionError(f"allow_pickle={self.allow_pickle!r}; expected true or false")
        parse_size(self.max_shard_size)
        self._check_calibration()

    @property
    def steps(self) -> list[tuple[Method, dict[str, Any]]]:
        """The methods in the order they run, each with its options; the first one makes a pool, the others refine it."""
        then = [(METHODS[name], dict(options)) for each in self.then for name, options in each.items()]  # type: ignore[union-attr]
        steps = [(METHODS[self.method], dict(self.method_options)), *then]
        while steps[0][0].refines is not None:
            steps.insert(0, (METHODS[steps[0][0].refines], {}))
        return steps

    def pool_num_experts(self, pool: int, num_pools: int, num_experts: int, group_size: int) -> int:
        """P of a pool of `group_size` layers of `num_experts` experts each.

        Raises:
            ConversionError: there is not one size per pool, or a pool would be wider than all its layers' experts.
        """
        method, sizes = self.steps[0][0], self.pool_experts
        own = method.pool_num_experts(num_experts, group_size)
        if isinstance(sizes, tuple) and len(sizes) != num_pools:
            raise ConversionError(
                f"pool_experts has {len(sizes)} entries for {num_pools} pools; give one, or one per pool"
            )
        size: Any = sizes[pool] if isinstance(sizes, tuple) else sizes
        if size is None:
            return own
        wanted: int = math.ceil(float(size[:-1]) * num_experts - 1e-9) if isinstance(size, str) else size
        most = num_experts * group_size
        if not 1 <= wanted <= most or (method.lossless and wanted != own):
            expected = f"{own}, all of its layers' experts" if method.lossless else f"from 1 to {most}"
            raise ConversionError(
                f"pool_experts={size!r} makes pool {pool} one of {wanted} experts; expected {expected}, as method "
                f"{self.method!r} ties {group_size} layers of {num_experts}; prototype makes a pool of any size"
            )
        if wanted < own and not method.any_width:
            raise ConversionError(
                f"pool_experts={size!r} makes pool {pool} one of {wanted} experts, but method {self.method!r} makes {own} and "
                "can only be widened; choose prototype, which keeps as many experts as asked for"
            )
        return wanted

    def needs_calibration(self) -> bool:
        """Whether any step runs the source on text."""
        chooses = self.budget is not None or self.max_loss is not None
        return chooses or any(method.calibration(**options) for method, options in self.steps)

    def _check_numbers(self) -> None:
        for name, least in (
            ("residual_rank", 0), ("calibration_tokens", 1), ("calibration_block_size", 2), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConversionError(f"{name}={value!r}; expected an integer of at least {least}")
        if self.budget is not None and self.max_loss is not None:
            raise ConversionError(
                f"budget={self.budget} and max_loss={self.max_loss} are both given; expected one of them"
            )
        for name, most in (("budget", 1.0), ("max_loss", math.inf)):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= most
            ):
                expected = "a fraction of the source's bytes such as 0.6" if name == "budget" else "nats such as 0.02"
                raise ConversionError(f"{name}={value!r}; expected {expected}")
        if self.budget is not None or self.max_loss is not None:
            given = [name for name in ("groups", "pool_experts") if getattr(self, name) is not None]
            if given:
                raise ConversionError(
                    f"{given[0]} is given beside budget or max_loss, which choose groups and pool sizes; leave one out"
                )
        if not isinstance(self.measure, bool):
            raise ConversionError(f"measure={self.measure!r}; expected true or false")

    def _check_calibration(self) -> None:
        for name, what in (
            ("calibration", "a file, a folder or a dataset"),
            ("statistics", "a folder"),
            ("push_to_hub", "account/model"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, Path)) or not str(value).strip()):
                raise ConversionError(f"{name}={value!r}; expected {what}")
            object.__setattr__(self, name, None if value is None else str(value))
        if self.calibration is None and self.needs_calibration():
            asking = [method.name for method, options in reversed(self.steps) if method.calibration(**options)]
            what = f"method {asking[0]!r}" if asking else "choosing by budget or max_loss"
            raise ConversionError(
                f"{what} needs calibration text; give calibration=FILE_OR_DATASET (--calibration), text like what the model is "
                "for, or austen for the novels that ship with the package; union, select and average need none"
            )

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
        fields["then"] = [dict(each) for each in self.then]  # type: ignore[arg-type]
        fields["pool_experts"] = list(self.pool_experts) if isinstance(self.pool_experts, tuple) else self.pool_experts
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


def _check_then(then: Any) -> tuple[dict[str, dict[str, Any]], ...]:
    """Every further step as `{method: options}`."""
    if isinstance(then, (str, Mapping)):
        then = [then]
    if not _is_list(then):
        raise ConversionError(f"then={then!r}; expected methods such as prefit, or [{{prefit: {{steps: 100}}}}]")
    steps = []
    for each in then:
        named = {each: {}} if isinstance(each, str) else each
        if not isinstance(named, Mapping) or len(named) != 1:
            raise ConversionError(
                f"then names {each!r}; expected a method, or one method and its options as a mapping"
            )
        ((name, options),) = named.items()
        refining = [method.name for method in METHODS.values() if method.refines]
        if name not in refining:
            known = f"method {name!r} makes a pool and refines none" if name in METHODS else f"unknown method {name!r}"
            raise ConversionError(f"then: {known}; {did_you_mean(name, refining)}")
        if not isinstance(options or {}, Mapping):
            raise ConversionError(
                f"then gives {name!r} the options {options!r}; expected a mapping of names to values"
            )
        METHODS[name].check_options(options or {})
        steps.append({str(name): dict(options or {})})
    return tuple(steps)


def _check_pool_experts(sizes: Any) -> Any:
    """A number, a multiple as text such as "1.5x", or a tuple of them."""
    if _is_list(sizes) and sizes:
        return tuple(_check_pool_experts(size) for size in sizes)
    text = str(sizes).strip().lower()
    if isinstance(sizes, str) and text.isdecimal():
        sizes = int(text)
    if isinstance(sizes, int) and not isinstance(sizes, bool) and sizes > 0:
        return sizes
    try:
        factor = float(text.removesuffix("x")) if isinstance(sizes, str) and text.endswith("x") else 0.0
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise ConversionError(f"pool_experts={sizes!r}; expected a number such as 96, times the source's such as 1.5x")
    return text


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
