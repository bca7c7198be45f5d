"""`make_plan`: what a conversion will do, tensor by tensor, from the source's config and headers alone."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.console import Console, RenderableType
from transformers import PreTrainedConfig

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.routing import SoftMoeOptions

from .checkpoint.reader import open_source
from .checkpoint.writer import into_files
from .display import show_plan
from .errors import ConversionError
from .folders import output_folder
from .layout.keys import saved_tensors
from .layout.source_model import SourceModel, family_model, read_config
from .memory import peak_memory_bytes, statistics_bytes
from .operations import TensorOperation, check_coverage, layers_read, plan_operations, replaced_experts
from .recipe import ConversionRecipe
from .recipe_types import parse_size

# What families call the number of layers that predict tokens beyond the next; transformers loads none of them.
PREDICTION_LAYERS_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

# Tokens use more experts than the mass that they are given: the study's rows ended at 1.3 times (docs/routing.md).
MASS_OF_ACTIVE = 0.75


@dataclass(frozen=True)
class Plan:
    """A conversion that has been decided and not begun; `execute` runs it, `print` and rich show it.

    Attributes:
        config: the output's config.
        source: the opened source.
        groups, pool_num_experts: the layers that read each pool, and its width.
        operations: every tensor of the output, in the order of writing.
        dropped: source tensors that the output does not hold, with the reason.
        files: the small files that are copied.
        peak_memory_bytes: an estimate of the tensors held at a time, without Python and torch themselves.
        statistics_bytes: what the calibration text leaves on the disk while converting, or in the statistics folder.
    """

    recipe: ConversionRecipe
    config: TiedMoeConfig
    source: SourceModel = field(repr=False)
    groups: list[list[int]]
    pool_num_experts: list[int]
    operations: tuple[TensorOperation, ...]
    dropped: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    expert_parameters_before: int
    expert_parameters_after: int
    bytes_before: int
    peak_memory_bytes: int
    statistics_bytes: int

    @property
    def is_lossless(self) -> bool:
        """Whether the tied model computes the source's logits, bit for bit."""
        return self.recipe.is_lossless

    @cached_property
    def bytes_after(self) -> int:
        """Bytes of the output's weights."""
        return sum(operation.num_bytes for operation in self.operations)

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON-able values; bytes are of tensors, without headers and small files."""
        return {
            "source": self.recipe.source,
            "revision": self.source.opened.commit,
            "output": self.recipe.output,
            "family": self.config.family,
            "method": self.recipe.method,
            "method_options": dict(self.recipe.method_options),
            "then": [dict(each) for each in self.recipe.then],
            "residual_rank": self.recipe.residual_rank,
            "routing": self.config.routing,
            "groups": [list(group) for group in self.groups],
            "pool_num_experts": list(self.pool_num_experts),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "expert_parameters_before": self.expert_parameters_before,
            "expert_parameters_after": self.expert_parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "residual_bytes": sum(o.num_bytes for o in self.operations if o.kind == "residual"),
            "peak_memory_bytes": self.peak_memory_bytes,
            "statistics_bytes": self.statistics_bytes,
            "tensors": len(self.operations),
            "shards": len({operation.file for operation in self.operations}),
            "files": list(self.files),
            "dropped": [{"tensor": name, "reason": reason} for name, reason in self.dropped],
        }

    def __rich__(self) -> RenderableType:
        return show_plan(self)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def make_plan(recipe: ConversionRecipe, source: SourceModel | None = None) -> Plan:
    """Decide a conversion from the source's config and headers; reads no tensor and writes nothing.

    Args:
        recipe: with groups, or the numbers that give them; `choose` finds what `budget` and `max_loss` leave open.
        source: the recipe's source where it has been opened already.

    Raises:
        TiedMoeError: what is wrong with the recipe, the source or the two together, and what to do about it.
    """
    if recipe.chooses_groups:
        raise ConversionError(
            "the recipe leaves groups and pool sizes to budget or max_loss; `choose` (tiedmoe convert) finds them "
            "first"
        )
    output_folder(recipe)
    if source is None:
        opened = open_source(recipe.source, recipe.revision, recipe.allow_pickle)
        family_config = read_config(opened)
        groups = _groups(recipe, family_config)  # before the headers are matched, so that it refuses early
        source = SourceModel.map(opened, family_config)
    else:
        opened, family_config = source.opened, source.model.config
        groups = _groups(recipe, family_config)
    _check_alike(groups, source)
    _check_shapes(source)
    num_experts = source.num_experts
    pool_num_experts = [
        recipe.pool_num_experts(p, len(groups), num_experts, len(group)) for p, group in enumerate(groups)
    ]
    _check_rank(recipe, source)
    maps = any(method.slot_maps for method, _ in recipe.steps)
    config = TiedMoeConfig.from_family(
        family_config,
        group_size=recipe.group_size,
        skip_first=recipe.skip_first,
        skip_last=recipe.skip_last,
        groups=groups,
        pool_num_experts=pool_num_experts,
        slot_maps=[maps or width != num_experts for width in pool_num_experts],
        residual_rank=recipe.residual_rank,
        **_routing(recipe, source),
    )
    config.architectures = ["TiedMoeForCausalLM"]
    _promise_no_dropped_layers(config, source)
    tied = family_model(config)
    operations = plan_operations(recipe, groups, tied, source)
    replaced = replaced_experts(recipe, groups, source)
    check_coverage(operations, replaced, source)
    expert_names = {name for layer in source.experts for name in source.expert_names(layer)}
    tied_experts = [o for o in operations if o.kind in ("pool", "residual") or o.target in expert_names]
    return Plan(
        recipe=recipe,
        config=config,
        source=source,
        groups=groups,
        pool_num_experts=pool_num_experts,
        operations=into_files(operations, parse_size(recipe.max_shard_size)),
        dropped=tuple(sorted({**source.tensors.dropped, **replaced}.items())),
        files=tuple(opened.travelling_files()),
        parameters_before=source.model.num_parameters(),
        parameters_after=tied.num_parameters(),
        expert_parameters_before=sum(source.tensors.meta[name].numel() for name in expert_names),
        expert_parameters_after=sum(math.prod(operation.shape) for operation in tied_experts),
        bytes_before=source.num_bytes,
        peak_memory_bytes=peak_memory_bytes(recipe, groups, source, config, operations),
        statistics_bytes=statistics_bytes(recipe, groups, source),
    )


def _promise_no_dropped_layers(config: TiedMoeConfig, source: SourceModel) -> None:
    """Set the count of multi-token-prediction layers to 0 if the source's are dropped.

    llama.cpp and vLLM look for as many as the config promises.
    """
    for name in source.tensors.dropped:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if re.match(r"(model\.)?mtp", name) or (layer and int(layer[1]) >= config.num_hidden_layers):
            for field in PREDICTION_LAYERS_FIELDS:
                if getattr(config, field, None):
                    setattr(config, field, 0)
            return


def _groups(recipe: ConversionRecipe, family_config: PreTrainedConfig) -> list[list[int]]:
    """Return the recipe's groups for this family; check all that needs the config and no weights."""
    config = TiedMoeConfig.from_family(
        family_config,
        group_size=recipe.group_size,
        skip_first=recipe.skip_first,
        skip_last=recipe.skip_last,
        groups=[] if recipe.ties_nothing else recipe.groups,
    )
    if not config.groups and recipe.routing == "top_k":
        raise ConversionError(
            f"nothing to tie: with skip_first={recipe.skip_first} and skip_last={recipe.skip_last} no layer with "
            f"experts of {recipe.source} is left; lower them, or name groups"
        )
    groups = config.groups or []
    for group in groups:
        layers_read(recipe, group)  # refuses an option's bad value
    return [list(group) for group in groups]


def _routing(recipe: ConversionRecipe, source: SourceModel) -> dict[str, Any]:
    """Return the routing fields of the output's config: the source's top-k, and where healing is to bring it."""
    if recipe.routing == "top_k":
        return {}
    softmoe: dict[str, Any] = {"alpha": 0.0, "target_alpha": SoftMoeOptions.alpha}
    if recipe.budget_active is not None:
        family = TiedMoeConfig.from_family(source.model.config, groups=[])
        softmoe["target_active"] = recipe.budget_active * sum(map(family.experts_per_token_of, source.experts))
        softmoe["target_budget"] = max(len(source.experts), MASS_OF_ACTIVE * softmoe["target_active"])
    return {"routing": "softmoe", "softmoe": softmoe}


def _check_alike(groups: list[list[int]], source: SourceModel) -> None:
    """Raise unless the layers of every group have experts of the same parameters, shapes and dtypes."""
    for p, group in enumerate(groups):
        found = {layer: source.describe_experts(layer) for layer in group}
        for layer in group[1:]:
            if found[layer] != found[group[0]]:
                raise ConversionError(
                    f"group {p} ties layers {group[0]} and {layer}, whose experts differ: layer {group[0]} has "
                    f"{found[group[0]]}, layer {layer} has {found[layer]}; a pool needs equal ones: put the layers "
                    "into different groups, or leave one untied"
                )


def _check_shapes(source: SourceModel) -> None:
    """Raise unless every tensor of the source has the shape that its config gives it."""
    for name, expected in saved_tensors(source.model).items():
        found = source.tensors.meta[name]
        if found.shape != expected.shape:
            raise ConversionError(
                f"{source.name}: {name} has shape {list(found.shape)} by the weights and {list(expected.shape)} by "
                "config.json; expected the same: use the config.json that belongs to the weights"
            )


def _check_rank(recipe: ConversionRecipe, source: SourceModel) -> None:
    """Raise if `residual_rank` is higher than the rank that a projection can have."""
    shapes = [
        tuple(source.tensors.meta[name].shape) for layer in source.experts for name in source.expert_names(layer)
    ]
    most = min(min(shape[1:]) for shape in shapes if len(shape) == 3)
    if recipe.residual_rank > most:
        raise ConversionError(
            f"residual_rank={recipe.residual_rank}, but the experts' smallest side is {most}; expected at most that, "
            "and far less to save anything"
        )
