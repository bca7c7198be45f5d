"""The peak-memory model: what tensors a conversion holds at a time, from shapes alone."""

import dataclasses
from collections.abc import Sequence

from transformers_tiedmoe import TiedMoeConfig

from .calibration.streamed_model import held_bytes
from .calibration.text import HELD_OUT_SHARE
from .checkpoint.quantised import Quantised
from .layout.source_model import SourceModel
from .methods import Sizes
from .methods.residual import scratch_bytes as residual_scratch_bytes
from .operations import TensorOperation
from .recipe import ConversionRecipe
from .verify import MAX_BYTES_FOR_LOGITS

RESIDUAL_COPIES = (1, 1)  # of a group's experts and its pool's in float32, while residuals are made


def peak_memory_bytes(
    recipe: ConversionRecipe,
    groups: list[list[int]],
    source: SourceModel,
    config: TiedMoeConfig,
    operations: Sequence[TensorOperation],
) -> int:
    """Estimate the most bytes of tensors that a conversion holds at a time, without Python and torch themselves."""
    peaks = [_peak(operation, groups, source, recipe, config) for operation in operations]
    peaks += [2 * source.tensors.meta[name].nbytes for name in source.tensors.copies]  # the two are compared
    if recipe.is_lossless and source.bytes_as_read <= MAX_BYTES_FOR_LOGITS:
        peaks.append(sum(operation.num_bytes for operation in operations))  # the verification loads the output
    reading = [info.scratch_bytes for info in source.opened.tensors.values() if isinstance(info, Quantised)]
    held = max(peaks) + max(map(_block_bytes, operations)) + _streamed_bytes(recipe, source)
    return held + max(reading, default=0)


def statistics_bytes(recipe: ConversionRecipe, groups: list[list[int]], source: SourceModel) -> int:
    """Return what the layers' inputs on the calibration text take on the disk, by their shapes."""
    if recipe.calibration is None or not any(method.calibration(**options) for method, options in recipe.steps):
        return 0
    tokens = recipe.calibration_tokens * (1 + HELD_OUT_SHARE)
    config = source.model.config
    per_token = config.hidden_size * source.tensors.meta[source.expert_names(groups[0][0])[0]].dtype.itemsize
    return int(tokens * per_token * sum(map(len, groups)))


def _peak(
    operation: TensorOperation,
    groups: list[list[int]],
    source: SourceModel,
    recipe: ConversionRecipe,
    config: TiedMoeConfig,
) -> int:
    """Return the bytes of tensors in memory while the operation runs, beside the block that is being written."""
    if operation.pool < 0:
        return operation.num_bytes if len(operation.shape) <= 2 else _read_bytes(operation.target, source)
    group = groups[operation.pool]
    name = f"{source.experts[group[0]]}.{operation.parameter}"
    methods = [method for method, _ in recipe.steps]
    if recipe.residual_rank or not all(method.streams for method in methods):
        in_float32 = sum(source.tensors.meta[each].numel() * 4 for each in source.expert_names(group[0]))
        pool = operation.shape[0] / source.tensors.meta[name].shape[0] if operation.kind == "pool" else 0
        copies = [method.memory.group_copies for method in methods if not method.streams]
        held = max(
            own * len(group) + of_pool * pool
            for own, of_pool in copies + [RESIDUAL_COPIES] * bool(recipe.residual_rank)
        )
        return (
            int(held * in_float32)
            + _scratch_bytes(recipe, group, source, config)
            + statistics_bytes(recipe, [group], source)
        )
    if operation.kind != "pool":
        return operation.num_bytes
    adds_layers = any(method.memory.float32_layers for method in methods)
    return _read_bytes(name, source) * (len(group) if adds_layers else 1 + recipe.is_lossless)  # that is compared


def _scratch_bytes(recipe: ConversionRecipe, group: list[int], source: SourceModel, config: TiedMoeConfig) -> int:
    """Return the bytes that the recipe's methods hold beside the experts themselves, at most."""
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
        found.append(method.memory.scratch_bytes(sizes, **{**method.options, **options}))
        if method.any_width:  # any number of slots may read a row of it
            sizes = dataclasses.replace(sizes, num_readers=len(group) * len(down))
    return max(found + [residual_scratch_bytes(sizes)] * bool(recipe.residual_rank))


def _read_bytes(name: str, source: SourceModel) -> int:
    """Return the bytes in memory while a block is read; a rule that rearranges a tensor holds all of it twice."""
    first, last = source.tensors.rows(name)[0]
    tensor = source.tensors.meta[name]
    return tensor[first:last].nbytes * (
        2 if source.tensors.units[name].converter and last - first == len(tensor) else 1
    )


def _block_bytes(operation: TensorOperation) -> int:
    """Return the bytes that are written while the next block is made: of an expert, or of a whole matrix."""
    return operation.num_bytes // operation.shape[0] if len(operation.shape) > 2 else operation.num_bytes


def _streamed_bytes(recipe: ConversionRecipe, source: SourceModel) -> int:
    """Return the weights held while the source runs on text, with the tied model's where the two are compared."""
    if recipe.calibration is None:
        return 0
    layers = [sum(source.tensors.meta[name].nbytes for name in source.expert_names(layer)) for layer in source.experts]
    one = held_bytes(source.bytes_as_read, source.bytes_as_read - sum(layers) + max(layers))
    return one * (2 if recipe.measure else 1)
