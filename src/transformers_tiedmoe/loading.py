"""Checks of a tied checkpoint, before its weights are loaded and after.

config.json and the headers of the weight files are untrusted: memory is allocated only for what both agree on.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .errors import TiedMoeError
from .families import is_experts

logger = logging.get_logger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BUDGET = "expert_budget.theta"  # of a base model, `routing.softmoe.ExpertBudget`
INDICES = (torch.int64, torch.int32)  # torch reads uint8 and bool as masks
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Headers = Mapping[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name; a str is a dtype that torch lacks


class MismatchedCheckpoint(TiedMoeError, RuntimeError):
    """config.json contradicts the headers; also a `RuntimeError`, as transformers raises for a wrong shape."""


def read_headers(files: Iterable[str | Path]) -> Headers:
    """Read shape and dtype of every tensor in safetensors `files`; no weight is read."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
    return found


def check_num_layers(num_hidden_layers: object, num_tensors: int, name: str) -> None:
    """Raise `TiedMoeError` if config.json claims more layers than the files of `name` hold tensors."""
    if type(num_hidden_layers) is not int or not 0 < num_hidden_layers <= num_tensors:
        raise MismatchedCheckpoint(
            f"{name} has num_hidden_layers={short_repr(num_hidden_layers)} by config.json and {num_tensors} tensors; "
            "expected a layer to have one at least: use the config.json that belongs to the weights"
        )


def check_headers(
    model: PreTrainedModel, headers: Headers, name: str, is_quantised: bool = False, is_complete: bool = True
) -> None:
    """Check a tied `model`, on the meta device, against the headers of the checkpoint that it is loaded from.

    Args:
        model: of config.json, a base model or a head on it.
        headers: of all files.
        name: the folder, for errors.
        is_quantised: the files hold quantised weights, whose shapes and dtypes are not checked.
        is_complete: `headers` are of a whole checkpoint, not of a state dict that leaves weights to be initialised.

    Raises:
        TiedMoeError: another shape, a pool that is not of floats, a slot map that is not of integers, a layer without
            a tensor, or a base model with more elements than the files hold.
    """
    prefix = f"{model.base_model_prefix}."
    stored = {key.removeprefix(prefix): entry for key, entry in headers.items()}
    wanted = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items()}
    if BUDGET in stored:
        _check_budget(model.config, stored[BUDGET][0], name)
    for key, tensor in wanted.items():
        if key not in stored:
            continue  # stored under an older name of the family's, or reported as missing by transformers
        shape, dtype = stored[key]
        is_pool, is_slot_map = key.startswith("expert_pools."), key.endswith(".slot_map")
        if is_slot_map and dtype not in INDICES:
            raise MismatchedCheckpoint(_wrong_dtype(name, key, dtype, INDICES))
        if is_quantised:
            continue
        if is_pool and dtype not in FLOATS:
            raise MismatchedCheckpoint(_wrong_dtype(name, key, dtype, FLOATS))
        if shape != tuple(tensor.shape):
            raise MismatchedCheckpoint(
                f"{name}: {key} has the shape {list(shape)} in the files and {list(tensor.shape)} by config.json; "
                "expected the same: use the config.json that belongs to the weights"
            )
    if not is_complete:
        return
    if absent := _layers(wanted) - _layers(stored):
        raise MismatchedCheckpoint(
            f"{name} has num_hidden_layers={model.config.num_hidden_layers} by config.json, and the files hold "
            f"nothing of layer {min(absent)}; expected every layer: use the config.json that belongs to the weights"
        )
    claimed = sum(tensor.numel() for tensor in model.base_model.state_dict().values())
    held = sum(torch.Size(shape).numel() for shape, _ in headers.values())
    if claimed > held and not is_quantised:
        raise MismatchedCheckpoint(
            f"{name}: a model of config.json has {claimed:,} elements without its head, and the files hold {held:,}; "
            "expected as many at least: use the config.json that belongs to the weights"
        )


def _check_budget(config: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise if the files hold learned shares of the budget, and config.json neither uses nor replaces them."""
    soft = getattr(config, "softmoe", None)
    if soft is None or soft["learn_budget"] or soft["layers"] is not None:
        return
    even = [soft["budget"] / shape[0]] * shape[0] if len(shape) == 1 and shape[0] else []
    raise MismatchedCheckpoint(
        f"{name}: config.json's softmoe has learn_budget=false, and the files hold the shares of the budget that the "
        f"layers have learned ({BUDGET}); expected one of them: set learn_budget to true, which keeps them, or layers "
        f"to the numbers of experts that are to replace them, such as {short_repr(even)}"
    )


def _layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(r"layers\.(\d+)\.", name))}


def check_dtype(dtype: torch.dtype | None, headers: Headers, name: str) -> None:
    """Raise `TiedMoeError` if config.json says float64, which doubles the memory, and no tensor of the files is."""
    if dtype == torch.float64 and all(found != torch.float64 for _, found in headers.values()):
        raise MismatchedCheckpoint(
            f"{name} is of dtype float64 by config.json, and none of its tensors is; expected the files' own: use the "
            "config.json that belongs to the weights, or dtype: null"
        )


def check_folder(folder: str | Path, config: PreTrainedConfig) -> None:
    """Check the `config` of a tied checkpoint against the safetensors headers in its local `folder`.

    A hub id or an untied checkpoint is not checked.

    Raises:
        TiedMoeError: see `check_headers`.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files or config.model_type != "tiedmoe":
        return
    headers = read_headers(files)
    check_num_layers(config.num_hidden_layers, len(headers), str(folder))
    check_dtype(config.dtype, headers, str(folder))
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        model = AutoModelForCausalLM.from_config(config)
    check_headers(model, headers, str(folder), bool(getattr(config, "quantization_config", None)))


def check_slot_map(slot_map: torch.Tensor, pool_index: int, pool_size: int) -> None:
    """Raise `TiedMoeError` unless the real tensor `slot_map [E]` holds integers from 0 to `pool_size` - 1.

    Waits for the device if the slot map is on a GPU.
    """
    if slot_map.dtype not in INDICES:
        raise TiedMoeError(
            _wrong_dtype("the checkpoint", f"a slot map into pool {pool_index}", slot_map.dtype, INDICES)
        )
    low, high = (int(bound) for bound in slot_map.aminmax())
    if low < 0 or high >= pool_size:
        raise TiedMoeError(
            f"a slot map names row {low if low < 0 else high} of pool {pool_index}, which has {pool_size} experts; "
            f"expected 0 to {pool_size - 1}: the checkpoint is damaged, load the one that was converted or convert "
            "again"
        )


def check_pool(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `TiedMoeError` if a pool's weight has an integer dtype; not meant for quantised weights."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TiedMoeError(_wrong_dtype("the checkpoint", f"{name} of a pool", tensor.dtype, FLOATS))


def say_what_is_unquantised(model: PreTrainedModel) -> None:
    """Warn if a quantiser left expert weights unquantised: most quantisers handle `nn.Linear` only."""
    experts = [module for module in model.modules() if is_experts(module)]
    # A quantised weight is of its quantiser's class, of integers or of one byte.
    left = sum(
        weight.numel()
        for module in experts
        for weight in module.parameters(recurse=False)
        if type(weight) is nn.Parameter and weight.dtype in FLOATS
    )
    if left:
        everything = model.num_parameters()
        logger.warning_once(
            f"{left / everything:.0%} of the weights are left unquantised: {left:,} of {everything:,} are experts, in "
            f"pools and untied layers, which quantisation by {_quantiser(model)} does not know. They take as much "
            "memory as before."
        )


def _quantiser(model: PreTrainedModel) -> str:
    method = getattr(model, "quantization_method", None) or "this method"
    return str(getattr(method, "value", method))


def _wrong_dtype(name: str, what: str, found: object, expected: tuple[torch.dtype, ...]) -> str:
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in expected)
    return (
        f"{name}: {what} is of dtype {str(found).removeprefix('torch.')}; expected one of {names}: the checkpoint is "
        "damaged, load the one that was converted or convert again"
    )
