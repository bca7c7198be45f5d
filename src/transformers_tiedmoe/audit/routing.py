"""Watch which experts the routers of a model choose, without changing what it computes: the one way to record it."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families import expert_layers
from ..losses import router_modules, scores_of
from ..modeling_tiedmoe import TiedExperts
from .metrics import expert_counts, load_shares


def layer_experts(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find the experts module that each MoE layer calls, its own or its view of a pool; by layer index, in order."""
    experts = {layer: model.get_submodule(path) for layer, path in expert_layers(model).items()}
    for module in model.modules():
        if isinstance(module, TiedExperts):
            experts[model.config.groups[module.pool_index][module.position]] = module
    return dict(sorted(experts.items()))


class Choices(NamedTuple):
    """What the router of one layer chose for the T tokens of a call, in the order of the batch.

    Attributes:
        slots: `[T, K]` int64, numbers of the router's experts; `num_slots` or more where not used.
        weights: `[T, K]`.
        rows: `[T, K]` int64, numbers of the pool's experts, `num_rows` where not used; `slots` of an untied layer.
        scores: `[T, E]` float32, the distribution that the router chose by; None where the family reports none.
    """

    slots: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    num_slots: int
    num_rows: int
    scores: torch.Tensor | None


class RoutingWatch:
    """Calls `seen(layer, choices)` at every call of a layer's experts while it is entered.

    It hooks the call of each layer's experts, `(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])`, the
    same in every family, and the routers, for their scores.

    Args:
        model: any transformers MoE, tied or not.
        seen: called in the order of the layers, with tensors on the model's device that are not to be changed.
        with_scores: whether `Choices.scores` is wanted.
    """

    def __init__(self, model: PreTrainedModel, seen: Callable[[int, Choices], Any], with_scores: bool = False):
        self.experts, self.seen = layer_experts(model), seen
        self.routers = _routers_by_layer(model) if with_scores else {}
        self._scores = {layer: scores_of(module) for layer, (module, _) in self.routers.items()}
        self._logits: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Self:
        self._hooks = [
            module.register_forward_pre_hook(self._watch(layer), with_kwargs=True)
            for layer, module in self.experts.items()
        ]
        for layer, (module, index) in self.routers.items():
            self._hooks.append(module.register_forward_hook(self._keep_logits(layer, index)))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._logits.clear()

    def _keep_logits(self, layer: int, index: int) -> Callable:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            self._logits[layer] = (output if isinstance(output, torch.Tensor) else output[index]).detach()

        return keep

    def _watch(self, layer: int) -> Callable:
        @torch.no_grad()
        def watch(module: Any, args: tuple, kwargs: dict) -> None:
            given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args)) | kwargs
            slots, weights = given["top_k_index"].detach(), given["top_k_weights"].detach()
            rows, num_slots = slots, getattr(module, "num_experts", 0)
            num_rows = num_slots
            if isinstance(module, TiedExperts):
                num_slots, num_rows = module.num_slots, module.pool_size
                rows = slots.clamp(max=num_slots - 1)
                slot_map: Any = module.slot_map
                rows = rows if slot_map is None else slot_map.to(slots.device)[rows]
                rows = rows.masked_fill(slots >= num_slots, num_rows)
            logits, scores = self._logits.pop(layer, None), None
            if logits is not None:
                scores = self._scores[layer](logits.flatten(end_dim=-2).float())
            self.seen(layer, Choices(slots, weights, rows, num_slots, num_rows, scores))

        return watch


class RoutingCounts(RoutingWatch):
    """Counts which experts the routers of a model choose while it is entered.

    A tied layer's choices are counted by row of its pool, so that layers of a group compare.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, self._count)
        self.counts: dict[int, torch.Tensor] = {}

    def _count(self, layer: int, choices: Choices) -> None:
        counted = expert_counts(choices.rows, choices.num_rows).cpu()
        self.counts[layer] = self.counts.get(layer, 0) + counted

    def shares(self) -> dict[str, list[float]]:
        """Return each expert's share of the choices counted so far, by layer index as JSON has it."""
        return {str(layer): load_shares(count).tolist() for layer, count in sorted(self.counts.items())}


def _routers_by_layer(model: PreTrainedModel) -> dict[int, tuple[nn.Module, int]]:
    """Find each layer's router, and where in its output the logits are; empty for a family that does not say."""
    found = {}
    for name, module, index in router_modules(model.base_model):
        if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
            found[int(match[1])] = module, index
    return found
