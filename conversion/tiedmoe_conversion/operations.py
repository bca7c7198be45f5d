"""Every tensor of the output and what it is made from: the flat list that a plan decides and a run works through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .checkpoint.writer import Planned
from .layout.keys import saved_tensors
from .layout.source_model import SourceModel
from .recipe import ConversionRecipe


@dataclass(frozen=True)
class TensorOperation(Planned):
    """How one tensor of the output is made.

    Attributes:
        kind: "copy" (bit for bit), "fuse" (transformers' own rule, e.g. one tensor per expert into one 3-D tensor),
            "pool" (the methods make it), "slot_map" or "residual" (made with the pool), "zeros" (the start of what
            soft routing learns).
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


def plan_operations(
    recipe: ConversionRecipe, groups: list[list[int]], tied: PreTrainedModel, source: SourceModel
) -> list[TensorOperation]:
    """List one operation per tensor that the tied model saves; a pool's tensors and slot maps stand together."""
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
                for layer in layers_read(recipe, group)
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
    theta = f"{tied.base_model_prefix}.expert_budget.theta"
    if theta in expected:
        operations.append(TensorOperation(theta, tuple(expected[theta].shape), torch.float32, "zeros", ()))
    planned = [operation.target for operation in operations]
    assert sorted(planned) == sorted(expected), f"not planned, or twice: {set(planned) ^ set(expected)}"
    return operations


def replaced_experts(recipe: ConversionRecipe, groups: list[list[int]], source: SourceModel) -> dict[str, str]:
    """Name the tensors of the source that a pool replaces and no method reads, each with the reason."""
    reasons = {}
    for p, group in enumerate(groups):
        for layer in set(group) - set(layers_read(recipe, group)):
            for name in source.expert_names(layer):
                keys = source.tensors.units[name].keys
                reasons.update(dict.fromkeys(keys, f"pool {p} takes the place of layer {layer}'s experts"))
    return reasons


def check_coverage(operations: Sequence[TensorOperation], replaced: Mapping[str, str], source: SourceModel) -> None:
    """Assert that every tensor of the source is used, or named as dropped: nothing is lost silently."""
    used = {key for operation in operations for key in operation.sources}
    lost = source.opened.tensors.keys() - used - replaced.keys() - source.tensors.dropped.keys()
    assert not lost, f"tensors of the source that nothing reads: {sorted(lost)[:5]}"


def layers_read(recipe: ConversionRecipe, group: Sequence[int]) -> list[int]:
    """List the layers of a group that any of the recipe's steps reads."""
    if recipe.residual_rank:
        return list(group)
    read = {layer for method, options in recipe.steps for layer in method.layers_read(group, **options)}
    return [layer for layer in group if layer in read]
