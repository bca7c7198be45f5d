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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import PreTrainedModel
from transformers.training_args import ParallelMode

from ..errors import TiedMoeError

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
            args.lora,
            "FSDP with lora, which adds to weights that are in pieces then",
            "use DDP (--multi_gpu), where frozen weights need no gradients and no optimizer states",
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


def read_shards(checkpoint: Path, model: PreTrainedModel) -> None:
    """Read the weights of a checkpoint in shards into a whole `model`, in this process alone."""
    load({"model": model.state_dict()}, storage_reader=FileSystemReader(checkpoint / SHARDS), no_dist=True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Tell whether FSDP2 has sharded `model`."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def round_shards(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round every weight of a sharded `model` to what a dtype can hold, by name; all stay as wide as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what FSDP2 has kept whole since the last forward is a copy
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(local.to(dtypes[name]))


def collect(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the whole weights of a sharded `model` on the first process's CPU; all processes have to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]  # tensors, without extra state
