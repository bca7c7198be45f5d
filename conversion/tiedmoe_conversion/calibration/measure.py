"""What a conversion cost, measured on the held-out part of the calibration text: loss, routing, dead experts."""

from typing import Any

import torch

from transformers_tiedmoe import TiedMoeConfig
from transformers_tiedmoe.audit.metrics import expert_counts, num_dead, routing_agreement

from ..layout.source_model import SourceModel, family_model
from ..layout.tied_view import LayerTensors
from .inputs import Calibration
from .streamed_model import StreamedModel

Routing = dict[int, torch.Tensor]


def measure_conversion(
    source: SourceModel, output: LayerTensors, config: TiedMoeConfig, calibration: Calibration
) -> dict[str, Any]:
    """Compare a tied checkpoint with its source on the held-out text; both run layer by layer.

    Args:
        source: what was converted.
        output: the converted checkpoint's layers.
        config: the converted checkpoint's.
        calibration: the source on text.

    Returns:
        JSON-able: `loss_before`, `loss_after` and `loss_added` in nats per token on `tokens` held-out tokens;
        `routing_agreement`, the share of the source's active experts that the tied model's routers choose too, by
        layer and its `mean`; `dead_slots`, by tied layer how many of its slots no token chose (the source's own beside
        it), and `dead_experts`, by pool how many of its experts no token reached.
    """
    groups: Any = config.groups
    widths: Any = config.pool_num_experts
    before, source_routing = _run(calibration.model, calibration.held_out)
    model = StreamedModel(family_model(source.model.config), output.read, source.bytes_as_read)
    after, tied_routing = _run(model, calibration.held_out)
    num_slots = source.num_experts
    agreement = {
        layer: routing_agreement(source_routing[layer], tied_routing[layer], num_slots)
        for layer in sorted(source_routing)
    }
    dead_experts, dead_slots = {}, {}
    for p, group in enumerate(groups):
        counts = torch.zeros(widths[p], dtype=torch.int64)
        for layer in group:
            chosen, in_source = (expert_counts(each[layer], num_slots) for each in (tied_routing, source_routing))
            rows = output.slot_map(f"{source.experts[layer]}.")
            counts.index_add_(0, torch.arange(num_slots) if rows is None else torch.tensor(rows), chosen.cpu())
            dead_slots[str(layer)] = {"source": num_dead(in_source), "tied": num_dead(chosen), "of": num_slots}
        dead_experts[str(p)] = {"dead": num_dead(counts), "of": len(counts)}
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
    """Return the loss, and by layer the chosen slots `[T, K]`."""
    parts: dict[int, list[torch.Tensor]] = {}

    def capture(
        layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> None:
        parts.setdefault(layer, []).append(top_k_index.cpu())

    loss = float(model.loss(tokens, capture).mean())
    return loss, {layer: torch.cat(each) for layer, each in parts.items()}
