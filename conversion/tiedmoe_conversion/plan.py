"""`make_plan`: what a conversion will do, tensor by tensor, from the source's config and headers alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_tiedmoe import TiedMoeConfig

from .calibration.streamed_model import held_bytes
from .calibration.text import HELD_OUT_SHARE
from .checkpoint.reader import open_source
from .checkpoint.writer import Planned, into_files
from .errors import ConversionError
from .folders import output_folder
from .layout.keys import saved_tensors
from .layout.source_model import SourceModel, family_model, read_config
from .methods import Sizes
from .methods.residual import scratch_bytes as residual_scratch_bytes
from .recipe import ConversionRecipe
from .recipe_types import parse_size
from .verify import MAX_BYTES_FOR_LOGITS

RESIDUAL_COPIES = (1, 1)  # of a group's experts and its pool's in float32, while residuals are made


@dataclass(frozen=True)
class TensorOperation(Planned):
    """How one tensor of the output is made.

    Attributes:
        kind: "copy" (bit for bit), "fuse" (transformers' own rule, e.g. one tensor per expert into one 3-D tensor),
            "pool" (the methods make it), "slot_map" or "residual" (made with the pool).
        sources: the source's tensors that it is made from.
        pool: the pool that it belongs to; -1 outside of pools.
        parameter: the name of the pool's parameter, or of a layer's residual factor; "" otherwise.
        layer: whose slot map or residual it is; -1 otherwise.
    """

    kind: str
    sources: tuple[str, ...]
    pool: int = -1
    parameter: str = ""
    layer: int = -1


@dataclass(frozen=True)
class Plan:
    """A conversion that has been decided and not begun; `execute` runs it, `print` and rich show it.

    Attributes:
        config: the output's config.
        source: the opened source.
        groups, pool_num_experts: the layers that read each pool, and its width.
        operations: every tensor of the output, in the order of writing.
        dropped: source tensors that the output does not hold, with the reason.
        files: the small files that travel along.
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
        return _is_lossless(self.recipe)

    @cached_property
    def bytes_after(self) -> int:
        """Bytes of the output's weights."""
        return sum(operation.num_bytes for operation in self.operations)

    def summary(self) -> dict[str, Any]:
        """The plan as JSON-able values; bytes are of tensors, without headers and small files."""
        return {
            "source": self.recipe.source,
            "revision": self.source.opened.commit,
            "output": self.recipe.output,
            "family": self.config.family,
            "method": self.recipe.method,
            "method_options": dict(self.recipe.method_options),
            "then": [dict(each) for each in self.recipe.then],
            "residual_rank": self.recipe.residual_rank,
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
        recipe = self.recipe
        pools = Table("pool", "layers", "experts", "made by", "bytes", box=box.SIMPLE_HEAD)
        for p, (group, width) in enumerate(zip(self.groups, self.pool_num_experts)):
            size = sum(operation.num_bytes for operation in self.operations if operation.pool == p)
            pools.add_row(str(p), _span(group), str(width), _made_by(recipe), decimal(size))
        totals = Table("", "before", "after", "left", box=box.SIMPLE_HEAD)
        for label, before, after, show in (
            ("parameters", self.parameters_before, self.parameters_after, "{:,}".format),
            ("of these in experts", self.expert_parameters_before, self.expert_parameters_after, "{:,}".format),
            ("weights on disk", self.bytes_before, self.bytes_after, decimal),
        ):
            totals.add_row(label, show(before), show(after), f"{after / before:.1%}")
        untied = [layer for layer in self.source.experts if self.config.group_of(layer) is None]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped:
            reasons.setdefault(reason, []).append(name)
        return Group(
            Text(f"{recipe.source} ({self.config.family}) -> {recipe.output}", style="bold"),
            pools,
            Text(f"layers that keep their own experts: {_span(untied) if untied else 'none'}"),
            totals,
            Text(
                f"{len(self.operations)} tensors in {len({operation.file for operation in self.operations})} weight "
                f"file(s); at most {decimal(self.peak_memory_bytes)} of tensors in memory at a time\n"
                + (
                    f"calibration on {recipe.calibration_tokens:,} tokens of {recipe.calibration}: "
                    f"{decimal(self.statistics_bytes)} of statistics on the disk\n"
                    if recipe.calibration is not None
                    else ""
                )
                + f"files that travel along: {', '.join(self.files) or 'none'}"
            ),
            *(Text(f"dropped: {len(names)} tensor(s), such as {names[0]}: {why}") for why, names in reasons.items()),
        )

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
        ValueError: whatever is wrong with the recipe, the source or the two together, and what to do about it.
    """
    if recipe.budget is not None or recipe.max_loss is not None:
        raise ConversionError(
            "the recipe leaves groups and pool sizes to budget or max_loss; `choose` (tiedmoe convert) finds them first"
        )
    output_folder(recipe)
    if source is None:
        opened = open_source(recipe.source, recipe.revision, recipe.allow_pickle)
        family_config = read_config(opened)
        groups = _groups(recipe, family_config)  # before the headers are matched: what it refuses costs less
        source = SourceModel.map(opened, family_config)
    else:
        opened, family_config = source.opened, source.model.config
        groups = _groups(recipe, family_config)
    _check_alike(groups, source)
    _check_shapes(source)
    num_experts = _num_experts(source)
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
    )
    config.architectures = ["TiedMoeForCausalLM"]
    tied = family_model(config)
    operations = _operations(recipe, groups, tied, source)
    replaced = _replaced(recipe, groups, source)
    _check_coverage(operations, replaced, source)
    expert_names = {name for layer in source.experts for name in source.expert_names(layer)}
    tied_experts = [o for o in operations if o.kind in ("pool", "residual") or o.target in expert_names]
    ignored_bytes = sum(opened.tensors[name].num_bytes for name in source.tensors.dropped)
    bytes_before = sum(info.num_bytes for info in opened.tensors.values()) - ignored_bytes
    peaks = [_peak(operation, groups, source, recipe, config) for operation in operations]
    peaks += [2 * source.tensors.meta[name].nbytes for name in source.tensors.copies]  # the two are compared
    if _is_lossless(recipe) and bytes_before <= MAX_BYTES_FOR_LOGITS:
        peaks.append(sum(operation.num_bytes for operation in operations))  # the verification loads the output
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
        bytes_before=bytes_before,
        peak_memory_bytes=max(peaks)
        + max(map(_block_bytes, operations))
        + _streamed_bytes(recipe, source, bytes_before),
        statistics_bytes=_statistics_bytes(recipe, groups, source),
    )


def _groups(recipe: ConversionRecipe, family_config: PreTrainedConfig) -> list[list[int]]:
    """The recipe's groups for this family; checks everything that needs the config and not the weights."""
    config = TiedMoeConfig.from_family(
        family_config,
        group_size=recipe.group_size,
        skip_first=recipe.skip_first,
        skip_last=recipe.skip_last,
        groups=None if recipe.groups is None else [list(group) for group in recipe.groups],
    )
    if not config.groups:
        raise ConversionError(
            f"nothing to tie: with skip_first={recipe.skip_first} and skip_last={recipe.skip_last} no layer with experts "
            f"of {recipe.source} is left; lower them, or name groups"
        )
    for group in config.groups:
        _layers_read(recipe, group)  # refuses an option's bad value
    return [list(group) for group in config.groups]


def _check_alike(groups: list[list[int]], source: SourceModel) -> None:
    """Raise unless the layers of every group have experts of the same parameters, shapes and dtypes."""
    for p, group in enumerate(groups):
        found = {layer: source.describe_experts(layer) for layer in group}
        for layer in group[1:]:
            if found[layer] != found[group[0]]:
                raise ConversionError(
                    f"group {p} ties layers {group[0]} and {layer}, whose experts differ: layer {group[0]} has "
                    f"{found[group[0]]}, layer {layer} has {found[layer]}; a pool needs equal ones: put the layers into "
                    "different groups, or leave one untied"
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


def _num_experts(source: SourceModel) -> int:
    """E, the rows of every expert parameter of every layer."""
    rows = {
        name: source.tensors.meta[name].shape[:1] for layer in source.experts for name in source.expert_names(layer)
    }
    if len(set(rows.values())) != 1:
        raise ConversionError(
            f"{source.name}: the experts' parameters have different numbers of experts: {rows}; expected one number "
            "for all layers, which is all that pools can be made of here"
        )
    return next(iter(rows.values()))[0]


def _check_rank(recipe: ConversionRecipe, source: SourceModel) -> None:
    """Raise where a residual would have a higher rank than a projection can have."""
    shapes = [
        tuple(source.tensors.meta[name].shape) for layer in source.experts for name in source.expert_names(layer)
    ]
    most = min(min(shape[1:]) for shape in shapes if len(shape) == 3)
    if recipe.residual_rank > most:
        raise ConversionError(
            f"residual_rank={recipe.residual_rank}, but the experts' smallest side is {most}; expected at most that, and far less "
            "to save anything"
        )


def _operations(
    recipe: ConversionRecipe, groups: list[list[int]], tied: PreTrainedModel, source: SourceModel
) -> list[TensorOperation]:
    """One operation per tensor that the tied model saves; a pool's tensors and slot maps stand together."""
    tensors = source.tensors
    expected = saved_tensors(tied)
    operations = []
    for name in expected:
        if name in tensors.units:
            kind = "copy" if tensors.units[name].converter is None else "fuse"
            meta = tensors.meta[name]
            operations.append(TensorOperation(name, tuple(meta.shape), meta.dtype, kind, tensors.units[name].keys))
    for p, group in enumerate(groups):
        for name in source.expert_names(group[0]):
            part = name.removeprefix(f"{source.experts[group[0]]}.")
            target = f"{tied.base_model_prefix}.expert_pools.{p}.{part}"
            keys = tuple(
                key
                for layer in _layers_read(recipe, group)
                for key in tensors.units[f"{source.experts[layer]}.{part}"].keys
            )
            shape, dtype = tuple(expected[target].shape), tensors.meta[name].dtype
            operations.append(TensorOperation(target, shape, dtype, "pool", keys, p, part))
        for layer in group:
            prefix = f"{source.experts[layer]}."
            for target in [name for name in expected if name.startswith(prefix)]:
                part, shape = target.removeprefix(prefix), tuple(expected[target].shape)
                if part == "slot_map":
                    operations.append(TensorOperation(target, shape, torch.int64, "slot_map", (), p, part, layer))
                else:
                    dtype = tensors.meta[f"{prefix}{part.rsplit('_residual_')[0]}"].dtype
                    operations.append(TensorOperation(target, shape, dtype, "residual", (), p, part, layer))
    planned = [operation.target for operation in operations]
    assert sorted(planned) == sorted(expected), f"not planned, or twice: {set(planned) ^ set(expected)}"
    return operations


def _replaced(recipe: ConversionRecipe, groups: list[list[int]], source: SourceModel) -> dict[str, str]:
    """The experts that a pool stands for and that its method does not read."""
    reasons = {}
    for p, group in enumerate(groups):
        for layer in set(group) - set(_layers_read(recipe, group)):
            for name in source.expert_names(layer):
                keys = source.tensors.units[name].keys
                reasons.update(dict.fromkeys(keys, f"pool {p} takes the place of layer {layer}'s experts"))
    return reasons


def _check_coverage(operations: list[TensorOperation], replaced: Mapping[str, str], source: SourceModel) -> None:
    """Every tensor of the source is used, or named as dropped: nothing is lost without a word."""
    used = {key for operation in operations for key in operation.sources}
    lost = source.opened.tensors.keys() - used - replaced.keys() - source.tensors.dropped.keys()
    assert not lost, f"tensors of the source that nothing reads: {sorted(lost)[:5]}"


def _layers_read(recipe: ConversionRecipe, group: Sequence[int]) -> list[int]:
    """The layers of a group that any of the recipe's steps reads."""
    if recipe.residual_rank:
        return list(group)
    read = {layer for method, options in recipe.steps for layer in method.layers_read(group, **options)}
    return [layer for layer in group if layer in read]


def _is_lossless(recipe: ConversionRecipe) -> bool:
    return not recipe.residual_rank and all(method.lossless for method, _ in recipe.steps)


def _made_by(recipe: ConversionRecipe) -> str:
    """The recipe's methods for people: "prototype, prefit, residual 8"."""
    names = [method.name for method, _ in recipe.steps]
    return ", ".join(names + [f"residual {recipe.residual_rank}"] * bool(recipe.residual_rank))


def _peak(
    operation: TensorOperation,
    groups: list[list[int]],
    source: SourceModel,
    recipe: ConversionRecipe,
    config: TiedMoeConfig,
) -> int:
    """Bytes of tensors in memory while the operation runs, beside the block that is being written."""
    if operation.pool < 0:
        return operation.num_bytes if len(operation.shape) <= 2 else _read_bytes(operation.target, source)
    group = groups[operation.pool]
    name = f"{source.experts[group[0]]}.{operation.parameter}"
    methods = [method for method, _ in recipe.steps]
    if recipe.residual_rank or not all(method.streams for method in methods):
        in_float32 = sum(source.tensors.meta[each].numel() * 4 for each in source.expert_names(group[0]))
        pool = operation.shape[0] / source.tensors.meta[name].shape[0] if operation.kind == "pool" else 0
        copies = [method.group_copies for method in methods if method.group_copies is not None]
        held = max(
            own * len(group) + of_pool * pool
            for own, of_pool in copies + [RESIDUAL_COPIES] * bool(recipe.residual_rank)
        )
        return (
            int(held * in_float32)
            + _scratch_bytes(recipe, group, source, config)
            + _statistics_bytes(recipe, [group], source)
        )
    if operation.kind != "pool":
        return operation.num_bytes
    adds_layers = any(method.float32_copies for method in methods)
    return _read_bytes(name, source) * (len(group) if adds_layers else 1 + _is_lossless(recipe))  # that is compared


def _scratch_bytes(recipe: ConversionRecipe, group: list[int], source: SourceModel, config: TiedMoeConfig) -> int:
    """What the recipe's methods hold beside the experts themselves, at most."""
    down = source.tensors.meta[f"{source.experts[group[0]]}.down_proj"]
    sizes = Sizes(
        num_layers=len(group),
        num_experts=len(down),
        width=down.shape[1:].numel() // config.hidden_size,
        hidden_size=config.hidden_size,
        top_k=config.experts_per_token,
        num_readers=len(group),
        num_tokens=recipe.calibration_tokens if recipe.calibration else 0,
    )
    found = []
    for method, options in recipe.steps:
        found.append(method.scratch_bytes(sizes, **{**method.options, **options}))
        if method.any_width:  # any number of slots may read a row of it
            sizes = dataclasses.replace(sizes, num_readers=len(group) * len(down))
    return max(found + [residual_scratch_bytes(sizes)] * bool(recipe.residual_rank))


def _read_bytes(name: str, source: SourceModel) -> int:
    """Bytes in memory while a block of a source tensor is read; a rule that rearranges holds all of it twice."""
    first, last = source.tensors.rows(name)[0]
    tensor = source.tensors.meta[name]
    return tensor[first:last].nbytes * (
        2 if source.tensors.units[name].converter and last - first == len(tensor) else 1
    )


def _block_bytes(operation: TensorOperation) -> int:
    """Bytes that are written while the next block is made: of an expert, or of a whole matrix."""
    return operation.num_bytes // operation.shape[0] if len(operation.shape) > 2 else operation.num_bytes


def _streamed_bytes(recipe: ConversionRecipe, source: SourceModel, bytes_before: int) -> int:
    """Weights that running the source on text holds, and the tied model beside it where the two are compared."""
    if recipe.calibration is None:
        return 0
    layers = [sum(source.tensors.meta[name].nbytes for name in source.expert_names(layer)) for layer in source.experts]
    one = held_bytes(bytes_before, bytes_before - sum(layers) + max(layers))
    return one * (2 if recipe.measure else 1)


def _statistics_bytes(recipe: ConversionRecipe, groups: list[list[int]], source: SourceModel) -> int:
    """What the layers' inputs on the calibration text take, by their shapes."""
    if recipe.calibration is None or not any(method.calibration(**options) for method, options in recipe.steps):
        return 0
    tokens = recipe.calibration_tokens * (1 + HELD_OUT_SHARE)
    config = source.model.config
    per_token = config.hidden_size * source.tensors.meta[source.expert_names(groups[0][0])[0]].dtype.itemsize
    return int(tokens * per_token * sum(map(len, groups)))


def _span(layers: list[int]) -> str:
    """Layer indices for people: "2-5", or "0, 1, 14, 15"."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))
