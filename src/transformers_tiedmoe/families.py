"""Makes our classes, one per family: a subclass of one of ours and of the family's own, registered and picklable.

This file imports neither our config nor our models: they pass their base classes in, so that imports run one way. A
family is the `model_type` of a transformers causal LM whose experts use `@use_experts_implementation`.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from reprlib import repr as short_repr
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .errors import TiedMoeError
from .parallel import plan_with_pools

HEADS: list[Any] = []  # our heads in order, each with its Auto class and the mapping of the families' own heads


def canonical_family(family: object) -> str:
    """Return the `model_type` of a family's causal LM config: "qwen3_5_moe" gives "qwen3_5_moe_text".

    Raises:
        TiedMoeError: no text-only causal LM with experts of that name.
    """
    if isinstance(family, str) and family in CONFIG_MAPPING and CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING:
        causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
        if causal_lm._can_set_experts_implementation() and not causal_lm.config_class.sub_configs:
            return causal_lm.config_class.model_type
    raise TiedMoeError(
        f"unknown family {short_repr(family)}; expected the model_type of a transformers text-only causal LM whose "
        "experts use `@use_experts_implementation`, such as 'olmoe', 'mixtral', 'qwen3_moe' or 'deepseek_v3'"
    )


# What a family's own model is made of


def family_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the family's untied base model of a tied `config` on the meta device: modules and shapes, no memory."""
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return MODEL_MAPPING[CONFIG_MAPPING[config.family]](copy.copy(config))


def expert_layers(model: nn.Module) -> dict[int, str]:
    """Find the layers of a model that have experts: `{layer index: path of its experts module}`, in order.

    Args:
        model: a family's base model or a head on it, untied, on any device.

    Returns:
        For example `{2: "model.layers.2.mlp.experts"}`; empty if the model has no experts.
    """
    layers: dict[int, str] = {}
    for path, module in model.named_modules():
        match = re.match(r"(?:\w+\.)?layers\.(\d+)\.", path)
        if match and is_experts(module):
            layer = int(match[1])
            if layer in layers:
                raise TiedMoeError(f"layer {layer} has two sets of experts, {layers[layer]} and {path}; expected one")
            layers[layer] = path
    return layers


def is_experts(module: nn.Module) -> bool:
    """Tell whether transformers' `@use_experts_implementation` made this module's class."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


@contextlib.contextmanager
def other_num_experts(config: Any, number: int) -> Iterator[None]:
    """Change `config`'s number of experts per layer within the block; modules built there refer to `config` itself."""
    own = getattr(config, config.num_experts_field)
    setattr(config, config.num_experts_field, number)
    try:
        yield
    finally:
        setattr(config, config.num_experts_field, own)


def check_alike(p: int, modules: dict[int, nn.Module], what: str = "experts") -> None:
    """Raise `TiedMoeError` unless group `p`'s layers have `modules` (`what`) of the same shapes and settings."""
    found = {}
    for layer, module in modules.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        settings = {
            k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "layer_idx"
        }
        found[layer] = (shapes, settings)
    first, *others = found
    for layer in others:
        if found[layer] != found[first]:
            raise TiedMoeError(
                f"group {p} ties layers {first} and {layer}, whose {what} differ: {found[first]} and {found[layer]}; "
                "put them into different groups"
            )


# Our classes, one per family


def register_head(auto_model: Any, family_heads: Any) -> Callable[[type], type]:
    """Register a head of ours, such as `TiedMoeForCausalLM`, with its Auto class and the families' own mapping."""

    def register(head: Any) -> Any:
        head._auto_model, head._family_heads = auto_model, family_heads
        HEADS.append(head)
        return head

    return register


def heads_of(family: str) -> list[Any]:
    """Return our heads that transformers has for `family`."""
    return [head for head in HEADS if CONFIG_MAPPING[family] in head._family_heads]


def config_class(base: Any, family: str) -> Any:
    """Make a family's config class, a subclass of `base` and of its own; register its heads with the Auto classes."""
    return _config_class(base, family)


@functools.cache
def _config_class(base: Any, family: str) -> Any:
    parent: Any = CONFIG_MAPPING[family]
    namespace = {
        "__doc__": f"`{parent.__name__}` with pools; see `{base.__name__}`.",
        "__module__": base.__module__,
        "__annotations__": {"family": str},
        "family": family,
        "base_model_tp_plan": plan_with_pools(parent.base_model_tp_plan),
        "base_model_ep_plan": plan_with_pools(parent.base_model_ep_plan),
        "base_model_pp_plan": None,  # a group's layers may lie in two stages
        "base_model_fsdp_plan": {**(parent.base_model_fsdp_plan or {}), "expert_pools.*": "free_full_weight"},
    }
    made = type(f"TiedMoe{parent.__name__}", (base, parent), namespace)
    for head in heads_of(family):  # the Auto classes look the exact config class up
        model = model_class(head, made)
        head._auto_model.register(made, model, exist_ok=True)
        # Trainer (label smoothing shifts a causal LM's labels) and pipelines look the class's name up
        head._family_heads._model_mapping[f"tiedmoe_{family}"] = model.__name__
    return made


def model_class(head: Any, config: Any) -> Any:
    """Make a family's model class, a subclass of `head` and of its own, e.g. TiedMoeForCausalLM and OlmoeForCausalLM.

    Raises:
        TiedMoeError: transformers has no such head for the family.
    """
    return _model_class(head, config)


@functools.cache
def _model_class(head: Any, config: Any) -> Any:
    family = config.family
    if CONFIG_MAPPING[family] not in head._family_heads:
        raise TiedMoeError(f"transformers has no {head.__name__.removeprefix('TiedMoe')} of family {family!r}")
    parent = head._family_heads[CONFIG_MAPPING[family]]
    namespace = {
        "__doc__": f"`{parent.__name__}` with pools; see `{head.__name__}`.",
        "__module__": head.__module__,
        "_family_class": parent,
        "config_class": config,
        **head._family_methods(parent),
    }
    made = type(f"TiedMoe{parent.__name__}", (head, parent), namespace)
    # transformers looks renamings up by class name: the untied layers of a checkpoint may have the old keys
    if head._family_heads is MODEL_MAPPING:
        mapping = get_checkpoint_conversion_mapping(parent.__name__) or get_checkpoint_conversion_mapping(family)
        if mapping is not None:
            register_checkpoint_conversion_mapping(made.__name__, mapping, overwrite=True)
    return made


@functools.cache
def module_class(base: Any, family_class: Any) -> Any:
    """Make the subclass of `base`, our pool or router, and of the family's own class, e.g. PoolOlmoeExperts."""
    namespace = {"__module__": base.__module__, "__doc__": f"{base.__name__} of `{family_class.__name__}`."}
    return type(f"{base.prefix}{family_class.__name__}", (base, family_class), namespace)


@functools.cache
def remote_classes(family: str) -> dict[str, str]:
    """Return a checkpoint's `auto_map`: what `trust_remote_code=True` imports from the stub beside config.json."""
    heads = {head._auto_model.__name__: f"tiedmoe_remote.{head.__name__}" for head in heads_of(family)}
    return {"AutoConfig": "tiedmoe_remote.TiedMoeConfig", **heads}


# Pickling: a class that was made here is made again before its object is filled


def restore_config(base: Any, family: str) -> Any:
    """Make an empty config of the family's class, which pickle then fills."""
    made = config_class(base, family)
    return made.__new__(made)


def restore_model(head: Any, config_base: Any, family: str) -> Any:
    """Make an empty model of the family's class, which pickle then fills."""
    return nn.Module.__new__(model_class(head, config_class(config_base, family)))


def restore_module(base: Any, family_class: Any) -> Any:
    """Make an empty pool or router of the family's class, which pickle then fills."""
    made = module_class(base, family_class)
    return made.__new__(made)
