"""`TiedMoeConfig`: a family's own config, flat, plus which layers read which pool.

`TiedMoeConfig(family="olmoe", ...)` returns an instance of a subclass of `OlmoeConfig` (made once per family), so the
family's layers are built with it directly and a field that transformers adds tomorrow is there. Every check that
involves more than one field is in `_resolve_pools`.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .errors import TiedMoeError
from .families import canonical_family, config_class, expert_layers, family_skeleton, remote_classes, restore_config
from .hub import write_stub
from .pools import check_groups, tie_groups

# What families call the number of experts of a layer, and the experts active per token; most alias them already.
NUM_EXPERTS_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_router_topk")
TYING_FIELDS = (
    "family",
    "group_size",
    "skip_first",
    "skip_last",
    "groups",
    "pool_num_experts",
    "slot_maps",
    "residual_rank",
    "router_z_loss_coef",
    "recompute_experts",
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
    pool_num_experts: int | list[int] | None = None
    slot_maps: bool | list[bool] = False
    residual_rank: int | list[int] = 0
    router_z_loss_coef: float = 0.0
    recompute_experts: bool = False

    def __new__(cls, *args, family: str = "olmoe", **kwargs):
        return super().__new__(config_class(cls, canonical_family(family)) if cls is TiedMoeConfig else cls)

    def __post_init__(self, **kwargs):
        self.family = canonical_family(self.family)
        super().__post_init__(**kwargs)
        self.auto_map = dict(remote_classes(self.family))
        self._resolve_pools()

    @classmethod
    def from_family(cls, config: PreTrainedConfig, **tying_fields) -> "TiedMoeConfig":
        """The tied configuration of a family's `config`, e.g. an `OlmoeConfig`; `tying_fields` as in the class."""
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
        """The family's own untied config, without the tying fields."""
        fields = self.to_dict()
        for name in ("model_type", "transformers_version", "architectures", "auto_map", *TYING_FIELDS):
            fields.pop(name, None)
        return CONFIG_MAPPING[self.family](**fields)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: checkpoints carry a stub that imports this package, never a copy of its source."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers' own, plus the stub `tiedmoe_remote.py` that `trust_remote_code=True` imports."""
        write_stub(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def num_experts_field(self) -> str:
        """The family's name for the number of experts of a layer, e.g. `n_routed_experts`."""
        return _first_field(self, NUM_EXPERTS_FIELDS, "experts per layer")

    @property
    def experts_per_token(self) -> int:
        """Experts active per token, K, under whatever name the family has for it."""
        return getattr(self, _first_field(self, TOP_K_FIELDS, "active experts per token"))

    def group_of(self, layer: int) -> int | None:
        """The pool that `layer` reads, or None where it is untied."""
        return next((p for p, group in enumerate(self.groups or []) if layer in group), None)

    def _resolve_pools(self) -> None:
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
        self.pool_num_experts = self._one_per_pool("pool_num_experts", pools, int, least=1)
        self.slot_maps = self._one_per_pool("slot_maps", self.slot_maps, bool)
        self.residual_rank = self._one_per_pool("residual_rank", self.residual_rank, int, least=0)

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

    def _one_per_pool(self, name: str, value: Any, kind: type, least: int | None = None) -> list:
        num_pools = len(self.groups or [])
        values = list(value) if isinstance(value, (list, tuple)) else [value] * num_pools
        if len(values) != num_pools:
            raise TiedMoeError(
                f"{name} has {len(values)} entries for {num_pools} pools; give one value, or one per pool"
            )
        for p, entry in enumerate(values):
            if type(entry) is not kind or (least is not None and entry < least):  # type: ignore[operator]
                at_least = "" if least is None else f" of at least {least}"
                raise TiedMoeError(f"{name} of pool {p} is {entry!r}; expected {kind.__name__}{at_least}")
        return values

    def __reduce__(self):
        return restore_config, (TiedMoeConfig, self.family), self.__dict__


def _first_field(config: PreTrainedConfig, names: tuple[str, ...], what: str) -> str:
    for name in names:
        if getattr(config, name, None) is not None:
            return name
    raise TiedMoeError(f"family {config.family!r} has no field for its {what}; expected one of {list(names)}")
