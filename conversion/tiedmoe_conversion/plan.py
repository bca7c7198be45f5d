"""`make_plan`: what a conversion will do, tensor by tensor, from the source's config and headers alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from transformers import PreTrainedModel

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.modeling_tiedmoe import expert_layers

from .errors import ConversionError
from .families import FamilyTensors, family_model, map_tensors, read_config, saved_tensors
from .methods import METHODS, Method
from .recipe import ConversionRecipe, parse_size
from .source import open_source
from .write import Planned, check_output, into_files


@dataclass(frozen=True)
class TensorOperation(Planned):
    """How one tensor of the output is made.

    Attributes:
        kind: "copy" (bit for bit), "fuse" (transformers' own rule, e.g. one tensor per expert into one 3-D tensor),
            "pool" (the method makes it) or "slot_map" (the method makes it, too).
        sources: the source's tensors that it is made from.
        pool: the pool that it belongs to, None outside of pools.
        part: of a pool, the parameter's name; of a slot map, the layer's index; else None.
    """

    kind: str
    sources: tuple[str, ...]
    pool: int | None = None
    part: str | int | None = None


@dataclass(frozen=True)
class Plan:
    """A conversion that has been decided and not begun; `execute` runs it, `print` and rich show it.

    Attributes:
        operations: every tensor of the output, in the order of writing.
        dropped: source tensors that the output does not hold, with the reason.
        config: the output's config.
        tensors: the opened source.
    """

    recipe: ConversionRecipe
    config: TiedMoeConfig
    operations: tuple[TensorOperation, ...]
    dropped: tuple[tuple[str, str], ...]
    parameters_before: int
    parameters_after: int
    expert_parameters_before: int
    expert_parameters_after: int
    bytes_before: int
    peak_memory_bytes: int
    files: tuple[str, ...]
    tensors: FamilyTensors = field(repr=False)
    experts: Mapping[int, str] = field(repr=False)

    @property
    def method(self) -> Method:
        """The method that makes the pools."""
        return METHODS[self.recipe.method]

    @cached_property
    def bytes_after(self) -> int:
        """Bytes of the output's weights."""
        return sum(operation.num_bytes for operation in self.operations)

    def summary(self) -> dict[str, Any]:
        """The plan as JSON-able values; bytes are of tensors, without headers and small files."""
        return {
            "source": self.recipe.source,
            "revision": self.tensors.source.commit,
            "output": self.recipe.output,
            "family": self.config.family,
            "method": self.recipe.method,
            "method_options": dict(self.recipe.method_options),
            "groups": [list(group) for group in self.config.groups],
            "pool_num_experts": list(self.config.pool_num_experts),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "expert_parameters_before": self.expert_parameters_before,
            "expert_parameters_after": self.expert_parameters_after,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "peak_memory_bytes": self.peak_memory_bytes,
            "tensors": len(self.operations),
            "shards": len({operation.file for operation in self.operations}),
            "files": list(self.files),
            "dropped": [{"tensor": name, "reason": reason} for name, reason in self.dropped],
        }

    def __rich__(self) -> RenderableType:
        recipe = self.recipe
        pools = Table("pool", "layers", "experts", "made by", "bytes", box=box.SIMPLE_HEAD)
        for p, (group, width) in enumerate(zip(self.config.groups, self.config.pool_num_experts)):
            size = sum(operation.num_bytes for operation in self.operations if operation.pool == p)
            pools.add_row(str(p), _span(group), str(width), recipe.method, decimal(size))
        totals = Table("", "before", "after", "left", box=box.SIMPLE_HEAD)
        for label, before, after, show in (
            ("parameters", self.parameters_before, self.parameters_after, "{:,}".format),
            ("of these in experts", self.expert_parameters_before, self.expert_parameters_after, "{:,}".format),
            ("weights on disk", self.bytes_before, self.bytes_after, decimal),
        ):
            totals.add_row(label, show(before), show(after), f"{after / before:.1%}")
        untied = [layer for layer in self.experts if self.config.group_of(layer) is None]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped:
            reasons.setdefault(reason, []).append(name)
        return Group(
            f"[bold]{recipe.source}[/] ({self.config.family}) -> [bold]{recipe.output}[/]",
            pools,
            f"layers that keep their own experts: {_span(untied) if untied else 'none'}",
            totals,
            f"{len(self.operations)} tensors in {len({operation.file for operation in self.operations})} weight "
            f"file(s); at most {decimal(self.peak_memory_bytes)} of tensors in memory at a time",
            f"files that travel along: {', '.join(self.files) or 'none'}",
            *(f"dropped: {len(names)} tensor(s), such as {names[0]}: {reason}" for reason, names in reasons.items()),
        )

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def make_plan(recipe: ConversionRecipe) -> Plan:
    """Decide a conversion from the source's config and headers; reads no tensor and writes nothing.

    Raises:
        ValueError: whatever is wrong with the recipe, the source or the two together, and what to do about it.
    """
    check_output(recipe.output)
    source = open_source(recipe.source, recipe.revision, recipe.allow_pickle)
    family_config = read_config(source)
    model = family_model(family_config)
    experts = expert_layers(model)
    method = METHODS[recipe.method]
    tying = {"groups": None if recipe.groups is None else [list(group) for group in recipe.groups]}
    numbers = {"group_size": recipe.group_size, "skip_first": recipe.skip_first, "skip_last": recipe.skip_last}
    groups = TiedMoeConfig.from_family(family_config, **numbers, **tying).groups
    if not groups:
        raise ConversionError(
            f"nothing to tie: {source.name} has {len(experts)} layers with experts, and skip_first={recipe.skip_first} "
            f"and skip_last={recipe.skip_last} leave none; lower them, or name groups"
        )
    for group in groups:
        method.layers_read(group, **recipe.method_options)  # refuses a bad option before anything else is looked at

    tensors = map_tensors(source, model)
    names = {layer: _names_below(path, tensors.meta) for layer, path in experts.items()}
    _check_alike(groups, experts, names, tensors)
    _check_shapes(model, tensors)
    num_experts = {tensors.meta[name].shape[0] for layer in names for name in names[layer]}
    assert len(num_experts) == 1, f"experts with {num_experts} rows"  # from one number of the config, checked above
    (num_experts,) = num_experts
    config = TiedMoeConfig.from_family(
        family_config,
        **numbers,
        groups=groups,
        pool_num_experts=[method.pool_num_experts(num_experts, len(group)) for group in groups],
        slot_maps=method.slot_maps,
    )
    config.architectures = ["TiedMoeForCausalLM"]
    tied = family_model(config)
    operations, dropped = _operations(recipe, config, tied, tensors, experts)
    expert_names = {name for layer in names for name in names[layer]}
    pools = [operation for operation in operations if operation.kind == "pool"]
    untied = [operation for operation in operations if operation.target in expert_names]
    dropped_bytes = sum(source.tensors[name].num_bytes for name in tensors.dropped)
    return Plan(
        recipe=recipe,
        config=config,
        operations=into_files(operations, parse_size(recipe.max_shard_size)),
        dropped=tuple(sorted({**tensors.dropped, **dropped}.items())),
        parameters_before=model.num_parameters(),
        parameters_after=tied.num_parameters(),
        expert_parameters_before=sum(tensors.meta[name].numel() for name in expert_names),
        expert_parameters_after=sum(math.prod(operation.shape) for operation in pools + untied),
        bytes_before=sum(info.num_bytes for info in source.tensors.values()) - dropped_bytes,
        peak_memory_bytes=max(_peak(operation, config, tensors, experts, method) for operation in operations),
        files=tuple(source.travelling_files()),
        tensors=tensors,
        experts=experts,
    )


def _span(layers: list[int]) -> str:
    """Layer indices for people: "2-5", or "0, 1, 14, 15"."""
    if len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def _names_below(path: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{path}.")]


def _check_alike(
    groups: list[list[int]], experts: Mapping[int, str], names: Mapping[int, list[str]], tensors: FamilyTensors
) -> None:
    """Raise unless the layers of every group have experts of the same parameters, shapes and dtypes."""
    for p, group in enumerate(groups):
        found = {}
        for layer in group:
            start = len(experts[layer]) + 1
            found[layer] = {
                name[
                    start:
                ]: f"{list(tensors.meta[name].shape)} {str(tensors.meta[name].dtype).removeprefix('torch.')}"
                for name in names[layer]
            }
        for layer in group[1:]:
            if found[layer] != found[group[0]]:
                raise ConversionError(
                    f"group {p} ties layers {group[0]} and {layer}, whose experts differ: layer {group[0]} has "
                    f"{found[group[0]]}, layer {layer} has {found[layer]}; a pool needs equal ones: put the layers into "
                    "different groups, or leave one untied"
                )


def _check_shapes(model: PreTrainedModel, tensors: FamilyTensors) -> None:
    """Raise unless every tensor of the source has the shape that its config gives it."""
    for name, expected in saved_tensors(model).items():
        if tensors.meta[name].shape != expected.shape:
            raise ConversionError(
                f"{tensors.source.name}: {name} has shape {list(tensors.meta[name].shape)} by the weights and "
                f"{list(expected.shape)} by config.json; expected the same: use the config.json that belongs to the weights"
            )


def _operations(
    recipe: ConversionRecipe,
    config: TiedMoeConfig,
    tied: PreTrainedModel,
    tensors: FamilyTensors,
    experts: Mapping[int, str],
) -> tuple[list[TensorOperation], dict[str, str]]:
    """Every tensor that the tied model saves, and the source tensors that a pool replaces without reading them."""
    method = METHODS[recipe.method]
    expected = saved_tensors(tied)
    kept, pooled, maps, dropped = [], [], [], {}
    for name in expected:
        if name in tensors.units:
            kind = "copy" if tensors.units[name].converter is None else "fuse"
            shape, dtype = tuple(tensors.meta[name].shape), tensors.meta[name].dtype
            kept.append(TensorOperation(name, shape, dtype, kind, tensors.units[name].keys))
    for p, group in enumerate(config.groups):
        prefix = f"{tied.base_model_prefix}.expert_pools.{p}."
        read = method.layers_read(group, **recipe.method_options)
        for target in _names_below(prefix[:-1], expected):
            part = target.removeprefix(prefix)
            units = {layer: tensors.units[f"{experts[layer]}.{part}"] for layer in group}
            sources = tuple(key for layer in read for key in units[layer].keys)
            dtype = tensors.meta[f"{experts[group[0]]}.{part}"].dtype
            pooled.append(TensorOperation(target, tuple(expected[target].shape), dtype, "pool", sources, p, part))
            for layer in set(group) - set(read):
                dropped.update(dict.fromkeys(units[layer].keys, f"replaced by pool {p}, which is made without it"))
        if config.slot_maps[p]:
            for layer in group:
                name = f"{experts[layer]}.slot_map"
                shape = tuple(expected[name].shape)
                maps.append(TensorOperation(name, shape, torch.int64, "slot_map", (), p, layer))
    operations = [*kept, *(o for p in range(len(config.groups)) for o in pooled + maps if o.pool == p)]
    planned, used = [operation.target for operation in operations], {k for o in operations for k in o.sources}
    assert sorted(planned) == sorted(expected), f"not planned: {expected.keys() - planned}"
    accounted = used | dropped.keys() | tensors.dropped.keys()
    assert accounted == tensors.source.tensors.keys(), f"lost: {tensors.source.tensors.keys() - accounted}"
    return operations, dropped


def _peak(
    operation: TensorOperation,
    config: TiedMoeConfig,
    tensors: FamilyTensors,
    experts: Mapping[int, str],
    method: Method,
) -> int:
    """Bytes of tensors in memory while the operation runs; a rule that fuses holds its inputs beside its output."""
    if operation.kind != "pool":
        return operation.num_bytes * (2 if operation.kind == "fuse" else 1)
    name = f"{experts[config.groups[operation.pool][0]]}.{operation.part}"
    layer = tensors.meta[name]
    read = layer.nbytes * (1 if tensors.units[name].converter is None else 2)
    return read + method.float32_copies * layer.numel() * 4
