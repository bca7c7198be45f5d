"""The family's own model with pools in it: only the difference.

`TiedMoeForCausalLM(config)` is an instance of the family's own `ForCausalLM`, whose tied layers' experts are replaced
by a `TiedExperts` view without expert weights. Notable: everything is built on the meta device first, so that untied
experts never take memory; the pools are owned once, by the base model, as `expert_pools`; a view finds its pool at
call time through that owner, so that whatever wraps the pool by then (peft, FSDP2, accelerate) is what it calls.
"""

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .configuration_tiedmoe import TiedMoeConfig, family_config_class
from .experts_interface import defer_weight_gradients, is_default_for
from .losses import add_router_losses, watch_routers
from .pools import default_slot_map

logger = logging.get_logger(__name__)


class Residual(NamedTuple):
    """What one layer adds to its pool's weights: `W[slot] + b[slot] @ a[slot]` per projection, slot by slot.

    `router_index [T, K]` int64 are the layer's own slots; `factors` maps a projection's name to
    `(b [E, rows, r], a [E, r, columns])` in the family's own layout of that projection.
    """

    router_index: torch.Tensor
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]


class ExpertPool(nn.Module):
    """One set of expert weights that several layers read. The family's experts class, plus an optional residual.

    Parameters carry the family's names, usually `gate_up_proj [P, 2I, H]` and `down_proj [P, H, I]`.
    """

    @staticmethod
    def of(experts: nn.Module) -> "ExpertPool":
        """The family's `experts` module as a pool; takes over its parameters."""
        pool = _restore_pool(type(experts))
        pool.__dict__.update(experts.__dict__)
        return pool

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: Residual | None = None,
    ) -> torch.Tensor:
        """`hidden_states [T, H]`, `top_k_index [T, K]` int64 rows of the pool, `top_k_weights [T, K]` -> `[T, H]`."""
        if residual is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # the family's, or its chosen backend
        return self._forward_with_residual(hidden_states, top_k_index, top_k_weights, residual)

    def _forward_with_residual(self, hidden_states, top_k_index, top_k_weights, residual):
        """One loop over the slots in use; the pool's rows are read in place, never summed with the residual."""
        if self.config._experts_implementation == "tiedmoe":
            logger.warning_once(
                "experts_implementation='tiedmoe' has no kernel for the residuals of a tied layer: the pools with "
                f"residual_rank={self.config.residual_rank} above 0 run as a loop over experts in plain torch."
            )
        output = torch.zeros_like(hidden_states)
        up_name = "gate_up_proj" if self.has_gate else "up_proj"
        num_slots = residual.factors["down_proj"][0].shape[0]
        for slot in residual.router_index.unique().tolist():
            if slot == num_slots:  # the sentinel of an inactive slot
                continue
            token, k = torch.where(residual.router_index == slot)
            row = top_k_index[token[0], k[0]]
            state = self._project(up_name, hidden_states[token], row, slot, residual)
            state = self._apply_gate(state) if self.has_gate else self.act_fn(state)
            state = self._project("down_proj", state, row, slot, residual)
            if getattr(self, "has_post_expert_norm", False):
                state = self.post_expert_norm(state)
            state = state * top_k_weights[token, k, None]
            output.index_add_(0, token, state.to(output.dtype))
        return output

    def _project(self, name: str, state: torch.Tensor, row: torch.Tensor, slot: int, residual: Residual):
        weight, (b, a) = getattr(self, name)[row], (factor[slot] for factor in residual.factors[name])
        if self.is_transposed:  # [in, out]
            state = state @ weight + (state @ b) @ a
        else:  # [out, in]
            state = state @ weight.T + (state @ a.T) @ b.T
        return state + getattr(self, f"{name}_bias")[row] if self.has_bias else state

    def __reduce__(self):
        return _restore_pool, (type(self).__mro__[2],), self.__dict__


class TiedExperts(nn.Module):
    """A tied layer's view of its pool: `(pool, slot_map)`, plus an optional low-rank residual; no expert weights.

    Args:
        owner: the base model, whose `expert_pools[pool_index]` is looked up at every call.
        pool_index: which pool.
        position: the layer's place in its group, from 0; decides the initial slot map.
        residual_rank: rank of this layer's residual, 0 for none.
    """

    def __init__(self, owner: nn.Module, pool_index: int, position: int, residual_rank: int):
        super().__init__()
        config, pool = owner.config, owner.expert_pools[pool_index]
        self._owner = (owner,)  # in a tuple: a reference, not a submodule
        self.pool_index, self.position = pool_index, position
        self.pool_size = config.pool_num_experts[pool_index]
        self.num_slots = getattr(config, config.num_experts_field) if config.slot_maps[pool_index] else self.pool_size
        self.register_buffer(
            "slot_map", torch.empty(self.num_slots, dtype=torch.int64) if config.slot_maps[pool_index] else None
        )
        self.residual_names = ("gate_up_proj" if pool.has_gate else "up_proj", "down_proj") if residual_rank else ()
        for name in self.residual_names:
            _, rows, columns = getattr(pool, name).shape
            self.register_parameter(f"{name}_residual_b", _empty(self.num_slots, rows, residual_rank))
            self.register_parameter(f"{name}_residual_a", _empty(self.num_slots, residual_rank, columns))

    def init_weights(self, std: float) -> None:
        """The default slot map, and a residual that is zero (b = 0, a normal) as LoRA's (arXiv 2106.09685, 4.1)."""
        if self.slot_map is not None:
            slots = default_slot_map(self.position, self.num_slots, self.pool_size)
            init.copy_(self.slot_map, torch.tensor(slots, device=self.slot_map.device))
        for name in self.residual_names:
            init.zeros_(getattr(self, f"{name}_residual_b"))
            init.normal_(getattr(self, f"{name}_residual_a"), mean=0.0, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The experts' contract of transformers: `[T, H]`, `[T, K]` int64 (E marks an inactive slot), `[T, K]`."""
        pool = self._owner[0].expert_pools[self.pool_index]
        extra = {}
        if self.residual_names:
            factors = {
                n: (getattr(self, f"{n}_residual_b"), getattr(self, f"{n}_residual_a")) for n in self.residual_names
            }
            extra["residual"] = Residual(top_k_index, factors)
        if self.slot_map is not None:
            inactive = top_k_index >= self.num_slots
            top_k_index = self.slot_map[top_k_index.clamp(max=self.num_slots - 1)]
            top_k_index = top_k_index.masked_fill(inactive, self.pool_size)
        # A pool may sit on another device than this layer (device_map="auto"); the layer's residual stream does not.
        return pool(hidden_states, top_k_index, top_k_weights, **extra).to(hidden_states.device)

    def extra_repr(self) -> str:
        mapped = "identity" if self.slot_map is None else f"slot_map[{self.num_slots}]"
        return f"pool_index={self.pool_index}, pool_size={self.pool_size}, {mapped}"


class TiedMoePreTrainedModel(PreTrainedModel):
    """What every tied model shares: how it is built, saved, and found by its family."""

    config_class = TiedMoeConfig
    _auto_model: Any = None  # the Auto class, and the mapping of the families' own heads: set by the classes below
    _family_heads: Any = None
    _family_class: type[PreTrainedModel] | None = None  # set where the class is made for one family

    def __new__(cls, config: TiedMoeConfig, *args, **kwargs):
        if not isinstance(config, TiedMoeConfig):
            raise ValueError(
                f"{cls.__name__} got a {type(config).__name__}; expected a TiedMoeConfig, which "
                "TiedMoeConfig.from_family(config, group_size=2) makes of a family's config"
            )
        return super().__new__(cls if cls._family_class else family_model_class(cls, type(config)))

    def __init__(self, config: TiedMoeConfig, *args, **kwargs):
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed ZeRO-3 splits weights up while a model is built, which pools do not support; "
                "use FSDP2 (accelerate's fsdp_version: 2) or ZeRO-2"
            )
        device = _device_of_new_parameters()
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            super().__init__(config, *args, **kwargs)  # the family's own constructor, which takes no memory here
            self._tie()
        if device.type != "meta":
            self.to_empty(device=device)
            for tensor in self._floating_tensors().values():
                tensor.data.fill_(torch.nan)
        self.post_init()  # once more, now that the pools and the memory are there
        unset = [
            name for name, tensor in self._floating_tensors().items() if not tensor.is_meta and tensor.isnan().any()
        ]
        if unset:
            raise NotImplementedError(
                f"family {config.family!r} gives no initial value to {unset[:5]}; expected `_init_weights` to set them. "
                "Load such a model by from_pretrained instead of making it from its config"
            )

    def _tie(self) -> None:
        """Put the pools into the model that the family's constructor has made on the meta device."""
        raise NotImplementedError

    def _floating_tensors(self) -> dict[str, torch.Tensor]:
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # diff with custom code: a module without tensors of its own may still initialise those of its children
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TiedExperts):
            module.init_weights(std=getattr(self.config, "initializer_range", None) or 0.02)
        else:
            super()._init_weights(module)

    @classmethod
    def prepare_distribute_model(cls, distributed_config, **kwargs):
        """FSDP2 only: a family's tensor, expert and pipeline plans name each layer's own experts, which pools are not."""
        fields = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config)
        for name in ("tp_plan", "tp_size", "ep_size", "pp_size", "enable_expert_parallel"):
            if fields.get(name) not in (None, False, 1):
                raise ValueError(
                    f"{name}={fields[name]!r} on a tied model; only FSDP2 is supported so far, "
                    "for which leave it out and set fsdp_size"
                )
        return super().prepare_distribute_model(distributed_config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As transformers' own; `TiedMoeForCausalLM.from_pretrained` picks the family from the config."""
        if cls._family_class is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if not isinstance(config, TiedMoeConfig):
            hub = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
            found = AutoConfig.from_pretrained(
                config or pretrained_model_name_or_path, **{k: v for k, v in kwargs.items() if k in hub}
            )
            if not isinstance(found, TiedMoeConfig):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {found.model_type!r} model; expected 'tiedmoe'. "
                    "Convert it first: tiedmoe convert SOURCE OUTPUT --calibration TEXT"
                )
        return cls._auto_model.from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As transformers' own, but the names on disk are the model's own: fused experts, every pool once."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: checkpoints carry a stub that imports this package, never a copy of its source."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # diff with transformers: on a GPU our own kernels are the default, where they know the family's experts
        if requested_experts is None and self._runs_on_our_kernels():
            requested_experts = "tiedmoe"
        return super().get_correct_experts_implementation(requested_experts)

    def _runs_on_our_kernels(self) -> bool:
        if not torch.cuda.is_available() or getattr(self.config, "quantization_config", None) is not None:
            return False
        skeleton = family_skeleton(self.config)
        return all(is_default_for(skeleton.get_submodule(path)) for path in expert_layers(skeleton).values())

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls._family_class._can_set_attn_implementation()

    def __reduce__(self):
        return _restore_model, (type(self).__mro__[1], self.config.family), self.__dict__


class TiedMoeModel(TiedMoePreTrainedModel):
    """The family's base model whose tied layers read `expert_pools`; made by `TiedMoeModel(config)`."""

    _auto_model, _family_heads = AutoModel, MODEL_MAPPING
    expert_pools: nn.ModuleList

    def _tie(self) -> None:
        config, paths = self.config, expert_layers(self)
        num_experts = getattr(config, config.num_experts_field)
        untied = {num_experts: self}  # the family's model for every width that a pool has
        for width in sorted(set(config.pool_num_experts) - {num_experts}):
            with _num_experts(config, width):
                untied[width] = self._family_class(config)

        for p, group in enumerate(config.groups):
            _check_alike(p, {layer: self.get_submodule(paths[layer]) for layer in group})
        self.expert_pools = nn.ModuleList(
            ExpertPool.of(untied[width].get_submodule(paths[group[0]]))
            for group, width in zip(config.groups, config.pool_num_experts)
        )
        for p, group in enumerate(config.groups):
            wide = untied[config.pool_num_experts[p]]
            for position, layer in enumerate(group):
                if not config.slot_maps[p] and wide is not self:  # the layer's router follows the pool's width
                    layer_path = re.match(r".*?\d+(?=\.)", paths[layer])[0]
                    self.set_submodule(layer_path, wide.get_submodule(layer_path))
                self.set_submodule(paths[layer], TiedExperts(self, p, position, config.residual_rank[p]))
        self._no_split_modules = {
            *(self._no_split_modules or ()),
            *(type(pool).__name__ for pool in self.expert_pools),
        }


class TiedMoeHead(TiedMoePreTrainedModel):
    """A head of the family's on a `TiedMoeModel`."""

    def _tie(self) -> None:
        if not isinstance(self.base_model, TiedMoeModel):
            setattr(self, self.base_model_prefix, TiedMoeModel(self.config))
        if getattr(self.config, "output_router_logits", False):
            watch_routers(self.base_model)

    @property
    def expert_pools(self) -> nn.ModuleList:
        """The pools, in order: the layers of `config.groups[p]` read `expert_pools[p]`."""
        return self.base_model.expert_pools


class TiedMoeForCausalLM(TiedMoeHead):
    """The family's causal LM whose tied layers read shared pools of experts.

    With `output_router_logits` the loss gains the balance loss of every layer, averaged over layers, which may differ
    in width, and the router z-loss (`TiedMoeConfig.router_z_loss_coef`); see `losses.py`.

    Example:
        >>> config = TiedMoeConfig(family="olmoe", group_size=4, num_hidden_layers=12, hidden_size=64)
        >>> model = TiedMoeForCausalLM(config)
        >>> len(model.expert_pools)
        2
    """

    _auto_model, _family_heads = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING


class TiedMoeForSequenceClassification(TiedMoeHead):
    """The family's sequence classifier on a tied base model, for the families that have one."""

    _auto_model, _family_heads = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


class TiedMoeForTokenClassification(TiedMoeHead):
    """The family's token classifier on a tied base model, for the families that have one."""

    _auto_model, _family_heads = AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


HEADS = (TiedMoeModel, TiedMoeForCausalLM, TiedMoeForSequenceClassification, TiedMoeForTokenClassification)


@functools.cache
def family_model_class(
    head: type[TiedMoePreTrainedModel], config_class: type[TiedMoeConfig]
) -> type[TiedMoePreTrainedModel]:
    """The subclass of both `head` and the family's own class, e.g. of TiedMoeForCausalLM and OlmoeForCausalLM."""
    family = config_class.family
    if CONFIG_MAPPING[family] not in head._family_heads:
        raise ValueError(f"transformers has no {head.__name__.removeprefix('TiedMoe')} of family {family!r}")
    parent = head._family_heads[CONFIG_MAPPING[family]]
    namespace = {
        "__doc__": f"`{parent.__name__}` with pools; see `{head.__name__}`.",
        "__module__": __name__,
        "_family_class": parent,
        "config_class": config_class,
    }
    if head is TiedMoeForCausalLM:
        namespace["forward"] = add_router_losses(parent.forward)
    elif head is TiedMoeModel:
        namespace["forward"] = refuse_reentrant_fsdp2(defer_weight_gradients(parent.forward))
    model_class = type(f"TiedMoe{parent.__name__}", (head, parent), namespace)
    if head is TiedMoeModel:
        # transformers looks renamings up by class name: the untied layers of a checkpoint may have the old keys
        mapping = get_checkpoint_conversion_mapping(parent.__name__) or get_checkpoint_conversion_mapping(family)
        if mapping is not None:
            register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)
    return model_class


def refuse_reentrant_fsdp2(forward: Callable) -> Callable:
    """Wrap a base model's `forward`: FSDP2 loses most of a pool's gradient when each layer has a backward pass of its own."""

    @functools.wraps(forward)
    def checked(self, *args, **kwargs):
        if self.training and any(map(_is_fsdp2_unit, self.expert_pools)):
            for module in self.modules():
                checkpoint = getattr(module, "_gradient_checkpointing_func", None)
                if getattr(module, "gradient_checkpointing", False) and checkpoint is not None:
                    if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
                        raise ValueError(
                            "reentrant gradient checkpointing under FSDP2 gives pools a wrong gradient; call "
                            'gradient_checkpointing_enable({"use_reentrant": False})'
                        )
                    break  # one function for all layers
        return forward(self, *args, **kwargs)

    return checked


def _is_fsdp2_unit(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)  # importing it takes over a second


def heads_of(family: str) -> list[type[TiedMoePreTrainedModel]]:
    """The heads that transformers has for `family`."""
    return [head for head in HEADS if CONFIG_MAPPING[family] in head._family_heads]


def register_heads(config_class: type[TiedMoeConfig]) -> None:
    """Register every head that the family has with the Auto classes, which look the exact config class up."""
    for head in heads_of(config_class.family):
        head._auto_model.register(config_class, family_model_class(head, config_class), exist_ok=True)


def family_skeleton(config: TiedMoeConfig) -> PreTrainedModel:
    """The family's untied base model on the meta device: its modules and shapes, no memory."""
    with torch.device("meta"), init.meta_device_safe_creation_ops():
        return MODEL_MAPPING[CONFIG_MAPPING[config.family]](copy.copy(config))


def expert_layers(model: nn.Module) -> dict[int, str]:
    """Which layers of a model have experts: `{layer index: path of its experts module}`, in order.

    Args:
        model: a family's base model or a head on it, untied, on any device.

    Returns:
        For example `{2: "model.layers.2.mlp.experts"}`; empty where the model has no experts.
    """
    layers: dict[int, str] = {}
    for path, module in model.named_modules():
        match = re.match(r"(?:\w+\.)?layers\.(\d+)\.", path)
        if match and _is_experts(module):
            layer = int(match[1])
            if layer in layers:
                raise ValueError(f"layer {layer} has two sets of experts, {layers[layer]} and {path}; expected one")
            layers[layer] = path
    return layers


@contextlib.contextmanager
def _num_experts(config: TiedMoeConfig, number: int):
    """`config` itself with another number of experts per layer; modules built meanwhile keep `config`."""
    own = getattr(config, config.num_experts_field)
    setattr(config, config.num_experts_field, number)
    try:
        yield
    finally:
        setattr(config, config.num_experts_field, own)


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers' `@use_experts_implementation` made this module's class."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _check_alike(p: int, experts: dict[int, nn.Module]) -> None:
    """Raise unless the layers of a group have experts of the same shapes and settings."""
    found = {}
    for layer, module in experts.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
        settings = {
            k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "layer_idx"
        }
        found[layer] = (shapes, settings)
    first, *others = found
    for layer in others:
        if found[layer] != found[first]:
            raise ValueError(
                f"group {p} ties layers {first} and {layer}, whose experts differ: {found[first]} and {found[layer]}; "
                "put them into different groups"
            )


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def _device_of_new_parameters() -> torch.device:
    """Where a parameter registered now would live, under `torch.device(...)` and accelerate's `init_empty_weights`."""
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.empty(0)))
    return probe.weight.device


@functools.cache
def _pool_class(experts_class: type[nn.Module]) -> Callable[..., ExpertPool]:
    namespace = {"__module__": __name__, "__doc__": f"A pool of `{experts_class.__name__}`."}
    return type(f"Pool{experts_class.__name__}", (ExpertPool, experts_class), namespace)


def _restore_pool(experts_class: type[nn.Module]) -> ExpertPool:
    pool_class = _pool_class(experts_class)
    return pool_class.__new__(pool_class)


def _restore_model(head: type[TiedMoePreTrainedModel], family: str) -> TiedMoePreTrainedModel:
    model_class = family_model_class(head, family_config_class(family))
    return nn.Module.__new__(model_class)
