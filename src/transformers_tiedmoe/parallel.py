"""Tensor and expert parallelism of a tied model: transformers' own, by plans that name the pools.

A family's plan says how the experts of every layer are split; a pool is split by the same rules, once for all layers
that read it. A tied layer's view has nothing to split: it maps the router's slots to rows of the whole pool, and the
pool, which transformers' hooks wrap, finds the rows' owners. So slot maps need no plan.
"""

import re
from typing import Any

from transformers import PreTrainedModel

from .errors import TiedMoeError

Plan = dict[str, str]
EXPERTS = re.compile(r"layers\.\*\.(?:\w+\.)*experts(?=\.|$)")  # the experts of a layer in a plan, whatever the family
POOLS = "expert_pools.*"


def plan_with_pools(family_plan: Plan | None) -> Plan | None:
    """Return a family's tensor- or expert-parallel plan with the rules of its experts repeated for pools.

    Example:
        >>> plan_with_pools({"layers.*.mlp.experts": "moe_tp_experts"})
        {'layers.*.mlp.experts': 'moe_tp_experts', 'expert_pools.*': 'moe_tp_experts'}
    """
    if family_plan is None:
        return None
    of_pools = {EXPERTS.sub(POOLS, name): style for name, style in family_plan.items() if EXPERTS.match(name)}
    return {**family_plan, **of_pools}


class ParallelPools(PreTrainedModel):
    """What differs from transformers when a model is split over processes."""

    @classmethod
    def prepare_distribute_model(cls, distributed_config, **kwargs):
        """Refuse what no tied model supports, before processes are joined."""
        fields = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config)
        if fields.get("pp_size") not in (None, 1):
            raise TiedMoeError(
                f"pp_size={fields['pp_size']} on a tied model, whose groups may lie in two stages, and a stage owns "
                "its weights; use tp_size, ep_size or fsdp_size"
            )
        for name in ("tp_plan", "tp_size", "ep_size", "enable_expert_parallel"):
            if fields.get(name) not in (None, False, 1) and not hasattr(PreTrainedModel, "_expand_parallel_plan"):
                raise TiedMoeError(
                    f"{name}={fields[name]!r} on a tied model needs transformers 5.23; update it, or use FSDP2: leave "
                    "it out and set fsdp_size"
                )
        return super().prepare_distribute_model(distributed_config, **kwargs)

    def init_parallel_plans(self) -> None:
        # diff with transformers: a model without pools, or with nothing but pools, has no rules for what it lacks
        super().init_parallel_plans()
        views = _views(self)
        modules = {name for name, _ in self.named_modules() if name not in views}
        names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in (*modules, *dict(self.named_parameters()))}
        for plan in (self._tp_plan, self._ep_plan, self._fsdp_plan):
            for name in [name for name in plan if POOLS in name or EXPERTS.search(name)]:
                if name not in names:
                    del plan[name]

    def _resolve_parallel_plans(self, distributed_config: Any) -> tuple[Plan, Plan, Plan]:
        # diff with transformers: what would give wrong numbers is refused, and a pool is one unit of FSDP2
        tp_size, ep_size = distributed_config.tp_size, distributed_config.ep_size
        if max(tp_size, ep_size) > 1 and any(self.config.residual_rank):
            raise TiedMoeError(
                f"tp_size={tp_size}, ep_size={ep_size} on a model with residual_rank={self.config.residual_rank}: a "
                "residual belongs to a layer's slots and cannot follow its pool's rows to other processes; use "
                "fsdp_size, or a model without residuals"
            )
        if max(tp_size, ep_size) > 1 and self.config.tied_components != ["experts"]:
            raise TiedMoeError(
                f"tp_size={tp_size}, ep_size={ep_size} on a model with tied_components={self.config.tied_components}, "
                "whose layers own no router or attention that a plan could split; use fsdp_size"
            )
        if ep_size > 1 and self.config.routing != "top_k":
            raise TiedMoeError(
                f"ep_size={ep_size} on a model with routing={self.config.routing!r}, whose tokens leave slots "
                "inactive, which transformers' exchange of tokens does not know; use tp_size or fsdp_size"
            )
        tp_plan, ep_plan, fsdp_plan = super()._resolve_parallel_plans(distributed_config)
        if tp_size > 1 and self.config.groups and not any("expert_pools." in name for name in (*tp_plan, *ep_plan)):
            raise TiedMoeError(
                f"tp_size={tp_size} on a model of family {self.config.family!r}, whose experts transformers has no "
                "tensor-parallel plan for: every process would hold all pools; use ep_size, or enable_expert_parallel"
            )
        return tp_plan, ep_plan, {name: style for name, style in fsdp_plan.items() if name not in ep_plan}

    def _expand_parallel_plan(self, plan: Plan) -> Plan:
        # diff with transformers: `layers.*.mlp.experts` is the rule of untied layers alone
        views = _views(self)
        return {name: style for name, style in super()._expand_parallel_plan(plan).items() if name not in views}


def _views(model: PreTrainedModel) -> set[str]:
    """Return the paths of the tied layers' views."""
    return {name for name, module in model.named_modules() if hasattr(module, "pool_index")}
