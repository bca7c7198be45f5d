"""`untie`: a tied checkpoint back into the family's own, under the names that the Hub knows (one tensor per expert).

Every layer gets its own copy of its pool's rows, through its slot map, plus its residual if it has one, so that
transformers, vLLM and other readers of the family load it. It works rule by rule: one layer's projection is in memory
at a time. Soft routing becomes a fixed top-k; see `baking.py`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_NAME, PreTrainedConfig

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.families import expert_layers
from transformers_tiedmoe.output_place import check_output
from transformers_tiedmoe.workdir import open_work

from .baking import bake
from .checkpoint.reader import Source, open_source
from .checkpoint.writer import Planned, Progress, check_space, into_files, write_weights
from .errors import ConversionError
from .layout.keys import Unit, hub_units, map_tensors, saved_tensors
from .layout.source_model import family_model, read_tied_config
from .layout.tied_view import LayerTensors
from .provenance import identity
from .recipe_types import parse_size
from .verify import verify_output

# Families whose layer types have other names since transformers 5, which still reads the older ones.
OLDER_LAYER_TYPES = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}


@dataclass(frozen=True)
class _Untied(Planned):
    """A tensor of the output and the unit that makes it, from state-dict tensors of the family."""

    unit: Unit


def untie(
    source: str | Path,
    output: str | Path,
    max_shard_size: str | int = "5GB",
    progress: Progress | None = None,
    top_k: int | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Turn a tiedmoe checkpoint into the family's own; the output appears complete and verified or not at all.

    A run that was killed, or stopped by Ctrl-C, is continued by the next one with the same arguments.

    Args:
        source: a local folder or hub id of a tiedmoe checkpoint.
        output: a new or empty folder.
        max_shard_size: as in `ConversionRecipe`.
        progress: called as `progress(done_bytes, total_bytes, what)`.
        top_k, data: of a checkpoint that is routed softly: experts per token of the output, and text to measure the
            cost on; see `baking.bake`.

    Returns:
        A JSON-able report: family, parameters and bytes before and after, verification, the weight files with their
        hash, and how many of them an earlier run had finished; `baked` if routing was soft.

    Raises:
        ConversionError: no tiedmoe checkpoint, layers of several widths (which no family's config expresses), soft
            routing without what `baking.bake` needs, or whatever is wrong with the source or the output as in a
            conversion.
    """
    folder = check_output(output, {"source": source, "text": data})
    shard_size = parse_size(max_shard_size)
    opened = open_source(str(source))
    config = read_tied_config(opened)
    family_config = _family_config(config, opened)
    if (baked := bake(opened, config, top_k, data)) is not None:
        setattr(family_config, config.top_k_field, baked["top_k"])
    tied, model = family_model(config), family_model(family_config)
    tensors = map_tensors(opened, tied, rules=model)
    reader = LayerTensors(config, tensors, expert_layers(model), tied.base_model_prefix)
    names = saved_tensors(model)
    meta = {name: reader.meta(name) for name in names}
    wrong = [name for name in names if meta[name].shape != names[name].shape]
    assert not wrong, f"untied shapes differ from the family's: {wrong[:3]}"
    planned = [
        _Untied(target, tuple(tensor.shape), tensor.dtype, unit)
        for unit in hub_units(model, names)
        for target, tensor in unit.convert(meta.__getitem__).items()
    ]
    operations = into_files(planned, shard_size)
    num_bytes = sum(operation.num_bytes for operation in operations)
    check_space(folder, num_bytes)
    family_config.architectures = [type(model).__name__]
    options = {"max_shard_size": shard_size} | ({} if baked is None else {"top_k": baked["top_k"]})
    made = identity("untie", options, opened, operations)
    with open_work(folder, made) as work:
        if work.report is None:
            with work.draft() as draft:
                save_family_config(family_config, draft)
                opened.copy_travelling_files(draft)
            write_weights(work, operations, _Maker(reader).make, progress)
            if progress:
                progress(num_bytes, num_bytes, "verifying")
            work.complete({"verification": verify_output(work.folder, operations)})
    assert work.report is not None
    return {
        "source": str(source),
        "output": str(output),
        "family": config.family,
        "parameters_before": tied.num_parameters(),
        "parameters_after": model.num_parameters(),
        "bytes_before": sum(info.num_bytes for info in opened.tensors.values()),
        "bytes_after": num_bytes,
        "tensors": len(operations),
        **({} if baked is None else {"baked": baked}),
        "files": {operation.file: work.files[operation.file] for operation in operations},
        "resumed_files": work.num_resumed,
        **work.report,
    }


class _Maker:
    """Makes the outputs of one unit after the other; keeps those of one unit until they are written."""

    def __init__(self, reader: LayerTensors):
        self.reader = reader
        self._made: dict[str, torch.Tensor] = {}

    def make(self, operation: _Untied) -> Iterator[torch.Tensor]:
        """Return the operation's tensor."""
        if operation.target not in self._made:
            self._made = {}
            self._made = operation.unit.convert(self.reader.read)
        yield self._made.pop(operation.target)


def save_family_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write a family's config.json for every reader: with transformers 5's names of the fields and the older ones."""
    config.save_pretrained(folder)
    path = folder / CONFIG_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, **older_fields(config)}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that transformers 5 renamed, under their names in transformers 4, vLLM and llama.cpp.

    Those readers take a default for a field that is missing: without `rope_theta` they would silently run another
    model. Families with rotary embeddings of several kinds have no older name for them, and no older reader.

    Returns:
        `rope_theta`, `rope_scaling` (None if not scaled) and `partial_rotary_factor`, of `rope_parameters`;
        `num_experts` of a family that calls it `num_local_experts` now; `layer_types` in the words of before, which
        transformers 5 reads too; `torch_dtype`. Each if the family has it.
    """
    fields: dict[str, Any] = {}
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        scaling = dict(rope)
        fields.update({name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in scaling})
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
        if rope["rope_type"] == "longrope" and "original_max_position_embeddings" in rope:
            fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if config.attribute_map.get("num_experts") == "num_local_experts":
        fields["num_experts"] = config.num_local_experts
    if config.model_type in OLDER_LAYER_TYPES:
        words = OLDER_LAYER_TYPES[config.model_type]
        fields["layer_types"] = [words.get(layer_type, layer_type) for layer_type in config.layer_types]
    if config.dtype is not None:
        fields["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return fields


def _family_config(config: TiedMoeConfig, source: Source) -> PreTrainedConfig:
    """Return the family's own config; its number of experts is the width of every layer's router."""
    if config.tied_components != ["experts"]:
        raise ConversionError(
            f"{source.name} shares {config.tied_components}, and only experts can be untied; keep using it as tiedmoe"
        )
    family_config, field = config.to_family(), config.num_experts_field
    widths = {layer: getattr(config, field) for layer in expert_layers(family_model(family_config))}
    pools = zip(config.groups, config.pool_num_experts, config.slot_maps)  # type: ignore[arg-type]  # resolved to lists
    for group, width, has_slot_map in pools:
        if not has_slot_map:  # the routers of these layers follow the pool
            widths.update(dict.fromkeys(group, width))
    if len(set(widths.values())) > 1:
        raise ConversionError(
            f"{source.name} has layers of several router widths {widths}, and a {config.family!r} config knows one "
            "number of experts for all layers; such a model cannot be untied: keep using it as tiedmoe"
        )
    setattr(family_config, field, next(iter(widths.values())))
    return family_config
