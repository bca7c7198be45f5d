"""The family's own model with pools in it: only the difference.

`TiedMoeForCausalLM(config)` is an instance of the family's own `ForCausalLM`, whose tied layers' experts are replaced
by a `TiedExperts` view without expert weights. Notable: everything is built on the meta device first, so that untied
experts never take memory; the pools are owned once, by the base model, as `expert_pools`; a view finds its pool at
call time through that owner, and so calls whatever wraps the pool by then (peft, FSDP2, accelerate).
"""

import itertools
import re
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from .configuration_tiedmoe import TiedMoeConfig
from .errors import TiedMoeError
from .experts_interface import defer_weight_gradients, is_default_for, tiedmoe_experts_forward
from .families import (
    check_alike,
    expert_layers,
    family_skeleton,
    model_class,
    other_num_experts,
    register_head,
    restore_model,
    restore_module,
)
from .fsdp import gather_once_per_group
from .loading import BUDGET, check_headers, check_pool, check_slot_map, read_headers, say_what_is_unquantised
from .losses import add_router_losses, watch_routers
from .offload import is_offloaded, keep_pools_loaded
from .parallel import ParallelPools
from .pools import default_slot_map
from .residual import Residual, experts_with_residual
from .routing.softmoe import ExpertBudget, soften
from .shared_modules import SharedView, share

logger = logging.get_logger(__name__)


class ExpertPool(nn.Module):
    """One set of expert weights that several layers read. The family's experts class, plus an optional residual.

    Parameters carry the family's names, usually `gate_up_proj [P, 2I, H]` and `down_proj [P, H, I]`.
    """

    prefix = "Pool"

    @staticmethod
    def of(experts: nn.Module) -> "ExpertPool":
        """Make a pool of the family's `experts` module, and take over its parameters."""
        pool = restore_module(ExpertPool, type(experts))
        pool.__dict__.update(experts.__dict__)
        return pool

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        residual: Residual | None = None,
    ) -> torch.Tensor:
        """Run the experts: `hidden_states [T, H]`, int64 rows of the pool and weights `[T, K]` each give `[T, H]`."""
        if residual is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # the family's, or its chosen backend
        if self.config._experts_implementation == "tiedmoe":
            return tiedmoe_experts_forward(self, hidden_states, residual.router_index, top_k_weights, residual)
        return experts_with_residual(self, hidden_states, top_k_index, top_k_weights, residual)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # diff with torch: integer weights are refused instead of cast
        check_pool({n: t for n, t in state_dict.items() if n.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __reduce__(self):
        return restore_module, (ExpertPool, type(self).__mro__[2]), self.__dict__


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
        self._checked_slot_map: Any = None  # the tensor whose values were last checked
        self.residual_names = ("gate_up_proj" if pool.has_gate else "up_proj", "down_proj") if residual_rank else ()
        for name in self.residual_names:
            _, rows, columns = getattr(pool, name).shape
            self.register_parameter(f"{name}_residual_b", _empty(self.num_slots, rows, residual_rank))
            self.register_parameter(f"{name}_residual_a", _empty(self.num_slots, residual_rank, columns))

    def init_weights(self, std: float) -> None:
        """Set the default slot map and, as LoRA does, a zero residual: b = 0, a normal (arXiv 2106.09685, 4.1)."""
        if self.slot_map is not None:
            slots = default_slot_map(self.position, self.num_slots, self.pool_size)
            init.copy_(self.slot_map, torch.tensor(slots, device=self.slot_map.device))
        for name in self.residual_names:
            init.zeros_(getattr(self, f"{name}_residual_b"))
            init.normal_(getattr(self, f"{name}_residual_a"), mean=0.0, std=std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Look up the layer's pool, map slots to rows and run these experts, under transformers' contract.

        `hidden_states [T, H]`, `top_k_index [T, K]` int64 slots of the layer's router (E marks an inactive one) and
        `top_k_weights [T, K]` give `[T, H]`.
        """
        pool = self._owner[0].expert_pools[self.pool_index]
        extra = {}
        if self.residual_names:
            factors = {
                n: (getattr(self, f"{n}_residual_b"), getattr(self, f"{n}_residual_a")) for n in self.residual_names
            }
            extra["residual"] = Residual(top_k_index, self.slot_map, factors)
        if self.slot_map is not None:
            if not torch.compiler.is_compiling() and self.slot_map is not self._checked_slot_map:
                self.check_slot_map()  # buffers may be set one by one, as accelerate's dispatch from disk does
            inactive = top_k_index >= self.num_slots
            top_k_index = self.slot_map[top_k_index.clamp(max=self.num_slots - 1)]
            top_k_index = top_k_index.masked_fill(inactive, self.pool_size)
        # A pool may sit on another device than this layer (device_map="auto"); the layer's residual stream does not.
        return pool(hidden_states, top_k_index, top_k_weights, **extra).to(hidden_states.device)

    def check_slot_map(self) -> None:
        """Raise `TiedMoeError` if the layer's slot map names rows outside its pool; skip one on the meta device."""
        if self.slot_map is not None and not self.slot_map.is_meta:
            check_slot_map(self.slot_map, self.pool_index, self.pool_size)
            self._checked_slot_map = self.slot_map

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # diff with torch: a slot map of floats, or with rows outside the pool, is refused instead of cast
        incoming = state_dict.get(f"{prefix}slot_map")
        if self.slot_map is not None and incoming is not None and not incoming.is_meta:
            check_slot_map(incoming, self.pool_index, self.pool_size)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        mapped = "identity" if self.slot_map is None else f"slot_map[{self.num_slots}]"
        return f"pool_index={self.pool_index}, pool_size={self.pool_size}, {mapped}"


class TiedMoePreTrainedModel(ParallelPools):
    """What every tied model shares: how it is built, saved, and found by its family."""

    config_class = TiedMoeConfig
    _auto_model: Any = None  # the Auto class, and the mapping of the families' own heads: set by `register_head`
    _family_heads: Any = None
    _family_class: type[PreTrainedModel] | None = None  # set where the class is made for one family

    def __new__(cls, config: TiedMoeConfig, *args, **kwargs):
        if not isinstance(config, TiedMoeConfig):
            raise TiedMoeError(
                f"{cls.__name__} got a {type(config).__name__}; expected a TiedMoeConfig, which "
                "TiedMoeConfig.from_family(config, group_size=2) makes of a family's config"
            )
        return super().__new__(cls if cls._family_class else model_class(cls, type(config)))

    def __init__(self, config: TiedMoeConfig, *args, **kwargs):
        if is_deepspeed_zero3_enabled():
            raise TiedMoeError(
                "DeepSpeed ZeRO-3 splits weights up while a model is built, which pools do not support; "
                "use FSDP2 (accelerate's fsdp_version: 2) or ZeRO-2"
            )
        device, buffer_device = _devices_of_new_tensors()
        checkpointing = getattr(config, "gradient_checkpointing", False)
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            super().__init__(config, *args, **kwargs)  # the family's own constructor, which takes no memory here
            self._tie()
        if device.type != "meta":
            self.to_empty(device=device)
        elif buffer_device.type != "meta":  # accelerate's `init_empty_weights`: no parameter takes memory, buffers do
            for module in self.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = torch.empty_like(buffer, device=buffer_device)
        if buffer_device.type != "meta":
            for tensor in self._floating_tensors().values():
                if not tensor.is_meta:
                    tensor.data.fill_(torch.nan)
        if checkpointing:  # the family's constructor has used it up, on modules that `_tie` replaced
            config.gradient_checkpointing = True
        self.post_init()  # again, now that the pools and the memory exist
        tensors = self._floating_tensors()
        if buffer_device.type != "meta" and not getattr(self, "_is_hf_initialized", False):
            tensors = self._init_buffers()  # under transformers' `no_init_weights`
        unset = [name for name, tensor in tensors.items() if not tensor.is_meta and tensor.isnan().any()]
        if unset:
            raise NotImplementedError(
                f"family {config.family!r} gives no initial value to {unset[:5]}; expected `_init_weights` to set "
                "them. Load such a model by from_pretrained instead of making it from its config"
            )

    def _init_buffers(self) -> dict[str, torch.Tensor]:
        """Set the buffers alone, as a family's constructor does, which ran on meta here; return the floating ones."""
        parameters, modules = list(self.parameters()), list(self.modules())
        for parameter in parameters:
            parameter._is_hf_initialized = True
        self.initialize_weights()
        for tensor_or_module in (*parameters, *modules):
            del tensor_or_module._is_hf_initialized
        return {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}

    def _tie(self) -> None:
        """Put the pools into the model that the family's constructor has made on the meta device."""
        raise NotImplementedError

    @classmethod
    def _family_methods(cls, parent: type[PreTrainedModel]) -> dict[str, Any]:
        """Return the methods that the class made for a family overrides; `parent` is the family's own class."""
        return {}

    def _floating_tensors(self) -> dict[str, torch.Tensor]:
        tensors = itertools.chain(self.named_parameters(), self.named_buffers())
        return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # diff with transformers: it skips custom modules without own tensors, which may initialise their children's
        super()._initialize_weights(module, is_custom_code=False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TiedExperts):
            module.init_weights(std=getattr(self.config, "initializer_range", None) or 0.02)
        elif isinstance(module, ExpertBudget):
            module.init_weights()
        elif not isinstance(module, SharedView):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load as transformers does; `TiedMoeForCausalLM.from_pretrained` picks the family from the config."""
        if cls._family_class is not None:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._check_loaded()
            if is_offloaded(model):
                keep_pools_loaded(model)
            return loaded
        if not isinstance(config, TiedMoeConfig):
            hub = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
            found = AutoConfig.from_pretrained(
                config or pretrained_model_name_or_path, **{k: v for k, v in kwargs.items() if k in hub}
            )
            if not isinstance(found, TiedMoeConfig):
                raise TiedMoeError(
                    f"{pretrained_model_name_or_path} holds a {found.model_type!r} model; expected 'tiedmoe'. "
                    "Convert it first: tiedmoe convert SOURCE OUTPUT --calibration TEXT"
                )
        elif pretrained_model_name_or_path is None:  # a state dict without a folder: only `config` names the family
            return model_class(cls, type(config)).from_pretrained(None, *model_args, config=config, **kwargs)
        return cls._auto_model.from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # diff with transformers: the model, still on meta, is checked against the files before it takes memory
        files = [] if state_dict is not None else checkpoint_files or []
        headers = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in (state_dict or {}).items()}
        if all(str(file).endswith(".safetensors") for file in files):
            headers |= read_headers(files)
        if not load_config.ignore_mismatched_sizes:
            name, is_quantised = str(load_config.pretrained_model_name_or_path), load_config.hf_quantizer is not None
            check_headers(model, headers, name, is_quantised, is_complete=bool(files and headers))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # diff with transformers: layers of fixed numbers in config.json replace what was learned
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if self.config.softmoe is not None and self.config.softmoe["layers"] is not None:
            names = loading_info.unexpected_keys
            loading_info.unexpected_keys = {name for name in names if not name.endswith(BUDGET)}

    def _check_loaded(self) -> None:
        """Check what a checkpoint has just put into the model."""
        is_quantised = getattr(self, "hf_quantizer", None) is not None
        for module in self.modules():
            if isinstance(module, TiedExperts):
                module.check_slot_map()
            elif isinstance(module, ExpertPool) and not is_quantised:
                check_pool(dict(module.named_parameters()))
        if is_quantised:
            say_what_is_unquantised(self)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save as transformers does, but under the model's own names: fused experts, and every pool once."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: checkpoints carry a stub that imports this package, never a copy of its source."""

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
        return cls._family_class is None or cls._family_class._can_set_attn_implementation()

    def __reduce__(self):
        return restore_model, (type(self).__mro__[1], TiedMoeConfig, self.config.family), self.__dict__


@register_head(AutoModel, MODEL_MAPPING)
class TiedMoeModel(TiedMoePreTrainedModel):
    """The family's base model whose tied layers read `expert_pools`; made by `TiedMoeModel(config)`."""

    expert_pools: nn.ModuleList

    @classmethod
    def _family_methods(cls, parent: type[PreTrainedModel]) -> dict[str, Any]:
        return {"forward": gather_once_per_group(defer_weight_gradients(parent.forward))}

    def _tie(self) -> None:
        config, paths = self.config, expert_layers(self)
        num_experts = getattr(config, config.num_experts_field)
        untied = {num_experts: self}  # the family's model for every width that a pool has
        for width in sorted(set(config.pool_num_experts) - {num_experts}):
            with other_num_experts(config, width):
                untied[width] = self._family_class(config)

        for p, group in enumerate(config.groups):
            check_alike(p, {layer: self.get_submodule(paths[layer]) for layer in group})
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
        share(self)
        if config.routing == "softmoe":
            soften(self, paths)
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


@register_head(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING)
class TiedMoeForCausalLM(TiedMoeHead, GenerationMixin):
    """The family's causal LM whose tied layers read shared pools of experts.

    With `output_router_logits` the loss gains the balance loss of every layer, averaged over layers, which may differ
    in width, and the router z-loss (`TiedMoeConfig.router_z_loss_coef`); see `losses.py`.

    Example:
        >>> config = TiedMoeConfig(family="olmoe", group_size=4, num_hidden_layers=12, hidden_size=64)
        >>> model = TiedMoeForCausalLM(config)
        >>> len(model.expert_pools)
        2
    """

    @classmethod
    def _family_methods(cls, parent: type[PreTrainedModel]) -> dict[str, Any]:
        return {"forward": add_router_losses(parent.forward)}


@register_head(AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
class TiedMoeForSequenceClassification(TiedMoeHead):
    """The family's sequence classifier on a tied base model, for the families that have one."""


@register_head(AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
class TiedMoeForTokenClassification(TiedMoeHead):
    """The family's token classifier on a tied base model, for the families that have one."""


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def _devices_of_new_tensors() -> tuple[torch.device, torch.device]:
    """Return the devices that a new parameter and a new buffer are put on here and now.

    `torch.device(...)` decides for both; accelerate's `init_empty_weights` puts parameters alone on meta.
    """
    probe = nn.Module()
    probe.register_parameter("weight", nn.Parameter(torch.empty(0)))
    probe.register_buffer("buffer", torch.empty(0))
    return probe.weight.device, probe.buffer.device
