"""Load config, weights and tokenizer of a checkpoint: nothing is missing, and no code of its own is run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..auto_files import load_tokenizer
from ..errors import TiedMoeError, reading
from ..files import misplaced
from ..loading import check_folder
from .data import perplexity


def load_config(model: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a config; without `trust_remote_code` no code or kernel that the checkpoint names is loaded.

    Raises:
        TiedMoeError: there is no such folder, its config cannot be read, or it names kernels of the Hub.
    """
    if (why := misplaced(model)) is not None:
        raise TiedMoeError(why)
    with reading(f"the config of {model}"):
        try:
            fields, _ = PreTrainedConfig.get_config_dict(model)
        except OSError as error:
            if not Path(model).is_dir():
                raise  # of the Hub
            raise TiedMoeError(f"{error} Expected a complete checkpoint as transformers saves it") from error
        if not isinstance(fields, Mapping):
            raise TypeError(f"config.json holds a {type(fields).__name__} and no object")
    named = str(fields.get("_attn_implementation") or fields.get("attn_implementation") or "")
    if "/" in named and not trust_remote_code:
        raise TiedMoeError(
            f"{model} asks for the attention kernels {named}, which would be code of its choosing; expected none: "
            "remove it from config.json, or trust the checkpoint (trust_remote_code)"
        )
    with reading(f"the config of {model}"):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        check_folder(model, config)
        return config


def load_model(path: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Load a causal language model of which every weight is in the checkpoint.

    Args:
        path: folder or hub id.
        trust_remote_code: whether code that the checkpoint names may run.
        options: of `from_pretrained`, such as `device_map`; `dtype` is what the files say.

    Raises:
        TiedMoeError: weights are missing or of another shape.
    """
    options = {"dtype": "auto", "output_loading_info": True, **options}
    with reading(f"the model {path}"):
        model, loading = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    lacking = sorted(loading["missing_keys"]) + sorted(map(str, loading["mismatched_keys"]))
    if lacking:
        raise TiedMoeError(
            f"{path} lacks {len(lacking)} weights of {type(model).__name__}, first {lacking[0]}; "
            "they would be drawn at random: give a complete checkpoint of a causal language model"
        )
    return model


def sample_loss(model: PreTrainedModel, validation: datasets.Dataset, args: Any) -> float:
    """Compute the loss of `model` on one batch of held-out blocks."""
    rows = validation.select(range(min(len(validation), args.per_device_eval_batch_size)))
    return float(perplexity(model, rows, args.per_device_eval_batch_size)["loss"])


def check_saved(
    folder: Path,
    model: PreTrainedModel,
    validation: datasets.Dataset,
    args: Any,
    whole: tuple[Mapping[str, torch.Tensor], float, torch.dtype | None] | None = None,
) -> None:
    """Load the saved model with the Auto class; raise unless it is the model in memory, whose loss was reported.

    Every weight is compared, and the loss of one batch, which the config decides too. An adapter beside the weights, a
    name that no longer fits or a dtype that was lost would show here.

    Args:
        folder: of the saved model.
        model: in memory.
        validation: held-out blocks.
        args: of the healing.
        whole: of a sharded model, its weights whole on the CPU, as Auto classes load them, its `sample_loss`, and the
            dtype that it computes in, None for float32. The saved model is run on the CPU: a device may not hold it.
    """
    saved = load_model(str(folder), args.trust_remote_code)
    if whole is None:
        own, expected = model.state_dict(), sample_loss(model, validation, args)
        saved = saved.to(model.device)
    else:
        own, expected, dtype = whole
    kept = saved.state_dict()
    if lost := [name for name in kept.keys() | own.keys() if name not in kept or not kept[name].equal(own[name])]:
        raise AssertionError(f"{folder} has not the weights of the model in memory: {len(lost)}, first {min(lost)!r}")
    if whole is not None:
        for parameter in saved.parameters():
            parameter.data = parameter.data.to(dtype or torch.float32)
    found = sample_loss(saved, validation, args)
    if not math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4):
        raise AssertionError(f"{folder} has the loss {found} on sample blocks, but the model in memory {expected}")


def open_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint; without `trust_remote_code` no code of its files is run.

    Raises:
        TiedMoeError: it cannot be read, or there is none: transformers then makes one up, which knows no text.
    """
    with reading(f"the tokenizer of {model}"):
        if trust_remote_code:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        else:
            tokenizer = load_tokenizer(model)
        is_empty = not tokenizer("Some text.").input_ids
    if is_empty:
        raise TiedMoeError(
            f"{model} has no tokenizer that knows any text; expected one: put its files beside the weights"
        )
    return tokenizer
