"""`ConversionRecipe`: everything that decides a conversion, as a dataclass or as YAML, checked in one place.

Types and ranges are pydantic's to check, from the fields' annotations; what needs the source to be checked (which
layers have experts, how many) is checked by `make_plan`. Importing this file does not import torch: see
`methods/__init__.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import recipe_types as kinds
from .methods import NAMES
from .recipe_types import adapters, checked, refusal
from .recipes import FOLDER, recipe_names

if TYPE_CHECKING:
    from .methods.base import Method


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ConversionRecipe:
    """How to turn a source checkpoint into a tied one, a softly routed one, or one that is both.

    `routing="softmoe"` without a field on tying ties nothing: `group_size` is then 1.

    Every field's `metadata["help"]` is the help of the command-line flag that is made from it.

    Raises:
        ConversionError: a field that is wrong whatever the source is.
    """

    source: kinds.Source = field(metadata={"help": "The untied checkpoint: a local folder or a Hugging Face Hub id."})
    output: kinds.Folder = field(metadata={"help": "The folder to write; it must be new or empty."})
    group_size: kinds.Positive = _option(
        None, "Consecutive MoE layers that share one pool of experts: 2, or with softmoe, and nothing on tying, 1."
    )
    skip_first: kinds.Count = _option(2, "MoE layers left untied at the start.")
    skip_last: kinds.Count = _option(2, "MoE layers left untied at the end.")
    groups: kinds.Groups = _option(
        None, "Layer indices per pool, such as [[2, 3], [4, 5]]; overrides the three numbers above."
    )
    method: kinds.MethodName = _option(
        None, f"How a group's experts become a pool: {', '.join(NAMES)}; least_squares by default."
    )
    method_options: kinds.Options = field(
        default_factory=dict, metadata={"help": 'The method\'s own options, such as {"layer": "last"}.'}
    )
    pool_experts: kinds.PoolSizes = _option(
        None,
        "Experts per pool: a number, a multiple of the source's such as 1.5x, or one per pool; else the method's.",
    )
    then: kinds.Steps = field(
        default_factory=tuple,
        metadata={"help": "Methods that refine the pool afterwards, such as prefit or [{prefit: {steps: 100}}]."},
    )
    residual_rank: kinds.Count = _option(
        0, "Rank of a low-rank residual that every layer adds to its pool's weights; 0 is none."
    )
    budget: kinds.Budget = _option(
        None, "Choose groups and pool sizes: this fraction of the source's bytes, such as 0.6, at the least loss."
    )
    max_loss: kinds.Loss = _option(
        None,
        "Choose groups and pool sizes: the fewest bytes that add at most this to the held-out loss (nats per token).",
    )
    routing: kinds.Routing = _option(
        "top_k",
        "softmoe: routers whose active experts can adapt. The result starts as the source's top-k; heal softens it.",
    )
    budget_active: kinds.Share = _option(
        None,
        "With softmoe: the experts that tokens are to use after healing, a share of the source's such as 0.75.",
    )
    calibration: kinds.Data = _option(
        None, "Text for the methods that need it and for the losses: a file, a folder, a Hub dataset, or austen."
    )
    calibration_tokens: kinds.Positive = _option(
        32768, "Tokens of the text to fit on; a quarter as many again are held out."
    )
    calibration_block_size: kinds.BlockSizeOrNone = _option(
        None, "Tokens in a sequence of the text; by default 512, or the source's positions if fewer."
    )
    statistics: kinds.FolderOrNone = _option(
        None, "Folder that keeps the source's statistics on the text, for further conversions of it."
    )
    measure: kinds.Switch = _option(
        True, "With calibration text: the loss before and after, routing agreement and dead slots, in report and card."
    )
    seed: kinds.Seed = _option(0, "Random seed, for the choice of text and for methods that draw samples.")
    push_to_hub: kinds.Repository = _option(None, "Hub repository to upload the result to, such as account/model.")
    revision: kinds.Revision = _option(None, "Branch, tag or commit of a source on the Hub.")
    max_shard_size: kinds.ShardSize = _option("5GB", "Largest weight file to write, such as 500MB or 5GB.")
    allow_pickle: kinds.Switch = _option(
        False, "Read .bin files too, with torch.load(weights_only=True), where a source has no safetensors."
    )

    def __post_init__(self):
        self._fill_in()
        fields_class: Any = type(self)  # which mypy takes for unhashable
        for name, (adapter, expected) in _adapters(fields_class).items():
            # The class is frozen.
            object.__setattr__(self, name, checked(name, getattr(self, name), adapter, expected))
        self._check_methods()
        self._check_together()

    def _fill_in(self) -> None:
        """Choose what is left out: soft routing alone ties nothing, and then no expert is made anew."""
        named = (self.groups, self.method, self.pool_experts, self.budget, self.max_loss)
        ties = self.routing != "softmoe" or self.residual_rank or self.then or any(each is not None for each in named)
        if self.group_size is None:
            object.__setattr__(self, "group_size", 2 if ties else 1)  # the class is frozen
        if self.method is None:
            object.__setattr__(self, "method", "union" if self.ties_nothing else "least_squares")

    def _check_methods(self) -> None:
        from .errors import did_you_mean
        from .methods import METHODS

        if self.method not in METHODS:
            raise refusal(f"unknown method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        METHODS[self.method].check_options(self.method_options)
        refining = [method.name for method in METHODS.values() if method.refines]
        for name, options in self._then:
            if name not in refining:
                known = (
                    f"method {name!r} makes a pool and refines none" if name in METHODS else f"unknown method {name!r}"
                )
                raise refusal(f"then: {known}; {did_you_mean(name, refining)}")
            METHODS[name].check_options(options)

    def _check_together(self) -> None:
        if self.budget is not None and self.max_loss is not None:
            raise refusal(f"budget={self.budget} and max_loss={self.max_loss} are both given; expected one of them")
        if self.budget_active is not None and self.routing != "softmoe":
            raise refusal(
                f"budget_active={self.budget_active} has no effect with routing={self.routing!r}; give "
                "routing=softmoe, or leave it out"
            )
        if self.ties_nothing and self.method != "union":
            raise refusal(
                f"method={self.method!r} has no effect with routing='softmoe' and group_size=1, which tie nothing; "
                "leave it out, or give a group_size of at least 2"
            )
        if self.chooses_groups:
            given = [name for name in ("groups", "pool_experts") if getattr(self, name) is not None]
            if given:
                raise refusal(
                    f"{given[0]} is given beside budget or max_loss, which choose groups and pool sizes; leave one out"
                )
        if self.calibration is None and self.needs_calibration():
            asking = [method.name for method, options in reversed(self.steps) if method.calibration(**options)]
            what = f"method {asking[0]!r}" if asking else "choosing by budget or max_loss"
            raise refusal(
                f"{what} needs calibration text; give calibration=FILE_OR_DATASET (--calibration), text like what "
                "the model is for, or austen for the novels that ship with the package; union, select and average "
                "need none"
            )

    @property
    def _then(self) -> list[tuple[str, dict[str, Any]]]:
        return [item for each in self.then for item in each.items()]

    @property
    def steps(self) -> list[tuple["Method", dict[str, Any]]]:
        """The methods in the order they run, each with its options; the first makes a pool, the others refine it."""
        from .methods import METHODS

        steps = [(METHODS[name], dict(options)) for name, options in [(self.method, self.method_options), *self._then]]
        while steps[0][0].refines is not None:
            steps.insert(0, (METHODS[steps[0][0].refines], {}))
        return steps

    @property
    def chooses_groups(self) -> bool:
        """Whether groups and pool sizes are left to `budget` or `max_loss`."""
        return self.budget is not None or self.max_loss is not None

    @property
    def ties_nothing(self) -> bool:
        """Whether every layer keeps its own experts as they are, and only its routing changes."""
        makes = self.groups or self.pool_experts or self.residual_rank or self.then or self.chooses_groups
        return self.routing == "softmoe" and self.group_size == 1 and not makes

    @property
    def is_lossless(self) -> bool:
        """Whether the tied model computes the source's logits, bit for bit."""
        return not self.residual_rank and all(method.lossless for method, _ in self.steps)

    def needs_calibration(self) -> bool:
        """Tell whether any step runs the source on text."""
        return self.chooses_groups or any(method.calibration(**options) for method, options in self.steps)

    def pool_num_experts(self, pool: int, num_pools: int, num_experts: int, group_size: int) -> int:
        """Return P for a pool of `group_size` layers with `num_experts` experts each.

        Raises:
            ConversionError: there is not one size per pool, or a pool would be wider than all its layers' experts.
        """
        method, sizes = self.steps[0][0], self.pool_experts
        own = method.pool_num_experts(num_experts, group_size)
        if isinstance(sizes, tuple) and len(sizes) != num_pools:
            raise refusal(f"pool_experts has {len(sizes)} entries for {num_pools} pools; give one, or one per pool")
        size: Any = sizes[pool] if isinstance(sizes, tuple) else sizes
        if size is None:
            return own
        most = num_experts * group_size
        factor = float(size[:-1]) if isinstance(size, str) else 0.0
        # Bounded, as any larger factor is refused alike and an infinite one has no integer.
        wanted: int = math.ceil(min(factor, group_size + 1) * num_experts - 1e-9) if factor else size
        if not 1 <= wanted <= most or (method.lossless and wanted != own):
            expected = f"{own}, all of its layers' experts" if method.lossless else f"from 1 to {most}"
            raise refusal(
                f"pool_experts={size!r} makes pool {pool} one of {wanted} experts; expected {expected}, as method "
                f"{self.method!r} ties {group_size} layers of {num_experts}; prototype makes a pool of any size"
            )
        if wanted < own and not method.any_width:
            raise refusal(
                f"pool_experts={size!r} makes pool {pool} one of {wanted} experts, but method {self.method!r} makes "
                f"{own} and can only be widened; choose prototype, which keeps as many experts as asked for"
            )
        return wanted

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ConversionRecipe":
        """Return the recipe with these fields; unknown and missing ones are refused by name."""
        from .errors import did_you_mean

        names = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise refusal(f"a recipe has no field {name!r}; {did_you_mean(name, names)}")
        missing = [name for name in ("source", "output") if name not in fields]
        if missing:
            raise refusal(f"the recipe has no {' and no '.join(missing)}; every recipe names both")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "ConversionRecipe":
        """Return the recipe in a YAML file, or the shipped one of that name.

        `overrides` replace fields before the checks.
        """
        from transformers_tiedmoe.errors import TiedMoeError
        from transformers_tiedmoe.yaml_input import read_yaml

        from .errors import did_you_mean

        if not Path(path).expanduser().is_file() and Path(path).name == str(path) and not Path(path).suffix:
            if str(path) not in recipe_names():
                raise refusal(
                    f"recipe {str(path)!r} is no file here and none that ships with tiedmoe; "
                    f"{did_you_mean(path, recipe_names())}"
                )
            path = FOLDER / f"{path}.yaml"
        try:
            fields = read_yaml(path, f"the recipe {path}")
        except TiedMoeError as error:
            raise refusal(str(error)) from error
        if not isinstance(fields, dict):
            raise refusal(f"the recipe {path} holds {type(fields).__name__}; expected lines such as 'source: …'")
        return cls.from_dict({**fields, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON and YAML values; `from_dict` reads it back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["groups"] = None if self.groups is None else [list(group) for group in self.groups]
        fields["then"] = [dict(each) for each in self.then]
        fields["pool_experts"] = list(self.pool_experts) if isinstance(self.pool_experts, tuple) else self.pool_experts
        return fields

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe as YAML, every field of it, so that the file stands on its own."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


@functools.cache
def _adapters(fields_class: type) -> dict:
    return adapters(fields_class)
