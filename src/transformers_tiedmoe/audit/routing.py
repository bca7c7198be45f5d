"""Record which experts the routers of a model choose, without changing what it computes."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..families import expert_layers
from ..modeling_tiedmoe import TiedExperts
from .metrics import expert_counts, load_shares


def layer_experts(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Find the experts module that each MoE layer calls, its own or its view of a pool; by layer index, in order."""
    experts = {layer: model.get_submodule(path) for layer, path in expert_layers(model).items()}
    for module in model.modules():
        if isinstance(module, TiedExperts):
            experts[model.config.groups[module.pool_index][module.position]] = module
    return dict(sorted(experts.items()))


class RoutingCounts:
    """Counts which experts the routers of a model choose while it is entered.

    It hooks the call of each layer's experts, `(hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K])`, the
    same in every family. A tied layer's choices are counted by row of its pool, so that layers of a group compare.
    """

    def __init__(self, model: PreTrainedModel):
        self.experts = layer_experts(model)
        self.counts: dict[int, torch.Tensor] = {}

    def __enter__(self) -> "RoutingCounts":
        self._hooks = [
            module.register_forward_pre_hook(self._counter(layer), with_kwargs=True)
            for layer, module in self.experts.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _counter(self, layer: int):
        def count(module: Any, args: tuple, kwargs: dict) -> None:
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            is_view = isinstance(module, TiedExperts)
            if is_view and module.slot_map is not None:
                index = module.slot_map[index[index < module.num_slots]]  # the others are inactive
            width = module.pool_size if is_view else module.num_experts
            counted = expert_counts(index, width).cpu()
            self.counts[layer] = self.counts.get(layer, 0) + counted

        return count

    def shares(self) -> dict[str, list[float]]:
        """Return each expert's share of the choices counted so far, by layer index as JSON has it."""
        return {str(layer): load_shares(count).tolist() for layer, count in sorted(self.counts.items())}
