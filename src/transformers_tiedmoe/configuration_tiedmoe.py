"""`TiedMoeConfig`: a family's own config, flat, plus which layers read which pool.

`TiedMoeConfig(family="olmoe", ...)` returns an instance of a subclass of `OlmoeConfig` (made once per family), so the
family's layers are built with it directly, and fields that transformers adds later are inherited. A config.json is
untrusted input: `_check_claims` checks the type and range of the fields before anything is built from them; checks
across fields are in `_resolve_pools`.
"""

import math
from collections.abc import Mapping, Sequence
from reprlib import repr as short_repr
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .errors import TiedMoeError, reading
from .families import canonical_family, config_class, expert_layers, family_skeleton, remote_classes, restore_config
from .hub import write_stub
from .pools import check_groups, tie_groups
from .routing.options import SoftMoeOptions

# The families' names for the number of experts of a layer, and for the experts active per token.
NUM_EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_router_topk")
# Above any known model; a model of this size is still built on the meta device within seconds.
MAX_LAYERS, MAX_EXPERTS, MAX_LABELS = 1024, 2**16, 2**20
COMPONENTS = ("experts", "router", "attention")
SOFT_SINCE = "5.18"  # of transformers
TYING_FIELDS = (
    "family",
    "group_size",
    "skip_first",
    "skip_last",
    "groups",
    "tied_components",
    "pool_num_experts",
    "slot_maps",
    "residual_rank",
    "router_z_loss_coef",
    "recompute_experts",
    "routing",
    "softmoe",
)


class TiedMoeConfig(PreTrainedConfig):
    """Configuration of a family's MoE model whose groups of layers read shared pools of experts.

    Args:
        family (`str`, *optional*, defaults to `"olmoe"`):
            The transformers `model_type` whose code is used, e.g. `"mixtral"`, `"qwen3_moe"`, `"deepseek_v3"`.
        group_size (`int`, *optional*, defaults to 2):
            Consecutive MoE layers per pool, the paper's g (arXiv 2606.16825). 1 is the family's own model.
        skip_first, skip_last (`int`, *optional*, defaults to 2):
            MoE layers left untied at either end.
        groups (`list[list[int]]`, *optional*):
            Explicit layer indices per pool; overrides the three numbers above. Always holds the resolved lists
            afterwards, in memory and in config.json.
        tied_components (`str` or `list[str]`, *optional*, defaults to `["experts"]`):
            What the layers of a group share: `"experts"` always, and `"router"` and `"attention"` where they are
            named; `"all"` is all three. The paper's ablation: tying the experts alone is its recipe.
        pool_num_experts (`int` or `list[int]`, *optional*):
            Experts per pool, one number or one per pool; the family's own number by default. Resolved to a list.
        slot_maps (`bool` or `list[bool]`, *optional*, defaults to `False`):
            One or one per pool. `False`: a layer's router has as many outputs as its pool has experts. `True`: the
            router keeps the family's width E and the layer holds an int64 buffer `slot_map [E]` into the pool.
        residual_rank (`int` or `list[int]`, *optional*, defaults to 0):
            Rank of the low-rank residual that each layer adds to its pool's weights, one or one per pool; 0 is none.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5) in the training loss.
        recompute_experts (`bool`, *optional*, defaults to `False`):
            With `experts_implementation="tiedmoe"`: keep only the experts' input for the backward pass and compute
            their pre-activation `[T * K, 2I]` again there. Less memory, one more GEMM of three per layer.
        routing (`str`, *optional*, defaults to `"top_k"`):
            `"top_k"`, the family's own, or `"softmoe"`: the experts active per token adapt (arXiv 2606.17952).
        softmoe (`dict`, *optional*):
            With `routing="softmoe"` any fields of `routing.SoftMoeOptions`, such as `budget`, `alpha` or `threshold`.
            Holds all of them afterwards.
        family_fields:
            Every field of the family's own config, at top level.

    Raises:
        TiedMoeError: unknown family, a family without experts, or fields that contradict each other.

    Example:
        >>> config = TiedMoeConfig(family="olmoe", group_size=4, num_hidden_layers=12)
        >>> config.groups
        [[2, 3, 4, 5], [6, 7, 8, 9]]
    """

    model_type = "tiedmoe"
    has_no_defaults_at_init = True  # transformers 5.17 would build the family's default model to shorten config.json

    family: str = "olmoe"
    group_size: int = 2
    skip_first: int = 2
    skip_last: int = 2
    groups: list[list[int]] | None = None
    tied_components: str | list[str] = "experts"
    pool_num_experts: int | list[int] | None = None
    slot_maps: bool | list[bool] = False
    residual_rank: int | list[int] = 0
    router_z_loss_coef: float = 0.0
    recompute_experts: bool = False
    routing: str = "top_k"
    softmoe: dict[str, Any] | None = None

    def __new__(cls, *args, family: str = "olmoe", **kwargs):
        return super().__new__(config_class(cls, canonical_family(family)) if cls is TiedMoeConfig else cls)

    def __post_init__(self, **kwargs):
        self.family = canonical_family(self.family)
        self._check_claims({**vars(self), **kwargs})
        super().__post_init__(**kwargs)
        self.auto_map = dict(remote_classes(self.family))
        self._resolve_pools()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Build the config as transformers does; raise `TiedMoeError` for a field that it cannot use."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except TiedMoeError:
            raise
        except Exception as error:  # a field of another type, or of a value that no module can be built with
            name = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "the configuration"
            message = " ".join(str(error).split())[:300]
            raise TiedMoeError(
                f"{name}: transformers cannot build a model of config.json: {type(error).__name__}: {message}; use "
                "the config.json that belongs to the weights"
            ) from error

    @classmethod
    def from_family(cls, config: PreTrainedConfig, **tying_fields) -> "TiedMoeConfig":
        """Return the tied config of a family's `config`, e.g. an `OlmoeConfig`; `tying_fields` as in the class."""
        if isinstance(config, TiedMoeConfig):
            raise TiedMoeError(
                "the config is already a tiedmoe one; expected a family's own config such as OlmoeConfig"
            )
        unknown = set(tying_fields) - set(TYING_FIELDS)
        if unknown:
            raise TiedMoeError(f"unknown tying fields {sorted(unknown)}; expected some of {list(TYING_FIELDS)}")
        fields = config.to_dict()
        for name in ("model_type", "transformers_version", "architectures", "auto_map"):
            fields.pop(name, None)
        return cls(**{**fields, "family": config.model_type, **tying_fields})

    def to_family(self) -> PreTrainedConfig:
        """Return the family's own untied config, without the tying fields.

        Raises:
            TiedMoeError: fields that the family's own class refuses.
        """
        fields = self.to_dict()
        for name in ("model_type", "transformers_version", "architectures", "auto_map", *TYING_FIELDS):
            fields.pop(name, None)
        with reading(f"this config as one of family {self.family!r}"):
            return CONFIG_MAPPING[self.family](**fields)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: checkpoints carry a stub that imports this package, never a copy of its source."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save as transformers does, plus the stub `tiedmoe_remote.py` that `trust_remote_code=True` imports."""
        write_stub(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_experts_field(self) -> str:
        """The family's name for the number of experts of a layer, e.g. `n_routed_experts`."""
        return _first_field(self, NUM_EXPERTS_FIELDS, "experts per layer")

    @property
    def top_k_field(self) -> str:
        """The family's name for the experts active per token, e.g. `num_experts_per_tok`."""
        return _first_field(self, TOP_K_FIELDS, "active experts per token")

    @property
    def experts_per_token(self) -> int:
        """Experts active per token, K, whatever the family calls it: the most of any layer, if layers differ."""
        top_k = getattr(self, self.top_k_field)
        return max(top_k) if isinstance(top_k, (list, tuple)) else top_k

    def experts_per_token_of(self, layer: int) -> int:
        """Return K of one layer: hunyuan_v1_moe's config may hold one for each."""
        top_k = getattr(self, self.top_k_field)
        return top_k[layer] if isinstance(top_k, (list, tuple)) else top_k

    @property
    def most_experts_per_token(self) -> int:
        """How many experts a token can have, by the narrowest router and the family's limit of groups."""
        pools: Any = zip(self.pool_num_experts, self.slot_maps)  # type: ignore[arg-type]
        widths = [size for size, is_mapped in pools if not is_mapped]
        num_experts = min([getattr(self, self.num_experts_field), *widths])
        num_groups = getattr(self, "n_group", None) or 1
        return num_experts // num_groups * min(num_groups, getattr(self, "topk_group", None) or num_groups)

    def group_of(self, layer: int) -> int | None:
        """Return the pool that `layer` reads, or None if it is untied."""
        return next((p for p, group in enumerate(self.groups or []) if layer in group), None)

    def _check_claims(self, fields: Mapping[str, Any]) -> None:
        """Raise `TiedMoeError` unless every field has its type and range; later code loops over these numbers."""
        for name, value in fields.items():
            most = MAX_LAYERS if "layer" in name else MAX_EXPERTS if "expert" in name else MAX_LABELS
            if type(value) is int and ("layer" in name or "expert" in name or name == "num_labels") and value > most:
                raise TiedMoeError(f"{name}={value}; expected at most {most}")
            if isinstance(value, (list, tuple)) and ("layer" in name or name == "groups") and len(value) > MAX_LAYERS:
                raise TiedMoeError(f"{name} has {len(value)} entries; expected at most {MAX_LAYERS}, the most layers")
        if fields.get("num_hidden_layers") is not None:  # a family may count its list of layers instead
            _expect("num_hidden_layers", fields["num_hidden_layers"], int, least=1, most=MAX_LAYERS)
        for name, least in (("group_size", 1), ("skip_first", 0), ("skip_last", 0)):
            _expect(name, fields[name], int, least=least, most=MAX_LAYERS)
        _expect("recompute_experts", fields["recompute_experts"], bool)
        components = fields["tied_components"]
        named = set(components) if isinstance(components, list) and all(type(c) is str for c in components) else set()
        if components not in ("all", "experts") and not {"experts"} <= named <= set(COMPONENTS):
            raise TiedMoeError(
                f"tied_components={short_repr(components)}; expected 'all', or a list of {list(COMPONENTS)} with "
                "'experts' in it"
            )
        z_loss = fields["router_z_loss_coef"]
        if type(z_loss) not in (int, float) or not 0 <= z_loss < math.inf:
            raise TiedMoeError(f"router_z_loss_coef={short_repr(z_loss)}; expected a number of at least 0")
        groups = fields["groups"]
        if groups is not None and (isinstance(groups, (str, bytes)) or not isinstance(groups, Sequence)):
            raise TiedMoeError(f"groups={short_repr(groups)}; expected lists of layer indices, e.g. [[2, 3], [4, 5]]")
        for name in ("dtype", "torch_dtype"):
            dtype = fields.get(name)
            found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
                raise TiedMoeError(
                    f"{name}={short_repr(dtype)}; expected a floating dtype of torch such as 'bfloat16'"
                )

    def _resolve_pools(self) -> None:
        named: Any = COMPONENTS if self.tied_components == "all" else self.tied_components
        self.tied_components = [each for each in COMPONENTS if each in named]
        top_k: Any = getattr(self, self.top_k_field)
        if isinstance(top_k, (list, tuple)) and (
            len(top_k) != self.num_hidden_layers or not all(type(each) is int and each > 0 for each in top_k)
        ):
            raise TiedMoeError(
                f"{self.top_k_field}={short_repr(top_k)}; expected one integer of at least 1, or one for each of the "
                f"{self.num_hidden_layers} layers"
            )
        moe_layers = sorted(expert_layers(family_skeleton(self)))
        if not moe_layers:
            raise TiedMoeError(
                f"family {self.family!r} with these fields has no layer with experts; expected a Mixture-of-Experts "
                "configuration (check first_k_dense_replace, mlp_only_layers and the like)"
            )
        if self.groups is None:
            self.groups = tie_groups(moe_layers, self.group_size, self.skip_first, self.skip_last)
        else:
            check_groups(self.groups, moe_layers, self.num_hidden_layers)
            self.groups = [list(group) for group in self.groups]

        num_experts = getattr(self, self.num_experts_field)
        pools = self.pool_num_experts if self.pool_num_experts is not None else num_experts
        self.pool_num_experts = self._one_per_pool("pool_num_experts", pools, int, least=1, most=MAX_EXPERTS)
        self.slot_maps = self._one_per_pool("slot_maps", self.slot_maps, bool)
        self.residual_rank = self._one_per_pool("residual_rank", self.residual_rank, int, 0, most=self.hidden_size)

        self._resolve_routing(moe_layers)
        if self.router_z_loss_coef and not getattr(self, "output_router_logits", False):
            raise TiedMoeError(
                f"router_z_loss_coef={self.router_z_loss_coef} has no effect without router logits; "
                "set output_router_logits=True too"
            )
        num_expert_groups = getattr(self, "n_group", None) or 1
        for p, pool_size in enumerate(self.pool_num_experts):
            if self.slot_maps[p]:
                continue
            if pool_size < self.experts_per_token:
                raise TiedMoeError(
                    f"pool {p} has {pool_size} experts but {self.experts_per_token} are active per token; "
                    "enlarge the pool or lower the number of active experts"
                )
            if pool_size % num_expert_groups:
                raise TiedMoeError(
                    f"pool {p} has {pool_size} experts, which n_group={num_expert_groups} does not divide; "
                    "choose a multiple of n_group"
                )

    def _resolve_routing(self, moe_layers: Sequence[int]) -> None:
        if self.routing not in ("top_k", "softmoe"):
            raise TiedMoeError(f"routing={short_repr(self.routing)}; expected 'top_k' or 'softmoe'")
        if self.routing == "top_k":
            if self.softmoe is not None:
                raise TiedMoeError("softmoe has no effect with routing='top_k'; set routing='softmoe' too")
            return
        if "router" in self.tied_components:
            raise TiedMoeError(
                "routing='softmoe' keeps a router in every layer; leave 'router' out of tied_components"
            )
        if Version(transformers.__version__) < Version(SOFT_SINCE):
            raise TiedMoeError(
                f"routing='softmoe' needs transformers {SOFT_SINCE} or newer, whose experts know slots that are not "
                f"used; this is {transformers.__version__}: upgrade it, or use routing='top_k'"
            )
        top_k, most = [self.experts_per_token_of(layer) for layer in moe_layers], self.most_experts_per_token
        if not 1 <= min(top_k) <= max(top_k) <= most:
            raise TiedMoeError(
                f"{self.top_k_field}={getattr(self, self.top_k_field)}; expected 1 to {most}, the experts that a "
                "token can choose among"
            )
        options = SoftMoeOptions.of(self.softmoe or {}, len(moe_layers), most, sum(top_k) / len(moe_layers))
        self.softmoe = options.to_dict()

    def _one_per_pool(self, name: str, value: Any, kind: type, least: int = 0, most: int = 0) -> list:
        num_pools = len(self.groups or [])
        values = list(value) if isinstance(value, (list, tuple)) else [value] * num_pools
        if len(values) != num_pools:
            raise TiedMoeError(
                f"{name} has {len(values)} entries for {num_pools} pools; give one value, or one per pool"
            )
        for p, entry in enumerate(values):
            _expect(name, entry, kind, least, most, of=f" of pool {p}")
        return values

    def __reduce__(self):
        return restore_config, (TiedMoeConfig, self.family), self.__dict__


def _expect(name: str, value: Any, kind: type, least: int = 0, most: int = 0, of: str = "") -> None:
    is_in_range = kind is not int or (isinstance(value, int) and least <= value <= most)
    if type(value) is not kind or not is_in_range:
        bounds = f" of at least {least} and at most {most}" if kind is int else ""
        raise TiedMoeError(f"{name}={short_repr(value)}{of}; expected {kind.__name__}{bounds}")


def _first_field(config: PreTrainedConfig, names: tuple[str, ...], what: str) -> str:
    for name in names:
        if getattr(config, name, None) is not None:
            return name
    raise TiedMoeError(f"family {config.family!r} has no field for its {what}; expected one of {list(names)}")
