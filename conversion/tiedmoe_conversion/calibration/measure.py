"""What a conversion cost, measured on the held-out part of the calibration text: loss, routing, and what nobody uses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transformers_tiedmoe.audit.metrics import expert_counts, routing_agreement

from ..checkpoint.reader import open_source
from ..layout.source_model import family_model
from ..layout.tied_view import LayerTensors
from ..verify import tied_layers
from .inputs import Calibration
from .streamed_model import StreamedModel

if TYPE_CHECKING:
    from ..plan import Plan

Routing = dict[int, torch.Tensor]


def measure(plan: "Plan", folder: Path, calibration: Calibration) -> dict[str, Any]:
    """Compare the tied checkpoint in `folder` with its source; both run layer by layer.

    Returns:
        JSON-able: `loss_before`, `loss_after` and `loss_added` in nats per token on `tokens` held-out tokens;
        `routing_agreement`, the share of the source's active experts that the tied model's routers choose too, by layer and
        its `mean`; `dead_slots`, by tied layer how many of its slots no token chose (the source's own beside it), and
        `dead_experts`, by pool how many of its experts no token reached.
    """
    before, source_routing = _run(calibration.model, calibration.held_out)
    tied = tied_layers(open_source(str(folder)), plan.config)
    model = StreamedModel(family_model(plan.source.model.config), tied.read, plan.bytes_before)
    after, tied_routing = _run(model, calibration.held_out)
    agreement = {
        layer: routing_agreement(source_routing[layer], tied_routing[layer]) for layer in sorted(source_routing)
    }
    num_slots = getattr(plan.config, plan.config.num_experts_field)
    slot_maps = _slot_maps(plan, tied, num_slots)
    dead_experts, dead_slots = {}, {}
    for p, group in enumerate(plan.groups):
        reached = torch.zeros(plan.pool_num_experts[p], dtype=torch.bool)
        for layer in group:
            chosen = expert_counts(tied_routing[layer], num_slots) > 0
            reached[slot_maps[layer][chosen]] = True
            in_source = expert_counts(source_routing[layer], num_slots) > 0
            dead_slots[str(layer)] = {"source": int((~in_source).sum()), "tied": int((~chosen).sum()), "of": num_slots}
        dead_experts[str(p)] = {"dead": int((~reached).sum()), "of": len(reached)}
    return {
        "tokens": calibration.held_out.numel(),
        "loss_before": before,
        "loss_after": after,
        "loss_added": after - before,
        "routing_agreement": {
            "mean": sum(agreement.values()) / len(agreement),
            **{str(layer): share for layer, share in agreement.items()},
        },
        "dead_slots": dead_slots,
        "dead_experts": dead_experts,
    }


def _run(model: StreamedModel, tokens: torch.Tensor) -> tuple[float, Routing]:
    """Loss, and by layer the chosen slots `[T, K]`."""
    parts: dict[int, list[torch.Tensor]] = {}

    def capture(
        layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> None:
        parts.setdefault(layer, []).append(top_k_index.cpu())

    loss = float(model.loss(tokens, capture).mean())
    return loss, {layer: torch.cat(each) for layer, each in parts.items()}


def _slot_maps(plan: "Plan", tied: LayerTensors, num_slots: int) -> dict[int, torch.Tensor]:
    layers = [layer for group in plan.groups for layer in group]
    found = {layer: tied.slot_map(f"{plan.source.experts[layer]}.") for layer in layers}
    return {layer: torch.tensor(rows) if rows else torch.arange(num_slots) for layer, rows in found.items()}
