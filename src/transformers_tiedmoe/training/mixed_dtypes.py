"""Checkpoints of several dtypes: `dtype="auto"` rounds every weight to the config's, and saving would keep that.

A bfloat16 model whose routers are float32 is loaded in bfloat16 by everybody; healing trains the routers from their
float32 values and saves them in float32.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


def read_rounded(checkpoint: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """Read those tensors of `model` that the checkpoint's files hold in a wider dtype than they were loaded in.

    Only tensors stored under the model's own names are found: experts in a family's old layout are not.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    found = {}
    for file in _weight_files(checkpoint):
        with safe_open(file, "pt") as opened:
            for name in set(opened.keys()) & tensors.keys():
                if tensors[name].is_floating_point() and opened.get_slice(name).get_dtype() in ("F32", "F64"):
                    tensor = opened.get_tensor(name)
                    if tensor.dtype.itemsize > tensors[name].dtype.itemsize:
                        found[name] = tensor
    return found


@contextlib.contextmanager
def replaced(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put these tensors, in their dtypes, into `model` within the block: for saving, not for running."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    own = {name: tensors[name].data for name in values}
    try:
        for name, value in values.items():
            tensors[name].data = value.to(own[name].device)
        yield
    finally:
        for name, tensor in own.items():
            tensors[name].data = tensor


def _weight_files(checkpoint: str) -> list[str]:
    """Return the safetensors files of a folder or hub id that was loaded before; empty if it has other files."""
    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    single = cached_file(checkpoint, SAFE_WEIGHTS_NAME, **quiet)
    index = None if single else cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is None:
        return [single] if single else []
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    found = [cached_file(checkpoint, name, **quiet) for name in names]
    return [each for each in found if each is not None]
