"""A teacher that reads every batch itself."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .data import model_inputs
from .distillation import divergence
from .fused_loss import head_logits


class LiveTeacher:
    """A frozen causal LM that reads every batch.

    Args:
        model: in eval mode; on any device, or on several.
        temperature: of the divergence.
        has_head: whether `head_logits` gives its logits: they then exist for a chunk of tokens at a time.
    """

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0, has_head: bool = False):
        self.model, self.temperature, self.has_head = model, temperature, has_head

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return its last hidden states, or its logits without `has_head`, `[B, T, ...]`, on its own device."""
        given = {name: tensor.to(self.model.device) for name, tensor in model_inputs(inputs).items()}
        if self.has_head:
            return (self.model.base_model(**given, use_cache=False).last_hidden_state,)
        return (self.model(**given, use_cache=False).logits,)

    def divergence(self, logits: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        """Return KL(teacher || student) per token, `[N]`."""
        return divergence(logits, self.logits(*targets).to(logits.device), self.temperature)

    @torch.no_grad()
    def logits(self, target: torch.Tensor) -> torch.Tensor:
        """Return the logits `[N, V]` of some of the `targets`, `[N, ...]`."""
        return head_logits(self.model, target) if self.has_head else target
