"""Healing under accelerate's FSDP2: what is refused, and how sharded weights are read, rounded and collected.

Trainer writes checkpoints by shards or whole, as `fsdp_state_dict_type` says; the finished model is always whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel
from transformers.training_args import ParallelMode

from ..errors import TiedMoeError
from .lora import without_adapters

SHARDS, WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"  # what accelerate writes into a checkpoint


def fsdp_plugin(args: Any) -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP settings of Trainer's arguments, or those that `accelerate launch` put into the environment.

    Raises:
        TiedMoeError: settings that healing does not support.
    """
    given = getattr(args, "fsdp_plugin_args", None)
    if not given and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin(**(given or {}))
    for is_wrong, found, instead in (
        (plugin.fsdp_version != 2, "FSDP1, which flattens a pool together with others", "set fsdp_version: 2"),
        (
            plugin.auto_wrap_policy is not transformer_auto_wrap_policy,
            "FSDP without a unit for each layer and pool",
            "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        ),
        (
            plugin.activation_checkpointing,
            "FSDP's own checkpointing, which would compute a pool twice again",
            "set fsdp_activation_checkpointing: false and give gradient_checkpointing",
        ),
        (
            plugin.cpu_ram_efficient_loading,
            "loading in one process alone, but the others check the weights, too",
            "set fsdp_cpu_ram_efficient_loading: false",
        ),
        (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "FSDP's CPU offload, which was never tried with it: torch has it only where there is a GPU",
            "set fsdp_offload_params: false; more processes, lora and gradient_checkpointing take less memory",
        ),
        (
            args.parallel_mode != ParallelMode.DISTRIBUTED,
            "FSDP in one process",
            "start several by `accelerate launch --num_processes N`, or leave FSDP out",
        ),
    ):
        if is_wrong:
            raise TiedMoeError(f"healing was told to use {found}; {instead}")
    return plugin


def check_units(model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise `TiedMoeError` if layers or pools of `model` would be no units of their own."""
    names = plugin.transformer_cls_names_to_wrap
    if names and (missing := sorted({*(model._no_split_modules or ())} - {*names})):
        raise TiedMoeError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(names)} and not {', '.join(missing)}, which every "
            "process would hold whole all the time; leave the setting out: the model names its layers and pools itself"
        )


def check_enabled(trainer: Any) -> None:
    """Raise `TiedMoeError` if accelerate does not shard although it was told to: it says nothing of that itself."""
    if not trainer.is_fsdp_enabled:
        raise TiedMoeError(
            f"accelerate does not shard weights on {trainer.args.device}, but on GPUs and their like; leave FSDP out, "
            "and every process holds them whole"
        )


def check_checkpoint(checkpoint: Path, is_sharded: bool) -> None:
    """Raise `TiedMoeError` if `checkpoint` was written under FSDP and the run that goes on is not, or the reverse."""
    was_sharded = (checkpoint / SHARDS).is_dir() or (checkpoint / WHOLE).is_file()
    if was_sharded != is_sharded:
        raise TiedMoeError(
            f"{checkpoint} was written {'under' if was_sharded else 'without'} FSDP, and this run is "
            f"{'under' if is_sharded else 'without'} it; go on as it was begun, or give another output"
        )


def read_shards(checkpoint: Path, model: torch.nn.Module) -> None:
    """Read a checkpoint in shards into a whole `model`, of a peft model its adapters, in this process alone."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(model)
    else:
        weights = model.state_dict()
    load({"model": weights}, storage_reader=FileSystemReader(checkpoint / SHARDS), no_dist=True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Tell whether FSDP2 has sharded `model`."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def round_shards(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round every weight of a sharded `model` to what a dtype can hold, by name; all stay as wide as they are."""
    _reshard(model)
    for name, parameter in without_adapters(dict(model.named_parameters())).items():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(local.to(dtypes[name]))


@torch.no_grad()
def merge_adapters(model: torch.nn.Module) -> None:
    """Merge the adapters of a sharded peft `model` by peft's own code, one adapted module whole at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    _reshard(model)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        own = [layer.get_base_layer(), *layer.lora_A.values(), *layer.lora_B.values()]
        shards = [(module, name, each) for module in own for name, each in module.named_parameters(recurse=False)]
        for module, name, shard in shards:
            module._parameters[name] = torch.nn.Parameter(shard.full_tensor(), requires_grad=False)
        layer.merge()
        for module, name, shard in shards:
            whole = module._parameters[name].data
            merged = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
            shard.to_local().copy_(merged.to_local())
            module._parameters[name] = shard


def collect(model: torch.nn.Module, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Return the whole weights of a sharded `model` on the first process's CPU; all processes have to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]  # tensors, without extra state


def _reshard(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what FSDP2 has kept whole since the last forward is a copy
